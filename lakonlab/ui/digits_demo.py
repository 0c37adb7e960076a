"""The digits demo: teacher, students, their evaluation, and a report, through ``tools/train.py`` and ``tools/test.py``.

What is finished is reused if its config, its seed and the teacher it learned from are the present ones; what was
interrupted is continued; what was made with other settings is set aside, never deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lakonlab.ui.digits_report import (
    DATA_FREE,
    DX_ONE_STEP,
    ONE_STEP,
    TEACHER,
    TWO_STEP,
    SeedResults,
    check_targets,
    collect,
    table,
    write_report,
)
from lakonlab.ui.processes import InterruptedJobsError, Job, JobFailedError, JobRunner

REPOSITORY = Path(__file__).resolve().parents[2]
OUT_DIR = Path('work_dirs/digits_demo')
FIRST_SEED = 2021
SHORT_NAMES = {TEACHER: 'teacher', ONE_STEP: '1-step', TWO_STEP: '2-step', DX_ONE_STEP: 'dx', DATA_FREE: 'data-free'}


@dataclass(frozen=True)
class Run:
    """One config with one seed.

    Args:
        config: Name of the config.
        seed: Seed.
        name: Name of the run and its folders.
        options: ``--cfg-options`` that make it this run.
        fingerprint: Hash of all that decides its result.
        total_iters: Iterations of the finished run.
    """

    config: str
    seed: int
    name: str
    options: tuple[str, ...]
    fingerprint: str
    total_iters: int

    @property
    def phase(self) -> str:
        """Short name for the output and the table of wall times."""
        suffix = '' if self.seed == FIRST_SEED else f'-s{self.seed}'
        return SHORT_NAMES[self.config] + suffix

    def command(self, tool: str, *arguments: str) -> tuple[str, ...]:
        """Command line of ``tools/<tool>.py``, as a user would type it."""
        options = ('--cfg-options', *self.options) if self.options else ()
        paths = (REPOSITORY / 'tools' / f'{tool}.py', REPOSITORY / 'configs' / 'digits' / f'{self.config}.py')
        shown = (os.path.relpath(path) for path in paths)
        return ('python', *shown, *arguments, '--seed', str(self.seed), *options)

    @property
    def train(self) -> tuple[str, ...]:
        """Command that trains."""
        return self.command('train')

    @property
    def test(self) -> tuple[str, ...]:
        """Command that evaluates."""
        return self.command('test', '--ckpt', f'checkpoints/{self.name}/latest')


def plan_seed(seed: int, configs: Sequence[str], extra_options: Sequence[str] = ()) -> list[Run]:
    """The runs of one seed, the teacher first.

    Args:
        seed: The seed.
        configs: Names of the students' configs.
        extra_options: Further ``--cfg-options`` of every run.

    Returns:
        The runs.
    """
    from lakonlab.config.load import load_config, resolved_text
    from lakonlab.config.options import parse_options

    suffix = '' if seed == FIRST_SEED else f'_seed{seed}'
    teacher_name = TEACHER + suffix
    runs: list[Run] = []
    for config in (TEACHER, *configs):
        options = list(extra_options)
        if suffix:
            options.append(f'name={config}{suffix}')
            if config != TEACHER:
                weights = f'checkpoints/{teacher_name}/latest'
                options += [f'model.{role}.denoising.pretrained={weights}' for role in ('teacher', 'diffusion')]
        cfg = load_config(REPOSITORY / 'configs' / 'digits' / f'{config}.py', parse_options(options))
        learned_from = runs[0].fingerprint if runs else ''
        fingerprint = hashlib.sha256(f'{resolved_text(cfg)}\n{seed}\n{learned_from}'.encode()).hexdigest()
        runs.append(Run(config, seed, config + suffix, tuple(options), fingerprint, cfg.total_iters))
    return runs


class DemoState:
    """What the demo has begun and finished, kept in a file between its runs.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.runs = json.loads(path.read_text(encoding='utf-8'))

    def save(self) -> None:
        """Write the file, all or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix('.tmp')
        temporary.write_text(json.dumps(self.runs, indent=1) + '\n', encoding='utf-8')
        os.replace(temporary, self.path)

    def is_trained(self, run: Run) -> bool:
        """Whether the run was trained to its end with the present settings."""
        checkpoint = Path('checkpoints', run.name, f'iter_{run.total_iters}', 'manifest.json')
        entry = self.runs.get(run.name, {})
        return entry.get('fingerprint') == run.fingerprint and entry.get('trained', False) and checkpoint.is_file()

    def is_evaluated(self, run: Run) -> bool:
        """Whether the run was evaluated after it was trained."""
        results = Path('work_dirs', run.name, 'results.json')
        return self.is_trained(run) and self.runs[run.name].get('evaluated', False) and results.is_file()

    def begin(self, run: Run) -> str:
        """Prepare the folders of a run.

        Args:
            run: The run.

        Returns:
            What will happen to it, for the user.
        """
        if self.is_evaluated(run):
            return 'finished: reused'
        if self.is_trained(run):
            return 'trained: reused; to be evaluated'
        folders = [folder for folder in (Path('checkpoints', run.name), Path('work_dirs', run.name)) if folder.exists()]
        if self.runs.get(run.name, {}).get('fingerprint') == run.fingerprint:
            self.runs[run.name].update(trained=False, evaluated=False)
            self.save()
            return 'begun: to be continued' if folders else 'to be trained'
        stamp = time.strftime('%Y%m%d_%H%M%S')
        for folder in folders:
            shutil.move(folder, folder.with_name(f'{folder.name}.before_{stamp}'))
        self.runs[run.name] = dict(fingerprint=run.fingerprint, trained=False, evaluated=False, seconds={})
        self.save()
        moved = ', '.join(f'{folder}.before_{stamp}' for folder in folders)
        return f'to be trained; results of other settings were moved to {moved}' if moved else 'to be trained'

    def record(self, run: Run, phase: str, succeeded: bool, seconds: float) -> None:
        """Note that a phase ended; the wall times of interrupted attempts add up.

        Args:
            run: The run.
            phase: ``'train'`` or ``'test'``.
            succeeded: Whether it is finished.
            seconds: Wall time.
        """
        entry = self.runs[run.name]
        entry['seconds'][phase] = entry['seconds'].get(phase, 0.0) + seconds
        if succeeded:
            entry['trained' if phase == 'train' else 'evaluated'] = True
        self.save()


def plan_jobs(runs: Sequence[Run], state: DemoState) -> tuple[list[Job], dict[str, tuple[Run, str]]]:
    """What is left to do.

    The longest chains come first; students wait for their teacher's training only.

    Args:
        runs: All runs, the teacher of a seed before its students.
        state: What is finished.

    Returns:
        The jobs in the order to start them, and job name -> (run, phase).
    """
    jobs: list[Job] = []
    meaning: dict[str, tuple[Run, str]] = {}

    def add(run: Run, phase: str, after: Sequence[str]) -> None:
        name = f'{run.phase} {phase}'
        meaning[name] = (run, phase)
        command = run.train if phase == 'train' else run.test
        after = tuple(job for job in after if job in meaning)
        jobs.append(Job(name, (sys.executable, *command[1:]), after))

    teachers = {run.seed: run for run in runs if run.config == TEACHER}
    cost = {TWO_STEP: 0, DATA_FREE: 1, ONE_STEP: 2, DX_ONE_STEP: 3}
    for seed, teacher in teachers.items():
        if not state.is_trained(teacher):
            add(teacher, 'train', ())
        students = sorted(
            (run for run in runs if run.seed == seed and run != teacher), key=lambda run: cost[run.config]
        )
        for run in students:
            if not state.is_trained(run):
                add(run, 'train', [f'{teacher.phase} train'])
        for run in [teacher, *students]:
            if not state.is_evaluated(run):
                add(run, 'test', [f'{run.phase} train'])
    return jobs, meaning


def environment() -> dict[str, str]:
    """Environment of the jobs: one thread each, for these tensors are too small for more, unless the user says so."""
    env = dict(os.environ, PYTHONUNBUFFERED='1')
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        env.setdefault(name, os.environ.get('OMP_NUM_THREADS', '1'))
    return env


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def read_results(seeds: Mapping[int, Sequence[Run]], state: DemoState) -> list[SeedResults]:
    """Read what the runs left behind.

    Args:
        seeds: Seed -> its runs.
        state: Wall times.

    Returns:
        Results of each seed.
    """
    found = []
    for seed, runs in seeds.items():
        seconds, commands = {}, {}
        for phase in ('train', 'test'):
            for run in runs:
                seconds[f'{run.phase} {phase}'] = state.runs[run.name]['seconds'].get(phase, 0.0)
                commands[f'{run.phase} {phase}'] = shlex.join(run.train if phase == 'train' else run.test)
        found.append(collect(seed, {run.config: run.name for run in runs}, seconds, commands))
    return found


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Train a teacher on handwritten digits, distil it into few-step students, and report.'
    )
    parser.add_argument('--all', action='store_true', help='also the DX student and the one trained without data')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='repeat with N seeds (default: 1)')
    parser.add_argument('--jobs', type=int, default=0, metavar='N', help='processes at a time (default: one per core)')
    parser.add_argument('--picture', type=Path, metavar='PATH', help='also write the picture of samples to PATH')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='change the configs')
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error('--seeds must be at least 1')
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: Command line; None for that of the process.

    Returns:
        Exit code: 0, 1 if a phase failed, or 128 + the number of the signal that stopped it.
    """
    args = parse_args(arguments)
    start = time.monotonic()
    configs = (ONE_STEP, TWO_STEP, DX_ONE_STEP, DATA_FREE) if args.all else (ONE_STEP, TWO_STEP)
    seeds = {seed: plan_seed(seed, configs, args.cfg_options) for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)}
    runs = [run for seed_runs in seeds.values() for run in seed_runs]
    state = DemoState(OUT_DIR / 'state.json')
    say('pi-Flow on handwritten digits')
    for run in runs:
        say(f'  {run.name}: {state.begin(run)}')
    jobs, meaning = plan_jobs(runs, state)
    env, max_parallel = environment(), args.jobs or usable_cores()
    if jobs:
        say(f'{len(jobs)} commands, up to {max_parallel} at a time, {env["OMP_NUM_THREADS"]} thread(s) each:')
        for job in jobs:
            run, phase = meaning[job.name]
            say(f'  {job.name:<15} {shlex.join(run.train if phase == "train" else run.test)}')

    def ended(job: Job, succeeded: bool, seconds: float) -> None:
        run, phase = meaning[job.name]
        state.record(run, phase, succeeded, seconds)
        say(f'== {job.name}: {"done" if succeeded else "stopped"} after {seconds:.0f} s')

    try:
        JobRunner(jobs, max_parallel, env, say, ended).run()
    except InterruptedJobsError as interruption:
        say(f'{interruption}; run the same command to continue')
        return 128 + interruption.signum
    except JobFailedError as failure:
        say(f'\n{failure}\nThe demo stops here; what is finished is kept. Run the same command to continue.')
        return 1

    results = read_results(seeds, state)
    report = write_report(results, OUT_DIR)
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(OUT_DIR / 'digits.png', args.picture)
    _summarise(results, time.monotonic() - start, report)
    return 0


def _summarise(results: Sequence[SeedResults], seconds: float, report: Path) -> None:
    rows = table(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    say('')
    for row in rows:
        say('  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))
    say('\nTargets')
    for target in check_targets(results):
        say(f'  {target}')
    say(f'\n{seconds:.0f} s in all. Report: {report.resolve()} (also {report.with_suffix(".md").name} beside it)')


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 (what the demo is for)
