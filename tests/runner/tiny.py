"""A model, data and run of a few parameters, with the interfaces of the real ones."""

from __future__ import annotations

import torch
from torch import nn

from lakonlab.datasets.loader import build_dataloader
from lakonlab.parallel.single import SingleProcess
from lakonlab.runner.hooks.checkpoint import CheckpointHook
from lakonlab.runner.hooks.ema import ExponentialMovingAverageHook
from lakonlab.runner.log import log_settings
from lakonlab.runner.lr_schedule import LearningRateSchedule
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.runner.resume import find_starting_point
from lakonlab.runner.runner import Runner


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.1)  # draws from torch's global state
        self.register_buffer('steps', torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.linear(self.dropout(x))


class TinyModel(nn.Module):
    """Denoises; ``nan_at`` are iterations whose loss is not finite."""

    def __init__(self, nan_at=()):
        super().__init__()
        self.diffusion, self.diffusion_ema, self.teacher = TinyNet(), TinyNet(), TinyNet()
        self.teacher.requires_grad_(False)
        self.diffusion_ema.requires_grad_(False)
        self.diffusion_ema.load_state_dict(self.diffusion.state_dict())
        self.nan_at = set(nan_at)

    def train_step(self, data, optimizer, running_status, source, exchange):
        noise = source.normal('noise', data['latents'].shape)
        loss = (self.diffusion(data['latents'] + noise) - data['latents']).square().mean()
        if running_status['iteration'] in self.nan_at:
            loss = loss * float('nan')
        skipped = () if loss.isfinite() else ('diffusion',)
        if not skipped:
            optimizer['diffusion'].zero_grad()
            loss.backward()
            optimizer['diffusion'].step()
            self.diffusion.steps += 1
        return {'log_vars': {'loss_diffusion': loss.item()}, 'num_samples': len(noise), 'skipped': skipped}


class TinyData(torch.utils.data.Dataset):
    def __init__(self, size=23, bucket_ids=None):
        self.latents = torch.randn(size, 4, generator=torch.Generator().manual_seed(7))
        self.bucket_ids = bucket_ids

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return {'ids': index, 'latents': self.latents[index]}


def make_runner(
    folder,
    max_iters=20,
    hooks=(),
    nan_at=(),
    guard=None,
    interval=5,
    checkpoint=None,
    seed=1,
    optimizer='AdamW',
    cfg=None,
    data=None,
    **start,
):
    """A run in ``folder``, at the starting point that its checkpoints and ``start`` give."""
    torch.manual_seed(3)
    strategy = SingleProcess(device='cpu')
    model = strategy.wrap(TinyModel(nan_at))
    data = TinyData() if data is None else data
    if checkpoint is None:
        checkpoint = CheckpointHook(5, out_dir=str(folder / 'checkpoints'), max_keep_ckpts=2, asynchronous=False)
    work_dir = folder / 'work_dirs' / 'tiny'
    ema = ExponentialMovingAverageHook(momentum_policy='karras', start_iter=2)
    runner = Runner(
        model,
        build_optimizers(model, {'diffusion': {'type': optimizer, 'lr': 1e-2}}),
        LearningRateSchedule(max_iters=40, policy='CosineAnnealing', min_lr=0.0, warmup='linear', warmup_iters=4),
        data,
        lambda start_iter: build_dataloader(data, 4, shuffle=True, seed=1, start_iter=start_iter),
        batch_size=4,
        max_iters=max_iters,
        work_dir=work_dir,
        strategy=strategy,
        hooks=[ema, checkpoint, *hooks] if checkpoint else [ema, *hooks],
        seed=seed,
        cfg=cfg,
        settings=log_settings({'interval': interval, 'hooks': []}, work_dir),
        guard=guard,
    )
    runner.starting_point = find_starting_point(runner.checkpoint_dir, **start)
    return runner
