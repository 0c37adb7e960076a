"""Command-line arguments that every tool takes; imports nothing that is slow, so that ``--help`` is instant."""

from __future__ import annotations

import argparse


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config, its options, seeds and launcher to a parser.

    Args:
        parser: The parser of a tool.
    """
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='directory of logs (default: work_dir of the config, or work_dirs/<name>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='change the config: train_cfg.nfe=2 evaluation.0.viz_num=8',
    )
    add_launch_arguments(parser)


def add_launch_arguments(parser: argparse.ArgumentParser, default: str | None = 'none') -> None:
    """Add seeds and launcher to a parser.

    Args:
        parser: The parser of a tool.
        default: Launcher if none is named; None to find torchrun by what it sets.
    """
    parser.add_argument('--seed', type=int, help='seed (default: seed of the config, or 2021)')
    parser.add_argument('--diff_seed', action='store_true', help='accepted; processes always draw different numbers')
    parser.add_argument('--deterministic', action='store_true', help='allow deterministic algorithms only')
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    parser.add_argument('--launcher', choices=launchers, default=default, help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')
    deprecated = parser.add_argument_group('deprecated; choose devices with CUDA_VISIBLE_DEVICES')
    deprecated.add_argument('--gpus', type=int)
    deprecated.add_argument('--gpu-ids', type=int, nargs='+')
    deprecated.add_argument('--gpu-id', type=int)
