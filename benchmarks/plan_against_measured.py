"""What a dry run plans of memory against what torch's allocator gave out, under every strategy.

    python benchmarks/plan_against_measured.py [--models digits flux] [--world-sizes 1 2]

Small models with the structure of published ones take steps on CPUs, from the same batch of all processes. Measured is
the most that process 0 held at once in a step: weights, gradients, moments, averages, activations and what is gathered;
without what operations allocate for themselves, and without gloo's copies of what it exchanges, which GPUs do not need.
Both are printed beside it, as shares of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from groups import Group  # noqa: E402
from small_models import MODEL_CONFIGS, Training  # noqa: E402

from lakonlab.runner.dry_run import build_on_meta  # noqa: E402
from lakonlab.runner.memory_plan import plan  # noqa: E402
from lakonlab.runner.memory_sizes import sizes_of  # noqa: E402

STRATEGIES = {1: ('single', 'ddp', 'fsdp', 'fsdp2'), 2: ('ddp', 'fsdp', 'fsdp2')}
BATCH = {'digits': 64, 'flux': 4}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    'one pass': {},
    'checkpointing': {'changes': {'checkpointing': True}},
    'two micro-batches': {'train_cfg': {'halves': True}},
}


def planned_bytes(name: str, strategy: str, world_size: int, train_cfg: dict[str, Any], changes: dict[str, Any]) -> int:
    """Most bytes of a process, as a dry run says."""
    cfg = MODEL_CONFIGS[name](BATCH[name] // world_size, **changes)
    cfg.train_cfg.update(train_cfg)
    model = build_on_meta(cfg, locate=False)
    sizes, _ = sizes_of(model, cfg)
    entry = plan(sizes, strategy, world_size)
    return entry.checkpointed if model.diffusion.denoising.checkpointing else entry.kept


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(MODEL_CONFIGS), default=list(MODEL_CONFIGS))
    parser.add_argument('--world-sizes', nargs='+', type=int, choices=(1, 2), default=(1, 2))
    options = parser.parse_args()
    columns = ('planned, MB', 'measured, MB', 'planned / measured', 'own of operations', 'copies of gloo')
    print(f'{"":<54}' + ''.join(f'{column:>20}' for column in columns), flush=True)
    for name in options.models:
        for case, settings in CASES.items():
            for world_size in options.world_sizes:
                for strategy in STRATEGIES[world_size]:
                    changes = dict(settings.get('changes', {'checkpointing': False}))
                    train_cfg = {}
                    if 'train_cfg' in settings:
                        train_cfg['grad_accum_batch_size'] = BATCH[name] // world_size // 2
                    planned = planned_bytes(name, strategy, world_size, train_cfg, changes)
                    arguments = dict(alone=strategy == 'single', record=True, train_cfg=train_cfg, **changes)
                    with Group(world_size, Training, name, strategy, BATCH[name], **arguments) as group:
                        measured = group.call('peaks')[0]
                    title = f'{name}, {case}, {strategy}, {world_size} processes'
                    print(
                        f'{title:<54}{planned / 2**20:>20.1f}{measured["planned"] / 2**20:>20.1f}'
                        f'{planned / measured["planned"]:>20.3f}'
                        f'{(measured["all"] - measured["backend"]) / measured["planned"]:>20.1%}'
                        f'{(measured["backend"] - measured["planned"]) / measured["planned"]:>20.1%}',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
