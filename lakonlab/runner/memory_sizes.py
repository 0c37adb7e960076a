"""The sizes that a memory plan is made of, from a config and its model on the meta device."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lakonlab.config.errors import ConfigError
from lakonlab.models.architecture.blocks import block_lists
from lakonlab.models.architecture.roles import named_state
from lakonlab.runner.activation_memory import measure_inference, measure_training
from lakonlab.runner.memory_plan import Sizes, optimizer_bytes

TEACHER, STUDENT = 'teacher', 'diffusion'
DEFAULT_TEXT_LENGTH = 512


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def sizes_of(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[Sizes, list[str]]:
    """Measure what training a config takes on one device.

    Args:
        model: The model of the config, on the meta device.
        cfg: The checked config.

    Returns:
        The sizes, and what had to be assumed or is not known, in sentences.
    """
    notes: list[str] = []
    optimizer = cfg['optimizer']
    trained = {id(p): p for key in optimizer for _, p in named_state(model.get_submodule(key)) if p.requires_grad}
    state = dict(named_state(model))
    shared_out = _shared_out(cfg)
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {id(tensor): tensor for _, tensor in named}
    owners = {id(tensor): name.partition('.')[0] for name, tensor in named}
    used = {id(tensor) for name, tensor in state.items() if not name.startswith(f'{STUDENT}_ema.')}
    averages = {id(tensor) for name, tensor in state.items() if name.startswith(f'{STUDENT}_ema.')} - used
    groups = dict.fromkeys(('frozen', 'resident', 'trainable', 'average'), 0)
    for key, tensor in tensors.items():
        owner = owners.get(key, '')
        if key in trained:
            group = 'trainable'
        elif key in averages:
            group = 'average'
        else:
            group = 'frozen' if owner in shared_out else 'resident'
        groups[group] += bytes_of(tensor)
    state_bytes = whole_bytes = 0
    for key, options in optimizer.items():
        own = [p for _, p in named_state(model.get_submodule(key)) if p.requires_grad]
        own_sizes = [(p.numel(), bytes_of(p)) for p in own]
        state_bytes += optimizer_bytes(options, own_sizes)
        plain = str(options['type']).removesuffix('8bit')
        whole_bytes += optimizer_bytes({**options, 'type': plain}, own_sizes)
    if whole_bytes != state_bytes:
        notes.append('moments of 8 bits cannot be shared out: fsdp and fsdp2 are planned with those of full precision')
    for name in ('vae', 'text_encoder'):
        child = getattr(model, name, None)
        if child is None or any(True for _ in child.parameters()):
            continue
        number = getattr(child, 'published_parameters', None)
        if number is None:
            notes.append(f'{name} is on the hub: its size is not known, and it is NOT counted')
            continue
        groups['resident'] += number * child.torch_dtype.itemsize
        notes.append(f'{name} is on the hub and taken to be as large as the published one')
    excluded = set((cfg.get('fsdp_kwargs') or {}).get('exclude_keys') or ())
    gradients = sum(bytes_of(p) for p in trained.values())
    undivided = 0
    if f'{STUDENT}_ema' not in shared_out:
        undivided += groups['average']
    if STUDENT in excluded:
        undivided += groups['trainable'] + gradients + state_bytes
        whole_bytes = state_bytes
    kept, checkpointed = _activations(model, cfg, notes)
    return (
        Sizes(
            **groups,
            gradients=gradients,
            optimizer=state_bytes,
            kept=kept,
            checkpointed=checkpointed,
            gathered=_gathered(model, cfg.get('fsdp_kwargs') or {}, notes),
            sharded_optimizer=whole_bytes,
            undivided=undivided,
        ),
        notes,
    )


def _shared_out(cfg: Mapping[str, Any]) -> set[str]:
    """Children of the model whose frozen weights a sharding strategy shares out."""
    options = cfg.get('fsdp_kwargs') or {}
    parts = {STUDENT, f'{STUDENT}_ema'}
    if options.get('wrap_frozen_modules'):
        parts |= {TEACHER, 'vae', 'text_encoder'}
    if options.get('ignore_frozen_parameters'):
        parts.clear()
    return parts - set(options.get('exclude_keys') or ())


def _gathered(model: nn.Module, options: Mapping[str, Any], notes: list[str]) -> int:
    """Bytes of the two largest units of the student: blocks, or modules of ``fsdp_modules``, and all that is in none.

    Raises:
        ConfigError: ``fsdp_modules`` names what is no class, or a class that the model has no instance of.
    """
    network = getattr(getattr(model, STUDENT, None), 'denoising', None)
    if network is None:
        return 0
    units = [block for owner, name in block_lists(network) for block in getattr(owner, name)]
    kinds = tuple(_class_at(path) for path in options.get('fsdp_modules') or ())
    for kind, path in zip(kinds, options.get('fsdp_modules') or ()):
        if any(isinstance(module, kind) for module in model.modules()):
            continue
        if any(getattr(model, name, None) is not None for name in ('vae', 'text_encoder')):
            notes.append(f'fsdp_modules: {path} is no module of the networks; autoencoder and text encoder may have it')
            continue
        raise ConfigError(
            f'fsdp_kwargs.fsdp_modules: found {path!r}, of which the model has no instance; name classes of its '
            f'blocks, such as {", ".join(sorted({_path_of(type(unit)) for unit in units})) or "none: it has no blocks"}'
        )
    if kinds:
        units = [module for module in network.modules() if isinstance(module, kinds)]
    inside = {id(p) for unit in units for p in unit.parameters()}
    rest = sum(bytes_of(p) for p in network.parameters() if id(p) not in inside)
    sizes = [rest, *(sum(bytes_of(p) for p in unit.parameters()) for unit in units)]
    return sum(sorted(sizes)[-2:])


def _path_of(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _class_at(path: str) -> type:
    module, _, name = path.rpartition('.')
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        found = None
    if not isinstance(found, type):
        raise ConfigError(f'fsdp_kwargs.fsdp_modules: found {path!r}, expected the dotted path of a class')
    return found


def latent_size_of(cfg: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Size (C, H, W) of the latents that a config trains on, as far as it says; after patchifying."""
    data = cfg.get('data') or {}
    sections = [data.get('train'), cfg.get('test_cfg'), *(data.get(key) for key in ('val', 'test'))]
    size = next((s['latent_size'] for s in sections if isinstance(s, Mapping) and s.get('latent_size')), None)
    if size is None:
        return None
    patch = cfg['model'].get('patch_size', 1)
    return (size[0] * patch * patch, *(length // patch for length in size[1:]))


def _activations(model: nn.Module, cfg: Mapping[str, Any], notes: list[str]) -> tuple[int | None, int | None]:
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
    loader = {**cfg['data'], **(cfg['data'].get('train_dataloader') or {})}
    batch_size = min(train_cfg.get('grad_accum_batch_size') or loader['samples_per_gpu'], loader['samples_per_gpu'])

    def inputs(count: int) -> dict[str, torch.Tensor]:
        options = {}
        if 'text_length' in inspect.signature(network.example_inputs).parameters:
            options['text_length'] = _text_length(cfg)
        return network.example_inputs(count, latent_size, **options)

    asked = _teacher_queries(model, train_cfg)
    teacher = measure_inference(network, inputs(batch_size * asked)) if asked else 0
    policy = _policy_bytes(network, latent_size, batch_size, train_cfg) if asked else 0
    totals = []
    for checkpointing in (False, True):
        own = measure_training(network, inputs(batch_size), checkpointing)
        totals.append(max(own.peak, own.held + teacher) + policy)
    notes.append(
        f'activations are of micro-batches of {batch_size:,} with latents {" x ".join(map(str, latent_size))}'
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
