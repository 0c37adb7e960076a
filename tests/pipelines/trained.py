"""Tiny students, trained for a few iterations, exported, and loaded into the pipelines they belong to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lakonlab.config.check import check_config
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from lakonlab.runner.export_adapter import export_adapter
from lakonlab.runner.runner import Runner
from tests import tiny_components
from tests.tools.test_text_image import write_config

PIPELINES = {'Flux': PiFluxPipeline, 'QwenImage': PiQwenImagePipeline}
FOLDERS = {'Flux': tiny_components.flux_folder, 'QwenImage': tiny_components.qwen_image_folder}
SIZE = dict(height=32, width=48)
#: What callers of a pipeline of each family pass beside the prompt.
CALL = {'Flux': dict(max_sequence_length=32, **SIZE), 'QwenImage': dict(max_sequence_length=32, **SIZE)}
PROMPTS = ['a red heart', 'the sea at night']


class Trained(NamedTuple):
    """A student and where it is."""

    family: str
    root: Path
    """Folder in which it was trained."""
    base: Path
    """Folder of the pipeline it was distilled from."""
    export: Path
    """Folder of the adapter."""
    saved: Path
    """Folder of the adapter that the run's checkpoint holds."""
    model: nn.Module
    """The whole that was trained."""
    cfg: object

    def pipeline(self, load: bool = True, adapter: Path | None = None, **options):
        """The pipeline, in float32 and silent, with the adapter."""
        pipe = PIPELINES[self.family].from_pretrained(self.base, **options)
        pipe.set_progress_bar_config(disable=True)
        if load:
            pipe.load_piflow_adapter(adapter or self.export)
        return pipe


@contextlib.contextmanager
def in_folder(path: Path):
    """Work in another directory."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def train(root: Path, family: str, kind: str, iterations: int = 20) -> Trained:
    """Train, export.

    Args:
        root: Folder for everything.
        family: ``'Flux'`` or ``'QwenImage'``.
        kind: ``'GM'``, ``'DX'`` or ``'data-free'``.
        iterations: Of training.
    """
    base = FOLDERS[family](root / 'base')
    cfg = write_config(root / f'{kind}.py', family, kind, base)
    for part in ('diffusion', 'teacher'):
        cfg.model[part].denoising.torch_dtype = 'float32'
    cfg.model.diffusion.denoising.pop('freeze_exclude_autocast_dtype')
    cfg.model.vae.torch_dtype = 'float32'
    cfg.model.text_encoder.torch_dtype = 'float32'
    cfg.train_cfg.update(nfe=4, final_step_size_scale=0.5)
    cfg.test_cfg.update(nfe=4, final_step_size_scale=0.5, total_substeps=32)
    if family == 'Flux':
        cfg.test_cfg.distilled_guidance_scale = 1.5  # not what the pipelines of diffusers embed by default
    if kind == 'DX':
        cfg.model.diffusion.policy_kwargs = dict(segment_size=1 / 3.5, shift=3.2)
    else:
        cfg.test_cfg.temperature = 0.3
    cfg.optimizer.diffusion.lr = 5e-3
    cfg.total_iters = iterations
    cfg.checkpoint_config.update(interval=iterations, export='ema')
    with in_folder(root):
        check_config(cfg)
        cfg.work_dir = 'work_dirs/tiny'
        runner = Runner.from_cfg(cfg, work_dir=cfg.work_dir)
        runner.train()
        export = export_adapter(cfg, root / 'export')
    saved = root / 'checkpoints' / 'tiny' / f'iter_{iterations}' / 'export'
    return Trained(family, root, base, export, saved, runner.model.eval(), cfg)


def noise(batch_size: int = 2, seed: int = 0) -> Tensor:
    """(B, 4, 4, 6), one generator per image."""
    return torch.stack(
        [torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(seed + index)) for index in range(batch_size)]
    )


def pack(latents: Tensor) -> Tensor:
    """Latents as FLUX and Qwen-Image pipelines take them."""
    from lakonlab.models.architecture.heads import cut_tokens

    return cut_tokens(latents, 2, 'channel_major')
