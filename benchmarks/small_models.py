"""Small models for benchmarks of several processes, made of published configs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config

from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import SeededSource
from lakonlab.ranks import Ranks
from lakonlab.registry import MODELS, STRATEGIES
from lakonlab.runner.allocation_record import Allocation, planned, recording
from lakonlab.runner.hooks.ema import ExponentialMovingAverageHook
from lakonlab.runner.optimizer import build_optimizers

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
WEIGHTS = ('pretrained', 'pretrained_adapter', 'pretrained_lora')
FLUX = dict(
    num_layers=3,
    num_single_layers=6,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=256,
    pooled_projection_dim=64,
    axes_dims_rope=(16, 24, 24),
    torch_dtype='float32',
)
FLUX_LATENTS = (16, 16, 16)
FLUX_TEXT = 32


def without_weights(node: Any) -> Any:
    """A config whose networks begin with drawn weights."""
    if isinstance(node, Mapping):
        return {key: without_weights(value) for key, value in node.items() if key not in WEIGHTS}
    return node


def digits(batch_size: int = 64, width: int = 64, **changes: Any) -> Config:
    """The two-step student of digits, all of it trained.

    Args:
        batch_size: Of one process.
        width: Of its transformer, a multiple of 4.
        **changes: Other arguments of its transformers.
    """
    cfg = load_config(str(CONFIGS / 'digits/gmdit_k8_digits_piid_2step.py'))
    cfg.model = without_weights(cfg.model.to_dict())
    for part in ('diffusion', 'teacher'):
        cfg.model[part].denoising.update(attention_head_dim=width // 4, **changes)
    # everywhere, so that every step costs the same
    cfg.train_cfg.teacher_test_cfg.guidance_interval = [0, 1]
    cfg.data.train_dataloader.samples_per_gpu = batch_size
    cfg.test_cfg.latent_size = (1, 8, 8)
    return cfg


def flux(batch_size: int = 4, **changes: Any) -> Config:
    """The adapted student of FLUX.1 on one base with its teacher and average, made small.

    Args:
        batch_size: Of one process.
        **changes: Other arguments of its transformer.
    """
    cfg = load_config(str(CONFIGS / 'piflux/gmflux_k8_piid_4step_32gpus.py'))
    cfg.model = without_weights(cfg.model.to_dict())
    cfg.model.pop('vae', None)
    cfg.model.pop('text_encoder', None)
    for part in ('diffusion', 'teacher'):
        cfg.model[part].denoising.update({**FLUX, **changes})
    cfg.model.diffusion.denoising.update(lora_rank=16, logstd_inner_dim=64, freeze_exclude_autocast_dtype='float32')
    cfg.model.teacher.denoising.pop('freeze_exclude_autocast_dtype', None)
    cfg.optimizer.diffusion.type = 'AdamW'
    cfg.train_cfg.num_decay_iters = 0
    cfg.train_cfg.batch_teacher = True
    cfg.data.train_dataloader.samples_per_gpu = batch_size
    cfg.data.train.update(pad_seq_len=FLUX_TEXT, latent_size=FLUX_LATENTS)
    cfg.test_cfg.latent_size = FLUX_LATENTS
    return cfg


MODEL_CONFIGS = {'digits': digits, 'flux': flux}


def batch(name: str, batch_size: int, iteration: int) -> dict[str, Any]:
    """A batch for one of these models.

    Args:
        name: Key of :data:`MODEL_CONFIGS`.
        batch_size: Number of samples.
        iteration: Seed.
    """
    generator = torch.Generator().manual_seed(iteration)
    if name == 'digits':
        return {
            'latents': torch.randn(batch_size, 1, 8, 8, generator=generator),
            'labels': torch.randint(0, 10, (batch_size,), generator=generator),
            'negative_labels': torch.full((batch_size,), 10),
        }
    return {
        'latents': torch.randn(batch_size, *FLUX_LATENTS, generator=generator),
        'prompt_embed_kwargs': {
            'encoder_hidden_states': torch.randn(batch_size, FLUX_TEXT, 256, generator=generator),
            'pooled_projections': torch.randn(batch_size, 64, generator=generator),
        },
    }


class Training:
    """A small model in training, as one of several processes.

    Args:
        ranks: The processes.
        name: Key of :data:`MODEL_CONFIGS`.
        strategy: Name of the strategy.
        batch_size: Of all processes.
        options: Arguments of the strategy.
        train_cfg: Changes of the training section.
        record: Whether to record allocations from the beginning until :meth:`peaks` is called.
        **changes: Arguments of the model's function.
    """

    def __init__(
        self,
        ranks: Ranks,
        name: str,
        strategy: str,
        batch_size: int,
        options: Mapping[str, Any] | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        record: bool = False,
        **changes: Any,
    ):
        self.name, self.ranks, self.batch_size = name, ranks, batch_size // ranks.world_size
        self.cfg = MODEL_CONFIGS[name](self.batch_size, **changes)
        self.cfg.train_cfg.update(train_cfg or {})
        self._recording = recording() if record else None
        self._record = self._recording.__enter__() if record else None
        self.engine = STRATEGIES.build({'type': strategy, 'ranks': ranks, 'device': 'cpu', **(options or {})})
        sections = {key: self.cfg[key].to_dict() for key in ('train_cfg', 'test_cfg')}
        torch.manual_seed(0)
        model = MODELS.build({**copy.deepcopy(self.cfg.model.to_dict()), **sections})
        with torch.no_grad():  # heads begin with zeros, and zeros are quick to multiply with
            for _, tensor in named_state(model):
                if isinstance(tensor, torch.nn.Parameter) and not tensor.any():
                    tensor.normal_(std=0.02)
        self.model = self.engine.wrap(model)
        self.model.train()
        self.optimizers = build_optimizers(self.model, self.cfg.optimizer.to_dict())
        self.average = ExponentialMovingAverageHook()
        self.runner = SimpleNamespace(model=self.model, iter=0, strategy=self.engine)
        self.average.before_train(self.runner)

    def steps(self, count: int) -> None:
        """Take steps."""
        for _ in range(count):
            data = batch(self.name, self.batch_size, self.runner.iter * self.ranks.world_size + self.ranks.rank)
            status = {'iteration': self.runner.iter, 'epoch': 0}
            source = SeededSource(3, self.runner.iter, first_row=self.ranks.rank * self.batch_size)
            outputs = self.model.train_step(
                data, self.optimizers, running_status=status, source=source, exchange=self.engine
            )
            if outputs['skipped']:
                raise RuntimeError(f'a step of {self.name} was skipped: {outputs["log_vars"]}')
            self.average.after_train_iter(self.runner, self.runner.iter)
            self.runner.iter += 1

    def peaks(self, count: int = 2) -> dict[str, int]:
        """Take steps and end the record.

        Returns:
            Most bytes that this process held at once: ``planned``, of what a plan counts, ``backend``, with the copies
            of the backend of torch.distributed, and ``all``, with what operations allocate for themselves too.
        """
        self.steps(2)  # moments come into being, buckets find their order
        with self._record.window():
            self.steps(count)
        self._recording.__exit__(None, None, None)

        def with_backend(allocation: Allocation) -> bool:
            return not allocation.is_scratch

        return {
            'planned': self._record.peak(planned),
            'backend': self._record.peak(with_backend),
            'all': self._record.peak(lambda allocation: True),
        }
