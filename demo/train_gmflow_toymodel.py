#!/usr/bin/env python
"""GMFlow on a checkerboard in the plane, from nothing to a picture of its samples.

A small network looks at a noisy point and answers with a Gaussian mixture over the velocity; it is trained by the
likelihood of the true velocity. Eight steps of a second-order SDE solver, each of which draws from the mixture, then
turn noise into points (Chen et al., "Gaussian Mixture Flow Matching Models", 2025).

python demo/train_gmflow_toymodel.py             as published: made for a GPU
python demo/train_gmflow_toymodel.py --quick     sharp squares within five minutes of one CPU core
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.datasets.checkerboard import CheckerboardData
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODULES
from lakonlab.runner.guard import SkipGuard, TrainingDivergedError
from lakonlab.ui.arguments import default_device, device, positive, positive_float
from lakonlab.ui.toy_histogram import PICTURE_SIZE, picture, save_picture, share_on_white_squares, writable_picture

BOARD_SCALE = 4
LOG_INTERVAL = 1000
SAMPLES_AT_ONCE = 2**14
WARMUP_ITERS = 100
MAX_GRADIENT_NORM = 1.0
QUICK = dict(batch_size=512, num_iters=3000, lr=1e-3, lr_schedule='cosine', num_samples=100_000, cells=100)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``--quick`` changes defaults, so that explicit flags override it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-k', '--num-gaussians', type=positive, default=32, help='components of the mixture (32)')
    parser.add_argument('--batch-size', type=positive, default=4096, help='points per iteration (4096)')
    parser.add_argument('--num-iters', type=positive, default=50000, help='iterations (50000)')
    parser.add_argument('--lr', type=positive_float, default=2e-4, help='learning rate (2e-4)')
    parser.add_argument('--lr-schedule', choices=['constant', 'cosine'], default='constant', help='(constant)')
    parser.add_argument('--nfe', type=positive, default=8, help='network evaluations per sample (8)')
    parser.add_argument('--num-samples', type=positive, default=1_000_000, help='points in the picture (1000000)')
    parser.add_argument(
        '--cells', type=divisor, default=PICTURE_SIZE, help='cells along each side of the histogram, a divisor of 200'
    )
    parser.add_argument('--out', default='gmflow_toymodel.png', help='the picture (gmflow_toymodel.png)')
    parser.add_argument('--seed', type=int, default=2021, help='seed of everything (2021)')
    parser.add_argument('--device', type=device, help='(an accelerator if there is one, else cpu)')
    parser.add_argument('--quick', action='store_true', help=f'other defaults: {QUICK}')
    options, _ = parser.parse_known_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.device = options.device or default_device()
    try:
        options.out = writable_picture(options.out)
    except ValueError as error:
        parser.error(f'argument --out: {error}')
    return options


def divisor(text: str) -> int:
    """A divisor of the size of the picture."""
    value = positive(text)
    if PICTURE_SIZE % value:
        raise argparse.ArgumentTypeError(f'{text}: expected a divisor of {PICTURE_SIZE}')
    return value


def train(flow: nn.Module, data: CheckerboardData, options: argparse.Namespace) -> None:
    """Maximise the likelihood of the true velocity under the mixture that the network answers with.

    A likelihood is unbounded, so a batch may rarely have a huge gradient, or one that is no number: the first is
    clipped, the second makes no step.

    Raises:
        TrainingDivergedError: Many steps in a row could not be made.
    """
    nll = MODULES.build(dict(type='GMFlowNLLLoss', data_info=dict(target='u')))
    optimizer = torch.optim.AdamW(flow.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    guard = SkipGuard()
    losses = []
    for i in (bar := tqdm(range(options.num_iters), desc='training', disable=not sys.stderr.isatty())):
        source = SeededSource(options.seed, step=i)
        first = i * options.batch_size
        x_0 = data.points(range(first, first + options.batch_size))[:, :, None, None].to(options.device)
        noise = source.normal('noise', x_0.shape, device=x_0.device)
        t = flow.timestep_sampler(len(x_0), source=source, device=x_0.device)
        x_t, _, _ = flow.sample_forward_diffusion(x_0, t, noise)
        loss = nll({**flow.pred(x_t, t), 'u': noise - x_0})
        optimizer.param_groups[0]['lr'] = learning_rate(i, options)
        optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(flow.parameters(), MAX_GRADIENT_NORM).isfinite():
            optimizer.step()
            losses.append(loss.detach())
            guard.update(i, (), {}, {})
        else:
            guard.update(i, ('network',), {'loss': loss.item()}, {'network': learning_rate(i, options)})
        if (i + 1) % LOG_INTERVAL == 0 or i + 1 == options.num_iters:
            average = torch.stack(losses).mean().item() if losses else math.nan
            bar.write(f'iteration {i + 1}: loss {average:.4f}', file=sys.stdout)
            losses.clear()


def learning_rate(iteration: int, options: argparse.Namespace) -> float:
    """A warm-up, then constant or a cosine to zero."""
    factor = min(1.0, (iteration + 1) / WARMUP_ITERS)
    if options.lr_schedule == 'cosine':
        factor *= (1 + math.cos(math.pi * iteration / options.num_iters)) / 2
    return options.lr * factor


def sample(flow: nn.Module, options: argparse.Namespace) -> Tensor:
    """Draw points with GM-SDE2, (num_samples, 2)."""
    override = dict(sampler='FlowSDE', output_mode='sample', order=2, num_timesteps=options.nfe)
    parts = []
    starts = range(0, options.num_samples, SAMPLES_AT_ONCE)
    for start in tqdm(starts, desc='sampling', disable=not sys.stderr.isatty()):
        source = SeededSource(options.seed, step=options.num_iters, first_row=start)
        count = min(SAMPLES_AT_ONCE, options.num_samples - start)
        noise = source.normal('noise', (count, 2, 1, 1), device=options.device)
        parts.append(flow(noise=noise, test_cfg_override=override, source=source).flatten(1).cpu())
    return torch.cat(parts)


def main(arguments: list[str] | None = None) -> int:
    """Train, sample, and save the picture; returns the exit code."""
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    network = dict(type='GMFlowMLP2DDenoiser', num_gaussians=options.num_gaussians)
    flow = MODULES.build(dict(type='GMFlow', denoising=network, num_timesteps=1000)).to(options.device)
    data = CheckerboardData(scale=BOARD_SCALE, seed=options.seed)
    begin = time.perf_counter()
    try:
        train(flow, data, options)
    except TrainingDivergedError:
        print('error: the gradient is no number, again and again; choose a smaller --lr', file=sys.stderr)
        return 1
    trained = time.perf_counter()
    points = sample(flow.eval(), options)
    sampled = time.perf_counter()
    save_picture(picture(points, options.cells), options.out)
    print(f'training {trained - begin:.0f} s, sampling {sampled - trained:.0f} s on {options.device}')
    print(f'{share_on_white_squares(points, BOARD_SCALE):.1%} of {len(points):,} points lie on white squares')
    print(f'saved {options.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
