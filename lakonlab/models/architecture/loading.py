"""From a weights file to a network: read, remap, load strictly.

:func:`read_weights` finds and reads the tensors, a network's ``remap_pretrained`` (pure functions) renames and reshapes
them, :func:`load_strictly` refuses whatever does not fit. Nothing here unpickles objects.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SAFETENSORS_SUFFIXES = ('.safetensors',)
PICKLED_SUFFIXES = ('.pth', '.pt', '.bin')
#: Where a training checkpoint holds the network, best first.
CHECKPOINT_PREFIXES = ('diffusion_ema.denoising.', 'diffusion.denoising.')


class PretrainedError(RuntimeError):
    """Weights that cannot be read, or do not fit the network they are meant for."""


def locate_weights(path: str) -> Path:
    """Find the file or checkpoint directory that a config names, without reading it.

    Args:
        path: A ``.safetensors`` or ``.pth``/``.pt``/``.bin`` file, or one of our checkpoints: its directory, the run's
            directory, or ``latest.pth`` in that.

    Returns:
        The file, or the directory of the checkpoint.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It is of a kind that cannot be read.
    """
    if '://' in path:
        raise PretrainedError(f'pretrained={path!r}: only local paths can be read; download the file and name its path')
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in SAFETENSORS_SUFFIXES + PICKLED_SUFFIXES:
            kinds = ', '.join(SAFETENSORS_SUFFIXES + PICKLED_SUFFIXES)
            raise PretrainedError(
                f'pretrained={path!r} has the suffix {local.suffix!r}; expected one of {kinds}, '
                'or the directory of a checkpoint'
            )
        return local
    from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint

    try:
        found = find_checkpoint(path)
    except CheckpointError as error:
        raise PretrainedError(f'pretrained={path!r} cannot be used: {error}') from error
    if found is None:
        raise FileNotFoundError(
            f'pretrained={path!r} does not exist (working directory {str(Path.cwd())!r}); '
            'train or download those weights first, or correct the config key `pretrained`'
        )
    return found


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the network's tensors from a file or from a checkpoint of a run.

    Of a training checkpoint the EMA network is taken if there is one, else the student.

    Args:
        path: See :func:`locate_weights`.

    Returns:
        Name -> tensor on the CPU, names relative to the network.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It cannot be read.
    """
    found = locate_weights(path)
    if found.is_dir():
        from lakonlab.storage.checkpoint import CheckpointError, load_model_state

        try:
            state = load_model_state(found)
        except CheckpointError as error:
            raise PretrainedError(f'pretrained={path!r} cannot be used: {error}') from error
    elif found.suffix in SAFETENSORS_SUFFIXES:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(found)
        except SafetensorError as error:
            raise PretrainedError(f'pretrained={path!r} is not a readable safetensors file: {error}') from error
    else:
        try:
            state = torch.load(found, map_location='cpu', weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged or unsafe files
            raise PretrainedError(
                f'pretrained={path!r} cannot be read as a file of plain tensors ({type(error).__name__}: {error}); '
                'files that hold other Python objects are refused, convert them to .safetensors'
            ) from error
        state = _unwrap(state, path)
    return select_network(state)


def _unwrap(state, path: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get('state_dict'), Mapping):
        state = state['state_dict']
    if not isinstance(state, Mapping):
        raise PretrainedError(f'pretrained={path!r} holds a {type(state).__name__}, expected a dict of tensors')
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PretrainedError(f'pretrained={path!r} holds no tensors; its keys are {sorted(map(str, state))[:10]}')
    return tensors


def select_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the tensors of the network from the state of a whole model, and drop the prefix of their names.

    Args:
        state: Name -> tensor.

    Returns:
        The EMA network's tensors if there are any, else the student's, else all.
    """
    for prefix in CHECKPOINT_PREFIXES:
        selected = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if selected:
            return selected
    return dict(state)


def load_strictly(
    network: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    ignored: Sequence[str] = (),
    allowed_missing: Sequence[str] = (),
    assign: bool = False,
) -> None:
    """Copy tensors into a network, refusing anything that does not fit.

    Args:
        network: Receives the values, in its own dtypes and on its own devices.
        state: Name -> tensor.
        where: What the tensors come from, for messages.
        ignored: Names that ``state`` may have beyond the network's.
        allowed_missing: Names that ``state`` may lack.
        assign: Whether the tensors become those of the network instead of being copied, as networks without memory
            need it.

    Raises:
        PretrainedError: Names are missing, unexpected, or have another shape; all are named.
    """
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    missing = [name for name in own if name not in state and name not in allowed_missing]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f'{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network'
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = []
    for title, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', mismatched)):
        if names:
            problems.append(f'  {len(names)} {title}:\n' + ''.join(f'    {name}\n' for name in names))
    if problems:
        raise PretrainedError(
            f'pretrained={where!r} does not fit {type(network).__name__}:\n'
            + ''.join(problems)
            + '  Check that the config key `pretrained` names weights of this architecture and that the arguments of '
            'the network (layers, heads, channels, classes) are those they were trained with.'
        )
    network.load_state_dict(state, strict=not allowed_missing, assign=assign)


def load_pretrained(network: nn.Module, path: str, source=None) -> None:
    """Load weights into a network; a network on the meta device only has them located.

    Args:
        network: A :class:`~lakonlab.models.architecture.network.Network`.
        path: See :func:`locate_weights`.
        source: Random source of what the file does not determine; None for torch's global state.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        PretrainedError: It cannot be read or does not fit.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        locate_weights(path)
        return
    state = network.remap_pretrained(read_weights(path), source)
    load_strictly(network, state, path, network.ignored_keys, network.allowed_missing)
    logger.info('%s: loaded %d tensors from %s', type(network).__name__, len(state), path)
