#!/usr/bin/env python
"""Evaluate a checkpoint with the evaluations of its config; the numbers go to <work_dir>/results.json.

python tools/test.py configs/digits/dit_digits_teacher.py             the newest checkpoint of the run
python tools/test.py CONFIG --ckpt checkpoints/NAME/iter_1000 --data val
"""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Evaluate a checkpoint and write results.json.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--ckpt', help='checkpoint; it must exist (default: the newest of the run)')
    parser.add_argument('--data', nargs='+', metavar='SPLIT', help='only evaluations of these data splits')
    parser.add_argument('--work-dir', help='directory of logs and results (default: work_dir of the config)')
    parser.add_argument('--seed', type=int, help='seed (default: seed of the config, or 2021)')
    parser.add_argument('--diff_seed', action='store_true', help='accepted; processes always draw different numbers')
    parser.add_argument('--deterministic', action='store_true', help='allow deterministic algorithms only')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='change the config: test_cfg.nfe=2')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')
    parser.add_argument('--skip-existing', action='store_true', help='keep finished results of the same checkpoint')
    parser.add_argument('--reuse-viz', action='store_true', help='refused: images on disk are not the samples')
    parser.add_argument('--timer', action='store_true', help='measure sampling speed in every evaluation')
    deprecated = parser.add_argument_group('deprecated; choose devices with CUDA_VISIBLE_DEVICES')
    deprecated.add_argument('--gpus', type=int)
    deprecated.add_argument('--gpu-ids', type=int, nargs='+')
    deprecated.add_argument('--gpu-id', type=int)
    return parser.parse_args()


def main() -> int:
    """Read the command line first: what follows takes seconds to import."""
    args = parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from lakonlab.runner.launch import run_command, test

    return run_command(test, args)


if __name__ == '__main__':
    sys.exit(main())
