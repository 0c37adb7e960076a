"""Command lines of the toy experiments with static policies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.runner.launch import run_command
from lakonlab.ui.arguments import default_device, device, not_negative, positive, positive_float
from lakonlab.ui.static_policy_experiment import Experiment, Settings, Subject
from lakonlab.ui.static_policy_teachers import class_subject, label_of, prompt_subject
from lakonlab.ui.toy_histogram import writable_picture

DTYPES = ('float32', 'bfloat16', 'float16')
JAY = 17
LABEL_NAMES = 'data/imagenet/imagenet1000_clsidx_to_labels.txt'
PROMPT = (
    'A tram passes under flowering cherry trees in an old town after the rain, the sky and the trees mirrored in the '
    'wet rails, photographed at dusk with a long lens'
)


def class_demo(description: str, arguments: Sequence[str] | None = None) -> int:
    """Fit static policies to a class-conditional teacher.

    Args:
        description: For ``--help``.
        arguments: Command line; None for that of the process.

    Returns:
        The exit code.
    """
    parser = _parser(description, 'viz/piflow_dit_imagenet_toymodel/output.png')
    parser.add_argument(
        '--teacher',
        help='checkpoint of a class-conditional teacher trained here, such as checkpoints/dit_digits_teacher/latest; '
        'or weights of the published ImageNet teacher (those from the hub)',
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument('--name', help=f'ImageNet class, looked up in {LABEL_NAMES}')
    labels.add_argument(
        '--class-label', type=not_negative, nargs='+', metavar='LABEL', help=f'classes by number ({JAY}, a jay, or 3)'
    )

    def subject(options: argparse.Namespace) -> Subject:
        chosen = options.class_label or [JAY if options.teacher is None else 3]
        if options.name is not None:
            chosen = [label_of(options.name, LABEL_NAMES)]
        pairs = options.batch_size or len(chosen)
        return class_subject(options.teacher, chosen, pairs, options.guidance_scale, options.dtype)

    return _main(parser, subject, arguments)


def prompt_demo(description: str, arguments: Sequence[str] | None = None) -> int:
    """Fit static policies to Qwen-Image.

    Args:
        description: For ``--help``.
        arguments: Command line; None for that of the process.

    Returns:
        The exit code.
    """
    parser = _parser(description, 'viz/piflow_qwen_toymodel/output.png')
    parser.add_argument('--teacher', metavar='FOLDER', help='pipeline as diffusers saves it (Qwen/Qwen-Image)')
    parser.add_argument('--prompt', nargs='+', default=[PROMPT], help='one or several texts')
    parser.add_argument('--h', type=positive, default=768, help='height of the images in pixels (768)')
    parser.add_argument('--w', type=positive, default=1360, help='width of the images in pixels (1360)')

    def subject(options: argparse.Namespace) -> Subject:
        pairs, size = options.batch_size or len(options.prompt), (options.h, options.w)
        scale, dtype = options.guidance_scale, options.dtype
        return prompt_subject(options.teacher, options.prompt, pairs, size, scale, dtype, options.device)

    return _main(parser, subject, arguments)


def _parser(description: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--policy-type', choices=sorted(POLICY_CLASSES), default='GMFlow', help='(GMFlow)')
    parser.add_argument(
        '-k',
        '--num-gaussians',
        type=positive,
        default=32,
        help='components of the mixture, or values of a DX grid (32)',
    )
    parser.add_argument(
        '--cfg', '--guidance-scale', dest='guidance_scale', type=float, help="the teacher's guidance (4, or its own)"
    )
    parser.add_argument('--num-iters', '--iters', type=positive, default=5000, help='iterations (5000)')
    parser.add_argument('--lr', type=positive_float, default=5e-3, help='learning rate (5e-3)')
    parser.add_argument('--lr-schedule', choices=['constant', 'cosine'], default='constant', help='(constant)')
    parser.add_argument(
        '--num-intermediates', type=positive, default=2, help='states per iteration that the teacher is asked at (2)'
    )
    parser.add_argument(
        '--window-substeps', type=not_negative, help='window of the averaged velocity (0; 3 for the DX policy)'
    )
    parser.add_argument('--batch-size', type=positive, help='noises, each with a policy (one per class or prompt)')
    parser.add_argument('--seed', type=int, default=42, help='seed of everything (42)')
    parser.add_argument('--out', default=out, help=f'the picture ({out})')
    parser.add_argument(
        '--picture-interval',
        type=not_negative,
        default=500,
        help='iterations between pictures, 0 for one at the end (500)',
    )
    parser.add_argument('--device', type=device, help='(an accelerator if there is one, else cpu)')
    parser.add_argument('--dtype', choices=DTYPES, help='of the teacher (bfloat16, on the cpu float32)')
    return parser


def _read(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    options.device = options.device or default_device()
    options.dtype = options.dtype or ('float32' if options.device.type == 'cpu' else 'bfloat16')
    scale = options.guidance_scale
    if scale is not None and not (scale in (0, 1) or 1 < scale < float('inf')):
        parser.error(f'argument --cfg/--guidance-scale: {scale}: expected 1 (no guidance) or more')
    try:
        options.out = writable_picture(options.out)
    except ValueError as error:
        parser.error(f'argument --out: {error}')
    return options


def _main(
    parser: argparse.ArgumentParser,
    subject: Callable[[argparse.Namespace], Subject],
    arguments: Sequence[str] | None,
) -> int:
    options = _read(parser, arguments)

    def run(options: argparse.Namespace) -> int:
        torch.manual_seed(options.seed)
        settings = Settings(
            out=Path(options.out),
            policy_type=options.policy_type,
            num_components=options.num_gaussians,
            num_iters=options.num_iters,
            lr=options.lr,
            lr_schedule=options.lr_schedule,
            num_intermediates=options.num_intermediates,
            window_substeps=options.window_substeps,
            seed=options.seed,
            picture_interval=options.picture_interval,
        )
        experiment = Experiment(subject(options), settings, options.device)
        fit = experiment.run(say)
        say(
            f'RMSE to the solved teacher: {fit.rmse_before:.4f} before training, {fit.rmse_after:.4f} after; '
            f'one Euler step of the teacher: {fit.rmse_one_step:.4f}'
        )
        for file in fit.files:
            say(f'saved {file}')
        return 0

    return run_command(run, options)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True, file=sys.stdout)  # noqa: T201 (what the demo is for)
