"""A run of the real Runner, of tiny networks, as one of several processes; what it leaves is compared bit for bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from torch.utils.data import Dataset

from lakonlab.mmengine_parts import Hook
from lakonlab.registry import DATASETS
from lakonlab.runner.runner import Runner
from lakonlab.storage.checkpoint import find_checkpoint, list_checkpoints, read_state, read_tensors, step_of
from lakonlab.storage.remote_path import AnyPath

NAME = 'small'
NETWORK = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=1,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    class_dropout_prob=0.0,
    checkpointing=False,
)
MODEL = dict(
    type='LatentDiffusionClassImage',
    diffusion=dict(
        type='PiFlowImitation',
        policy_type='GMFlow',
        denoising=dict(type='GMDiTTransformer2DModelV2', num_gaussians=3, logstd_inner_dim=8, **NETWORK),
        flow_loss=dict(type='DiffusionMSELoss', data_info=dict(pred='u_t_pred', target='u_t')),
        num_timesteps=1,
    ),
    diffusion_use_ema=True,
    teacher=dict(type='GaussianFlow', denoising=dict(type='DiTTransformer2DModelMod', **NETWORK), num_timesteps=1),
)
TIMING = ('time', 'it_per_s', 'per_s', 'memory', 'share_')


@DATASETS.register_module()
class SmallImages(Dataset):
    """Noise with labels; item ``i`` is a function of ``i``.

    Args:
        size: Number of items.
        key: What the noise is called: ``latents`` to train on, ``noise`` to sample from.
    """

    def __init__(self, size: int = 23, key: str = 'latents'):
        self.size, self.key = size, key

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return {'ids': index, 'name': str(index), self.key: image, 'labels': torch.tensor(index % 10)}


@DATASETS.register_module()
class AlarmingNoise(SmallImages):
    """Noise to sample from; whoever loads one of the items for the n-th time is asked to stop, once.

    Args:
        size: Number of items.
        alarming: The item.
        time: At which time.
        rung: A file that is made when it has happened.
    """

    def __init__(self, size: int, alarming: int, time: int, rung: str):
        super().__init__(size, 'noise')
        self.alarming, self.remaining, self.rung = alarming, time, Path(rung)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.alarming:
            self.remaining -= 1
            if self.remaining == 0 and not self.rung.exists():
                self.rung.touch()
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def config(world_size: int = 2, strategy: str = 'fsdp2', **changes: Any) -> Config:
    """Config of the run.

    Args:
        world_size: Number of processes; the global batch is 4.
        strategy: ``module_wrapper``.
        **changes: Values by dotted key, with two underscores for a dot.
    """
    cfg = Config(
        dict(
            name=NAME,
            model=copy.deepcopy(MODEL),
            module_wrapper=strategy,
            data=dict(train=dict(type='SmallImages'), train_dataloader=dict(samples_per_gpu=4 // world_size)),
            train_cfg=dict(
                nfe=2,
                total_substeps=16,
                num_intermediate_states=2,
                diffusion_grad_clip=0.5,
                diffusion_grad_clip_begin_iter=3,
            ),
            test_cfg=dict(nfe=2, total_substeps=16, latent_size=(1, 8, 8)),
            optimizer=dict(diffusion=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95))),
            lr_config=dict(policy='fixed', warmup='linear', warmup_iters=4),
            custom_hooks=[dict(type='ExponentialMovingAverageHook', momentum_policy='karras', start_iter=2)],
            checkpoint_config=dict(interval=2, max_keep_ckpts=2, asynchronous=False),
            log_config=dict(interval=3, hooks=[dict(type='TextLoggerHook')]),
            runner=dict(watchdog_seconds=0),
            total_iters=8,
        )
    )
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return cfg


@contextlib.contextmanager
def small_runner(
    ranks, folder: Path, cfg: Config | None = None, device: str = 'cpu', deterministic: bool = False, **changes: Any
) -> Iterator[Runner]:
    """The run as one process of a group, in a folder, at its starting point.

    Args:
        ranks: The processes; of several, a group of their own is made for plain data, as launchers do.
        folder: Working directory.
        cfg: The config; None for :func:`config`.
        device: Where it trains.
        deterministic: Whether to allow deterministic algorithms only.
        **changes: See :func:`config`.
    """
    before = Path.cwd()
    os.chdir(folder)
    torch.set_num_threads(1)
    group = dist.new_group(backend='gloo') if ranks.world_size > 1 else None
    try:
        yield Runner.from_cfg(
            cfg or config(ranks.world_size, **changes),
            deterministic=deterministic,
            ranks=dataclasses.replace(ranks, group=group),
            device=device,
        )
    finally:
        os.chdir(before)
        if group is not None:
            dist.destroy_process_group(group)


def train(
    ranks, folder: Path, environment: Mapping[str, str] | None = None, hooks: Sequence[Hook] = (), **changes: Any
) -> int:
    """Train to the end, with some variables in the environment and further hooks; returns the first iteration."""
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        with small_runner(ranks, folder, **changes) as runner:
            runner.hooks.extend(hooks)
            runner.train()
            return runner.first_iter
    finally:
        os.environ.clear()
        os.environ.update(before)


def checkpoints(folder: Path) -> Path:
    """Directory of the checkpoints."""
    return folder / 'checkpoints' / NAME


def steps(folder: Path) -> list[int]:
    """Completed iterations of every checkpoint."""
    return sorted(step_of(path) for path in list_checkpoints(checkpoints(folder)))


def result(folder: Path, run_dir: AnyPath | None = None) -> dict[str, Any]:
    """Weights, averages, optimiser and counters of the newest checkpoint, bit for bit.

    Args:
        folder: Working directory.
        run_dir: Directory of the checkpoints; None for the one in ``folder``.
    """
    path = find_checkpoint(checkpoints(folder) if run_dir is None else run_dir)
    state = read_state(path)
    tensors = {
        f'{part}/{name}': (tensor.dtype, tensor.numpy().tobytes())
        for part in ('model', 'optimizer')
        for name, tensor in read_tensors(path, part).items()
    }
    window = {key: value for key, value in state['log_window'].items() if not _depends_on_time(key)}
    return {**tensors, **{key: state[key] for key in ('iteration', 'guard', 'data')}, 'log_window': window}


def logged(folder: Path) -> dict[int, list[Mapping[str, float]]]:
    """Iteration -> everything logged for it that does not depend on time; more than once after a crash."""
    entries: dict[int, list[Mapping[str, float]]] = {}
    for line in (folder / 'work_dirs' / NAME / 'scalars.json').read_text().splitlines():
        entry = json.loads(line)
        values = {key: value for key, value in entry.items() if not _depends_on_time(key)}
        entries.setdefault(entry['step'], []).append(values)
    return entries


def assert_same_run(folder: Path, reference: Path, run_dir: AnyPath | None = None) -> None:
    """Assert that two runs ended with the same bits and logged the same values at every iteration.

    Args:
        folder: Working directory of one.
        reference: Working directory of the other.
        run_dir: Directory of the checkpoints of the first one; None for the one in ``folder``.
    """
    found, expected = result(folder, run_dir), result(reference)
    assert set(found) == set(expected)
    different = [name for name, value in expected.items() if repr(value) != repr(found[name])]
    assert not different, f'{folder}: {len(different)} of {len(expected)} entries differ, among them {different[:4]}'
    by_reference = logged(reference)
    found_logs = logged(folder)
    assert set(found_logs) == set(by_reference)
    for step, entries in found_logs.items():
        assert all(entry in by_reference[step] for entry in entries), f'iteration {step}'


def _depends_on_time(key: str) -> bool:
    return any(word in key for word in TIMING)
