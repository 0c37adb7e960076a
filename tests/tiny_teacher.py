"""A tiny class-conditional teacher with random weights, in a checkpoint as training leaves it."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config

from lakonlab.config.load import load_config, resolved_text
from lakonlab.registry import MODELS
from lakonlab.storage.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = {
    'model.diffusion.denoising.num_attention_heads': 2,
    'model.diffusion.denoising.attention_head_dim': 8,
    'model.diffusion.denoising.num_layers': 1,
}


def digits_teacher(run_dir: Path, seed: int = 0) -> Path:
    """Save a small digits teacher; every weight is random, so that its flow is curved."""
    cfg: Config = load_config(ROOT / 'configs' / 'digits' / 'dit_digits_teacher.py', SMALL)
    sections = {name: cfg.get(name, {}) for name in ('train_cfg', 'test_cfg')}
    model = MODELS.build({**cfg.model.to_dict(), **sections})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    tensors = {f'diffusion.{name}': tensor for name, tensor in model.diffusion.state_dict().items()}
    return write_checkpoint(run_dir, 1, {'model': tensors}, {}, resolved_text(cfg))
