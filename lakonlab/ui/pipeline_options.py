"""Command-line arguments that say which pipeline to build, where, and in which precision, of examples and apps."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPES = ('bfloat16', 'float16', 'float32')
OFFLOADS = ('none', 'model', 'sequential')


@dataclass(frozen=True)
class PublishedPipeline:
    """A base and an adapter that are published for it."""

    name: str
    """Of files that are written."""
    module: str
    """Module of the pipeline's class."""
    kind: str
    """Its class."""
    base: str
    """Repository of the base."""
    adapter: str
    """Repository of the adapter."""
    subfolder: str
    """Its folder there."""
    width: int
    """Of images, in pixels."""
    height: int
    """Of images, in pixels."""
    steps: int = 4
    """Network evaluations."""
    policy_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Of its DX policy, which the file of the published adapter need not tell; empty for mixtures."""


QWEN = dict(module='lakonlab.pipelines.piqwen_pipeline', kind='PiQwenImagePipeline', base='Qwen/Qwen-Image')
FLUX = dict(module='lakonlab.pipelines.piflux_pipeline', kind='PiFluxPipeline', base='black-forest-labs/FLUX.1-dev')
QWEN_ADAPTERS, FLUX_ADAPTERS = dict(adapter='Lakonik/pi-Qwen-Image'), dict(adapter='Lakonik/pi-FLUX.1')
DX = dict(segment_size=1 / 3.5, shift=3.2)
LARGE, WIDE = dict(width=1920, height=1072), dict(width=1360, height=768)
GMQWEN = PublishedPipeline('gmqwen', subfolder='gmqwen_k8_piid_4step', **QWEN, **QWEN_ADAPTERS, **LARGE)
DXQWEN = PublishedPipeline(
    'dxqwen', subfolder='dxqwen_n10_piid_4step', policy_kwargs=DX, **QWEN, **QWEN_ADAPTERS, **LARGE
)
GMFLUX = PublishedPipeline('gmflux', subfolder='gmflux_k8_piid_4step', **FLUX, **FLUX_ADAPTERS, **WIDE)
GMFLUX_8 = PublishedPipeline('gmflux', subfolder='gmflux_k8_piid_8step', steps=8, **FLUX, **FLUX_ADAPTERS, **WIDE)
DXFLUX = PublishedPipeline(
    'dxflux', subfolder='dxflux_n10_piid_4step', policy_kwargs=DX, **FLUX, **FLUX_ADAPTERS, **WIDE
)


def add_pipeline_arguments(parser: argparse.ArgumentParser, published: PublishedPipeline) -> None:
    """Add ``--model``, ``--adapter``, ``--subfolder``, ``--device``, ``--dtype``, ``--offload`` and ``--compile``."""
    parser.add_argument('--model', default=published.base, help='folder or repository of the base')
    parser.add_argument('--adapter', default=published.adapter, help='folder or repository of the adapter')
    parser.add_argument('--subfolder', help=f'folder in it; of the published adapter {published.subfolder}')
    parser.add_argument(
        '--device', help='where to compute, such as cuda or cpu; by default an accelerator if there is one'
    )
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='precision of the networks')
    parser.add_argument(
        '--offload',
        choices=OFFLOADS,
        nargs='?',
        const='model',
        default='none',
        help='keep on the device only the module, or layer, that computes; without a value: the module',
    )
    parser.add_argument('--compile', action='store_true', help='compile the repeated blocks of the transformer')


def reported(parser: argparse.ArgumentParser, action: Callable[[], int]) -> int:
    """Do something; what a user can mend about the adapter ends the script without a traceback."""
    from lakonlab.pipelines.adapter_files import AdapterError

    try:
        return action()
    except AdapterError as error:
        parser.exit(1, f'error: {error}\n')


def build_pipeline(args: argparse.Namespace, published: PublishedPipeline, parts: Mapping[str, Any] | None = None):
    """The pipeline that arguments ask for, with its adapter, ready to be called.

    Args:
        args: See :func:`add_pipeline_arguments`.
        published: What they were made for.
        parts: Components of a pipeline without an adapter, whose weights this one shares; None to load them.
    """
    import torch

    from lakonlab.ui.arguments import default_device

    subfolder = args.subfolder
    if subfolder is None and args.adapter == published.adapter:
        subfolder = published.subfolder
    options = _policy_options(args.adapter, subfolder, published)
    kind = getattr(importlib.import_module(published.module), published.kind)
    if parts is None:
        pipe = kind.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    else:
        pipe = kind(**parts, **options)
    pipe.load_piflow_adapter(args.adapter, subfolder=subfolder)
    device = args.device or default_device()
    if args.offload == 'model':
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == 'sequential':
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    return pipe


def _policy_options(adapter: str, subfolder: str | None, published: PublishedPipeline) -> Mapping[str, Any]:
    """What a pipeline must be told about a policy: nothing where the adapter says how it is sampled.

    The adapter is read before the base, which takes longer, so that what is wrong with it is found at once.
    """
    from lakonlab.pipelines.adapter_files import load_adapter_files

    found = load_adapter_files(adapter, subfolder)
    told = {**found.policy, **({} if found.recipe is None else found.recipe.known())}
    is_told = bool(told.keys() - {'type'}) or told.get('type', 'DX') != 'DX'
    return (
        {} if is_told or not published.policy_kwargs else dict(policy_type='DX', policy_kwargs=published.policy_kwargs)
    )


def steps_of(pipe: Any, published: PublishedPipeline) -> int:
    """Network evaluations that the adapter of a pipeline was trained for, or that its published one needs."""
    recipe = pipe.transformer.piflow.recipe
    return published.steps if recipe is None or recipe.nfe is None else recipe.nfe
