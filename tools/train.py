#!/usr/bin/env python
"""Train what a config describes, or continue where a run of it was interrupted.

python tools/train.py configs/digits/dit_digits_teacher.py            about two minutes on two CPU cores
python tools/train.py CONFIG --dry-run                                what it would do, in seconds
"""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Train what a config describes; an interrupted run is continued.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='directory of logs (default: work_dir of the config, or work_dirs/<name>)')
    parser.add_argument(
        '--resume-from', help='checkpoint to resume from; it must exist (default: the newest of the run)'
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument('--seed', type=int, help='seed of the run (default: seed of the config, or 2021)')
    parser.add_argument('--diff_seed', action='store_true', help='accepted; processes always draw different numbers')
    parser.add_argument('--deterministic', action='store_true', help='allow deterministic algorithms only')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='change the config: train_cfg.nfe=2 evaluation.0.viz_num=8',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')
    parser.add_argument('--dry-run', action='store_true', help='say what would be done, and exit')
    deprecated = parser.add_argument_group('deprecated; choose devices with CUDA_VISIBLE_DEVICES')
    deprecated.add_argument('--gpus', type=int)
    deprecated.add_argument('--gpu-ids', type=int, nargs='+')
    deprecated.add_argument('--gpu-id', type=int)
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from lakonlab.runner.launch import run_command, train

    return run_command(train, args)


if __name__ == '__main__':
    sys.exit(main())
