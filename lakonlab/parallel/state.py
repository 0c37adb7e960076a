"""Which tensors of a model belong to its training state, and what a process holds of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.storage.checkpoint import CheckpointError
from lakonlab.storage.pieces import Pieces


def training_state(model: nn.Module, trainable_only: bool = True) -> dict[str, Tensor]:
    """The tensors that a run has to save, by name; views of the model, not copies.

    Those are the parameters that training changes, their moving averages, and the persistent buffers of every child
    module that has such parameters. A frozen child (teacher, VAE, text encoder) belongs to no checkpoint: it is loaded
    from where the config says. ``<child>_ema`` follows ``<child>``, whatever its own ``requires_grad`` says. Names are
    those of :func:`~lakonlab.models.architecture.roles.named_state`, whoever shares tensors with whom; a shared tensor
    is listed once.

    Args:
        model: The whole model.
        trainable_only: If False, frozen parameters of trained children are included too.

    Returns:
        Name -> tensor.
    """
    state = dict(named_state(model))
    trainable = {name for name, tensor in state.items() if tensor.requires_grad}
    trained_children = {name.partition('.')[0] for name in trainable}

    def is_saved(name: str) -> bool:
        child, _, rest = name.partition('.')
        source = child.removesuffix('_ema')
        if source not in trained_children and child not in trained_children:
            return False
        if not isinstance(state[name], nn.Parameter) or not trainable_only:
            return True
        return name in trainable or f'{source}.{rest}' in trainable

    saved: dict[int, str] = {}
    for name, tensor in state.items():
        if is_saved(name):
            saved.setdefault(id(tensor), name)
    return {name: state[name] for name in saved.values()}


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be divided; shares its memory."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def check_fits(saved: Mapping[str, tuple], wanted: Mapping[str, Tensor | Pieces], origin: object) -> None:
    """Compare names and shapes of a checkpoint with those of a model.

    Args:
        saved: Name -> (shape, dtype) in the checkpoint.
        wanted: Name -> tensor of the model.
        origin: The checkpoint, for the message.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape; the message names them.
    """
    problems = []
    for title, names in (
        ('missing from the checkpoint', sorted(set(wanted) - set(saved))),
        ('in the checkpoint but not in the model', sorted(set(saved) - set(wanted))),
        (
            'of another shape',
            [
                f'{name} {tuple(saved[name][0])} in the checkpoint, {tuple(wanted[name].shape)} in the model'
                for name in sorted(set(saved) & set(wanted))
                if tuple(saved[name][0]) != tuple(wanted[name].shape)
            ],
        ),
    ):
        if names:
            more = f', and {len(names) - 8} more' if len(names) > 8 else ''
            problems.append(f'{len(names)} {title}: {", ".join(names[:8])}{more}')
    if problems:
        raise CheckpointError(
            f'{origin} does not fit the model of this config: {"; ".join(problems)}. Use the config that the '
            'checkpoint was made with, or give the run another name.'
        )
