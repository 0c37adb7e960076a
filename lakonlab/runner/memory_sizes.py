"""The sizes that a memory plan is made of, from a config and its model on the meta device.

What is divided and what stays whole is not decided here: the strategies are asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.config.errors import ConfigError
from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.state import training_state
from lakonlab.parallel.units import Place
from lakonlab.registry import STRATEGIES
from lakonlab.runner.activation_memory import measure_inference, measure_training
from lakonlab.runner.memory_plan import SHARDING, Activations, Sharding, Sizes, optimizer_bytes
from lakonlab.runner.sections import saves_trainable_only

TEACHER, STUDENT = 'teacher', 'diffusion'
ON_THE_HUB = ('vae', 'text_encoder')
"""Children that have no parameters before their weights are read."""
DEFAULT_TEXT_LENGTH = 512
UNITS_AT_ONCE = {'fsdp': 2, 'fsdp2': 3}
"""The unit that computes and the one that is fetched ahead; FSDP2 copies the one that computes out of what was sent."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sizes_of(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[Sizes, list[str]]:
    """Measure what training a config takes on one device.

    Args:
        model: The model of the config, on the meta device.
        cfg: The checked config.

    Returns:
        The sizes, and what had to be assumed or is not known, in sentences.

    Raises:
        ConfigError: ``fsdp_kwargs`` does not fit the model.
    """
    notes: list[str] = []
    divisions = {strategy: _Division(model, cfg, strategy, notes) for strategy in SHARDING}
    division = divisions[SHARDING[0]]  # what is whole is the same under all of them
    by_key = {
        key: [parameter for _, parameter in named_state(model.get_submodule(key)) if parameter.requires_grad]
        for key in cfg['optimizer']
    }
    trained = {id(parameter): parameter for own in by_key.values() for parameter in own}
    of_average = [name.startswith(f'{STUDENT}_ema.') for name, _ in named_state(model)]
    of_others = {id(tensor) for (_, tensor), own in zip(named_state(model), of_average) if not own}
    averages = {
        id(tensor): tensor
        for (_, tensor), own in zip(named_state(model), of_average)
        if own and id(tensor) not in of_others
    }
    constant = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    constant = {key: tensor for key, tensor in constant.items() if key not in trained and key not in averages}
    groups = {
        'frozen': division.bytes_of_divided(constant.values()),
        'resident': division.bytes_of_whole(constant.values()),
        'trainable': bytes_of(trained.values()),
        'average': bytes_of(averages.values()),
    }
    for name, size in _sizes_on_the_hub(model, notes).items():
        groups['frozen' if name in division.children else 'resident'] += size

    moments = _moments(by_key, cfg['optimizer'])
    whole_moments = _moments(by_key, cfg['optimizer'], division.is_whole)
    sharded_moments = _sharded_moments(by_key, cfg['optimizer'], notes)
    state = training_state(model, saves_trainable_only(cfg)).values()
    micro_batch, passes = _micro_batch_and_passes(model, cfg)
    kept, checkpointed = _activations(model, cfg, micro_batch, notes)
    return (
        Sizes(
            **groups,
            gradients=groups['trainable'],
            optimizer=moments,
            kept=kept,
            checkpointed=checkpointed,
            sharding={
                strategy: Sharding(
                    optimizer=sharded_moments[strategy],
                    gathered=divisions[strategy].gathered(STUDENT),
                    teacher_gathered=divisions[strategy].gathered(STUDENT if _teacher_shares(model) else TEACHER),
                    unit_gradients=divisions[strategy].largest_gradients(trained),
                    keeps_gradients=divisions[strategy].keeps_gradients,
                )
                for strategy in SHARDING
            },
            passes=passes,
            undivided=2 * division.bytes_of_whole(trained.values())
            + whole_moments
            + division.bytes_of_whole(averages.values()),
            undivided_gradients=division.bytes_of_whole(trained.values()),
            saved=bytes_of(state),
            saved_undivided=division.bytes_of_whole(state) + whole_moments,
        ),
        notes,
    )


class _Division:
    """What a sharding strategy divides under the options of a config.

    Args:
        model: On the meta device.
        cfg: The config.
        name: Name of the strategy.
        notes: Gets what is not known.

    Raises:
        ConfigError: ``fsdp_kwargs`` does not fit the model.
    """

    def __init__(self, model: nn.Module, cfg: Mapping[str, Any], name: str, notes: list[str]):
        options = {key: value for key, value in (cfg.get('fsdp_kwargs') or {}).items() if key != 'shard_size'}
        self.strategy = STRATEGIES.build({'type': name, 'device': 'meta', **options})
        self.children = self.strategy.divided_children(model)
        division = self._divide(model, notes)
        self._networks = division.networks
        self._divided = {
            id(parameter)
            for place in self._networks
            for parameter in place.module.parameters()
            if parameter not in division.whole
        }
        kept = {id(tensor) for tensor in training_state(model).values()}
        self._units = {
            id(place.module): self.strategy.units_within(place.module, division.units, kept) for place in self._networks
        }
        self.keeps_gradients = all(self.strategy.keeps_gradients(place.module, kept) for place in self._networks)

    def _divide(self, model: nn.Module, notes: list[str]):
        try:
            return self.strategy.division(model)
        except ConfigError as error:
            unknown = [name for name in ON_THE_HUB if name in self.children and _is_on_the_hub(model, name)]
            if 'fsdp_modules' not in str(error) or not unknown:
                raise
            note = f'fsdp_modules may name modules of {" and ".join(unknown)}: blocks are planned instead'
            notes.extend({note} - {*notes})
            self.strategy.fsdp_modules = ()
            return self.strategy.division(model)

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether every process holds all of a tensor."""
        return id(tensor) not in self._divided

    def bytes_of_divided(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those that are divided."""
        return bytes_of(tensor for tensor in tensors if not self.is_whole(tensor))

    def bytes_of_whole(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the others."""
        return bytes_of(filter(self.is_whole, tensors))

    def gathered(self, child: str) -> int:
        """Bytes that are gathered at once while a child computes: its largest units, and what is in no unit."""
        from lakonlab.parallel.sharded import float32_modules

        total, units = 0, []
        for network in self._networks_of(child):
            exact = float32_modules(network)

            def size(module: nn.Module, parameter: Tensor, exact: set[int] = exact) -> int:
                dtype = parameter.dtype if id(module) in exact else self.strategy.param_dtype or parameter.dtype
                return parameter.numel() * dtype.itemsize

            own, of_units = self._sizes(network, size)
            total += own
            units += of_units
        return total + sum(sorted(units)[-UNITS_AT_ONCE[self.strategy.name] :])

    def largest_gradients(self, trained: Mapping[int, Tensor]) -> int:
        """Bytes of the whole gradients of the student's unit that has most, in the precision they are summed in."""

        def size(module: nn.Module, parameter: Tensor) -> int:
            dtype = self.strategy.reduce_dtype or parameter.dtype
            return parameter.numel() * dtype.itemsize if id(parameter) in trained else 0

        sizes = [self._sizes(network, size) for network in self._networks_of(STUDENT)]
        return max((largest for own, units in sizes for largest in (own, *units)), default=0)

    def _networks_of(self, child: str) -> list[nn.Module]:
        return [place.module for place in self._networks if _child_of(place) == child]

    def _sizes(self, network: nn.Module, size: Callable[[nn.Module, Tensor], int]) -> tuple[int, list[int]]:
        """Sums over the divided parameters of a network that are in no unit, and over those of each unit."""
        sums: dict[int, int] = {}
        seen: set[int] = set()

        def visit(module: nn.Module, unit: int) -> None:
            unit = id(module) if id(module) in self._units[id(network)] else unit
            for parameter in module._parameters.values():
                if parameter is not None and not self.is_whole(parameter) and id(parameter) not in seen:
                    seen.add(id(parameter))
                    sums[unit] = sums.get(unit, 0) + size(module, parameter)
            for child in module.children():
                visit(child, unit)

        visit(network, id(network))
        return sums.pop(id(network), 0), list(sums.values())


def _child_of(place: Place) -> str:
    return place.path.partition('.')[0]


def _teacher_shares(model: nn.Module) -> bool:
    """Whether the teacher is a role of the student's base."""
    bases = [
        getattr(getattr(getattr(model, name, None), 'denoising', None), 'backbone', None) for name in (TEACHER, STUDENT)
    ]
    return bases[0] is not None and bases[0] is bases[1]


def _is_on_the_hub(model: nn.Module, name: str) -> bool:
    child = getattr(model, name, None)
    return child is not None and next(child.parameters(), None) is None


def _sizes_on_the_hub(model: nn.Module, notes: list[str]) -> dict[str, int]:
    """Bytes of the parts that are not built here, as far as they are known."""
    sizes = {}
    for name in ON_THE_HUB:
        if not _is_on_the_hub(model, name):
            continue
        child = getattr(model, name)
        number = getattr(child, 'published_parameters', None)
        if number is None:
            notes.append(f'{name} is on the hub: its size is not known, and it is NOT counted')
            continue
        sizes[name] = number * child.torch_dtype.itemsize
        notes.append(f'{name} is on the hub and taken to be as large as the published one')
    return sizes


def _moments(
    by_key: Mapping[str, Sequence[Tensor]],
    optimizer: Mapping[str, Mapping[str, Any]],
    counts: Callable[[Tensor], bool] = lambda parameter: True,
) -> int:
    """Bytes of the state of optimisers.

    Args:
        by_key: Key -> parameters.
        optimizer: Key -> section of the config.
        counts: Which parameters count.
    """
    return sum(
        optimizer_bytes(options, [(p.numel(), bytes_of([p])) for p in by_key[key] if counts(p)])
        for key, options in optimizer.items()
    )


def _sharded_moments(
    by_key: Mapping[str, Sequence[Tensor]], optimizer: Mapping[str, Mapping[str, Any]], notes: list[str]
) -> dict[str, int]:
    """The same under strategies that share them out; with full precision where they cannot share out lower ones."""
    sizes = {}
    for strategy in SHARDING:
        changed = dict(optimizer)
        for key, options in optimizer.items():
            kind = str(options['type'])
            try:
                STRATEGIES.get(strategy).optimizer_class(kind)
            except ImportError:
                pass  # a package that is missing here may be there where it trains
            except ValueError:
                if kind.endswith('8bit'):
                    changed[key] = {**options, 'type': kind.removesuffix('8bit')}
                    notes.append(f'{strategy} cannot share out {kind}: planned with moments of full precision')
        sizes[strategy] = _moments(by_key, changed)
    return sizes


def _micro_batch_and_passes(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Samples of a micro-batch, and forward and backward passes of a step."""
    train_cfg = cfg.get('train_cfg') or {}
    data = cfg.get('data') or {}
    batch = {**data, **(data.get('train_dataloader') or {})}.get('samples_per_gpu') or 1
    micro_batch = max(1, min(train_cfg.get('grad_accum_batch_size') or batch, batch))
    is_multistep = getattr(getattr(model, STUDENT, None), 'is_multistep', False)
    return micro_batch, -(-batch // micro_batch) * (train_cfg.get('nfe', 1) if is_multistep else 1)


def latent_size_of(cfg: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Size (C, H, W) of the latents that a config trains on, as far as it says; after patchifying."""
    data = cfg.get('data') or {}
    sections = [data.get('train'), cfg.get('test_cfg'), *(data.get(key) for key in ('val', 'test'))]
    size = next((s['latent_size'] for s in sections if isinstance(s, Mapping) and s.get('latent_size')), None)
    if size is None:
        return None
    patch = cfg['model'].get('patch_size', 1)
    return (size[0] * patch * patch, *(length // patch for length in size[1:]))


def _activations(
    model: nn.Module, cfg: Mapping[str, Any], micro_batch: int, notes: list[str]
) -> tuple[Activations | None, Activations | None]:
    diffusion = getattr(model, STUDENT, None)
    network = getattr(diffusion, 'denoising', None)
    latent_size = latent_size_of(cfg)
    if not hasattr(network, 'example_inputs'):
        notes.append('activations are not known: the network has no example_inputs')
        return None, None
    if latent_size is None:
        notes.append('activations are not known: neither test_cfg nor the data sets say latent_size')
        return None, None
    train_cfg = cfg.get('train_cfg') or {}

    def inputs(of: nn.Module, count: int) -> dict[str, Tensor]:
        options = {}
        if 'text_length' in inspect.signature(of.example_inputs).parameters:
            options['text_length'] = _text_length(cfg)
        return of.example_inputs(count, latent_size, **options)

    asked = _teacher_queries(model, train_cfg)
    teacher = policy = 0
    if asked:
        of_teacher = getattr(model.teacher, 'denoising', None)
        of_teacher = of_teacher if hasattr(of_teacher, 'example_inputs') else network
        holder = network if _teacher_shares(model) else of_teacher
        teacher = measure_inference(holder, inputs(of_teacher, micro_batch * asked), of_teacher)
        policy = _policy_bytes(network, latent_size, micro_batch, train_cfg)
    totals = []
    for checkpointing in (False, True):
        own = measure_training(network, inputs(network, micro_batch), checkpointing)
        totals.append(Activations(own.held + policy, own.peak + policy, own.held + teacher + policy))
    notes.append(
        f'activations are of micro-batches of {micro_batch:,} with latents {" x ".join(map(str, latent_size))}'
        + (f', and the teacher is asked about {asked} states of each sample at once' if asked else '')
    )
    return totals[0], totals[1]


def _text_length(cfg: Mapping[str, Any]) -> int:
    encoder = cfg['model'].get('text_encoder') or {}
    train = (cfg.get('data') or {}).get('train') or {}
    return (
        train.get('pad_seq_len')
        or encoder.get('pad_seq_len')
        or encoder.get('max_sequence_length')
        or DEFAULT_TEXT_LENGTH
    )


def _teacher_queries(model: nn.Module, train_cfg: Mapping[str, Any]) -> int:
    """States per sample that the teacher is asked about at once; 0 without a teacher."""
    if getattr(model, TEACHER, None) is None:
        return 0
    view = getattr(model.diffusion, 'train_section', None)
    section = view() if callable(view) else None
    count = 1
    if getattr(section, 'batch_teacher', False):  # with num_decay_iters, after the last of them
        count = section.num_intermediate_states
    guidance = (train_cfg.get('teacher_test_cfg') or {}).get('guidance_scale') or train_cfg.get(
        'teacher_guidance_scale'
    )
    return count * (2 if guidance not in (None, 0, 1) else 1)


def _policy_bytes(
    network: nn.Module, latent_size: tuple[int, ...], batch_size: int, train_cfg: Mapping[str, Any]
) -> int:
    """The policy's tensors with their gradients, and the states, targets and predictions of a segment, in float32."""
    with torch.no_grad():
        output = network(**network.example_inputs(1, latent_size))
    tensors = output.values() if isinstance(output, Mapping) else [output]
    numbers = 2 * sum(tensor.numel() for tensor in tensors)
    channels, *size = latent_size
    states = 3 * train_cfg.get('num_intermediate_states', 2) + 4
    return 4 * batch_size * (numbers + states * channels * torch.Size(size).numel())
