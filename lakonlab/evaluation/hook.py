"""Evaluation while training, and the same evaluation afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from lakonlab.evaluation.best import BestValue, numbers_that_decide, restore
from lakonlab.evaluation.entries import Entry, clashes, entry_name, images_folder, metric_configs, run_name
from lakonlab.evaluation.evaluate import EvaluationStoppedError, build_evaluation_loader, evaluate
from lakonlab.evaluation.expected import check_expected
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.images import ImageFolder, WrittenImages
from lakonlab.evaluation.interval import checked_interval, is_multiple
from lakonlab.evaluation.metrics import build_metrics
from lakonlab.evaluation.preparation import QUANTISATIONS
from lakonlab.evaluation.references import ReferenceSamples, is_frozen, needs_reference_kwargs
from lakonlab.evaluation.sample_page import gallery
from lakonlab.evaluation.sampling import check_sample_kwargs
from lakonlab.evaluation.training_record import forget_later, record
from lakonlab.mmengine_parts import Hook
from lakonlab.phases import phase
from lakonlab.ranks import ALONE, Ranks
from lakonlab.registry import HOOKS
from lakonlab.storage.errors import StorageError
from lakonlab.storage.remote_path import as_path
from lakonlab.storage.schemes import LIST, WRITE, require

logger = logging.getLogger('lakonlab.evaluation')


@HOOKS.register_module()
class GenerativeEvalHook(Hook):
    """One entry of the section ``evaluation`` of a config: which samples to make, what to measure, when.

    Args:
        data: Key of the data set in the section ``data``.
        prefix: Tells entries of one split apart; numbers are called ``{data}_{prefix}_{metric}``.
        interval: Iterations between evaluations while training; or ``dict(milestones=[m1, ...], interval=[i0, i1,
            ...])``, where the n-th interval holds from the n-th milestone on; None to evaluate with ``tools/test.py``
            only.
        metrics: Configs of metrics.
        sample_kwargs: ``role`` (``'student'``, ``'ema'``, ``'teacher'``; by default the average, if there is one)
            and ``test_cfg_override``.
        reference_kwargs: The same, for the samples that ``ReferenceRMSE`` compares with.
        viz_dir: Folder of sample images, local or ``s3://``; None for ``viz/<name of work_dir>/<data>_<prefix>``.
        viz_num: Samples written as images; None for all, 0 for none.
        feed_batch_size: Largest batch given to a feature extractor.
        generate: If False, the real images of the split are measured instead of samples.
        save_best_ckpt: Whether to save the run whenever a number is better than at all evaluations before; it needs
            ``checkpoint_config``.
        best_metric: Name of that number, such as ``'fid'``, or of several, for each of which a best checkpoint of its
            own is kept; None for the first one of ``metrics`` that tells better weights from worse ones. Their metrics
            say whether less is better or more.
        quantize: ``'float'``: metrics see samples as the model makes them; ``'uint8'``: rounded to 8 bits per channel,
            as files have them.
        metric_cpu_offload: Move the networks of metrics to the CPU after each evaluation.

    Attributes:
        owed: Iteration whose evaluation was given up when the run was asked to stop, or failed; None if there is none.

    Raises:
        ValueError: An argument has an impossible value.
    """

    priority = 'LOW'

    def __init__(
        self,
        data: str = 'val',
        prefix: str = '',
        interval: int | Mapping[str, Sequence[int]] | None = 1,
        metrics: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
        sample_kwargs: Mapping[str, Any] | None = None,
        reference_kwargs: Mapping[str, Any] | None = None,
        viz_dir: str | None = None,
        viz_num: int | None = None,
        feed_batch_size: int = 32,
        generate: bool = True,
        save_best_ckpt: bool = False,
        best_metric: str | Sequence[str] | None = None,
        quantize: str = 'float',
        metric_cpu_offload: bool = False,
    ):
        self.data = data
        self.prefix = prefix
        self.name = entry_name(data, prefix)
        self.interval = checked_interval(interval)
        self.sample_kwargs = check_sample_kwargs(sample_kwargs, f'evaluation {self.name}: sample_kwargs')
        self.reference_kwargs = None
        if reference_kwargs is not None:
            self.reference_kwargs = check_sample_kwargs(reference_kwargs, f'evaluation {self.name}: reference_kwargs')
        if viz_dir is not None:
            try:
                require(viz_dir, WRITE, LIST, setting=f'evaluation {self.name}: viz_dir')
            except StorageError as error:
                raise ValueError(str(error)) from error
        for key, value, least in (('viz_num', viz_num, 0), ('feed_batch_size', feed_batch_size, 1)):
            if value is not None and value < least:
                raise ValueError(f'evaluation {self.name}: {key}={value!r}: expected at least {least}')
        self.viz_dir = viz_dir
        self.viz_num = viz_num
        self.feed_batch_size = feed_batch_size
        self.generate = generate
        if quantize not in QUANTISATIONS:
            raise ValueError(
                f'evaluation {self.name}: quantize={quantize!r}: expected one of {", ".join(map(repr, QUANTISATIONS))}'
            )
        self.quantize = quantize
        self.metric_cpu_offload = metric_cpu_offload
        self.metrics = build_metrics(metric_configs(metrics), f'evaluation {self.name}')
        self.best: list[BestValue] = []
        if save_best_ckpt:
            if interval is None:
                raise ValueError(
                    f'evaluation {self.name}: save_best_ckpt=True, but interval=None never evaluates while training; '
                    'set interval, or save_best_ckpt=False'
                )
            rules = numbers_that_decide(
                [metric.better for metric in self.metrics], best_metric, f'evaluation {self.name}'
            )
            self.best = [BestValue(f'{self.name}_{number}', better) for number, better in rules.items()]
        compared = [metric.title for metric in self.metrics if metric.needs_reference]
        if compared and reference_kwargs is None:
            raise ValueError(needs_reference_kwargs(f'evaluation {self.name}', compared))
        self.extractors = ExtractorPool()
        self.references = ReferenceSamples()
        self._loader = None
        self.owed: int | None = None

    def share(self, hooks: Sequence[Hook]) -> None:
        """Use the networks and reference samples of the first evaluation of the run, and nothing else of another one.

        Args:
            hooks: All hooks of the run.

        Raises:
            ValueError: Two evaluations have the same name, or folder of images.
        """
        evaluations = [hook for hook in hooks if isinstance(hook, GenerativeEvalHook)]
        problems = clashes(
            [Entry('evaluation', hook.name, hook.viz_dir if hook.viz_num != 0 else None) for hook in evaluations]
        )
        if problems:
            raise ValueError('; '.join(problems))
        first = evaluations[0]
        self.extractors, self.references = first.extractors, first.references

    def is_due(self, iteration: int) -> bool:
        """Whether to evaluate while training.

        Args:
            iteration: Number of completed iterations.

        Returns:
            True at multiples of the interval that holds there.
        """
        return is_multiple(self.interval, iteration)

    def run(
        self,
        model: nn.Module,
        data: Mapping[str, Any],
        run: str,
        tag: str,
        loader: str = 'val_dataloader',
        seed: int = 0,
        ranks: Ranks = ALONE,
        is_divided: bool = False,
        stop: Callable[[], bool] | None = None,
        origin: Mapping[str, Any] | None = None,
        reuse: bool = False,
        iteration: int | None = None,
        keep_references: bool = True,
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Evaluate now; several processes do so together.

        Args:
            model: Has ``val_step``.
            data: Section ``data`` of the config.
            run: Name of the run, for the default folder of images.
            tag: Name of the weights that are evaluated: the iteration, or the checkpoint.
            loader: Key of the loader arguments in ``data``.
            seed: Seed of what the sampler draws beyond the data set's noise.
            ranks: The processes.
            is_divided: Whether the networks of the model are divided among them.
            stop: Whether this process is asked to stop, see :func:`lakonlab.evaluation.evaluate.evaluate`.
            origin: What the weights are, as plain data.
            reuse: Measure the images that an evaluation of the same ``origin`` and arguments has written, instead of
                making them again; then all samples are measured with 8 bits per channel.
            iteration: Number of completed iterations, while training.
            keep_references: Whether a later evaluation compares with the same reference samples.

        Returns:
            In every process the results (see :func:`lakonlab.evaluation.evaluate.evaluate`), with ``name``, ``data``,
            ``prefix``, ``images``, the folder of images, and ``page``, which shows them; and in the main process the
            grid of samples, uint8 (H, W, 3), or None.
        """
        self._load(data, loader, ranks)
        path = None if self.viz_num == 0 else as_path(images_folder(self.viz_dir, run, self.name)) / tag
        page = None if path is None else str(path.parent / f'{path.name}.html')
        weights = dict(iteration=iteration) if origin is None else origin
        origin = None if origin is None else {**origin, 'seed': seed, 'loader': loader, **self._sampling()}
        written = None
        if reuse and path is not None and origin is not None and self.generate:
            written = ranks.together(lambda: WrittenImages(path, origin))
            if written.problem is not None and ranks.is_main:
                logger.warning('%s: all samples are made: %s', self.name, written.problem)
        folder, grid = None, None

        def prepare() -> None:
            nonlocal folder
            self.bind()
            for metric in self.metrics:
                metric.prepare(tag)
            folder = None if path is None else ImageFolder(path, self.viz_num, origin=origin, reuse=written is not None)

        def finish() -> None:
            nonlocal grid
            grid = folder.finish() if folder else None
            if folder and folder.captions:
                gallery(f'{run} {self.name} {tag}', results, weights, folder, page).write(page)
            if self.metric_cpu_offload:
                self.extractors.offload()

        ranks.on_main(prepare)
        results = evaluate(
            model,
            self._loader,
            self.metrics,
            sample_kwargs=self.sample_kwargs,
            reference_kwargs=self.reference_kwargs,
            references=self.references,
            keep_references=keep_references,
            data=self.data,
            version=tag,
            images=folder,
            written=written,
            quantize='uint8' if written is not None else self.quantize,
            feed_batch_size=self.feed_batch_size,
            generate=self.generate,
            seed=seed,
            name=self.name,
            ranks=ranks,
            is_divided=is_divided,
            stop=stop,
        )
        ranks.on_main(finish)
        if ranks.is_main:
            for metric, value in results['metrics'].items():
                logger.info('%s_%s = %.4f', self.name, metric, value)
            logger.info('%s: %d samples in %.1f s', self.name, results['num_samples'], results['seconds'])
            if written is not None:
                read, made = results['reused']['read'], results['reused']['made']
                level = logging.WARNING if made else logging.INFO
                logger.log(level, '%s: %d samples were read from %s, %d made', self.name, read, path, made)
        images = None if path is None else str(path)
        summary = dict(name=self.name, data=self.data, prefix=self.prefix, images=images, page=page)
        return {**summary, **results}, grid

    def _load(self, data: Mapping[str, Any], loader: str, ranks: Ranks) -> None:
        if self._loader is None:
            self._loader = ranks.together(lambda: build_evaluation_loader(data, self.data, loader, ranks))

    def check(self, data: Mapping[str, Any], loader: str = 'val_dataloader', ranks: Ranks = ALONE) -> None:
        """See that the samples to come suffice for the metrics, which are bound; by all processes together.

        Args:
            data: Section ``data`` of the config.
            loader: Key of the loader arguments in it.
            ranks: The processes.

        Raises:
            ConfigError: They do not.
        """
        self._load(data, loader, ranks)
        ranks.on_main(lambda: check_expected(self.metrics, self._loader, self.generate, self.name, self.data))

    def bind(self) -> None:
        """Load the networks and references of the metrics, if they are not yet there."""
        for metric in self.metrics:
            metric.bind(self.extractors)

    def compares_like_one_of(self, others: Iterable[Hook]) -> bool:
        """Whether another evaluation compares with the same reference samples.

        Args:
            others: Hooks of the run.
        """
        mine = self.data, self.reference_kwargs
        return any(
            isinstance(other, GenerativeEvalHook)
            and other is not self
            and (other.data, other.reference_kwargs) == mine
            and any(metric.needs_reference for metric in other.metrics)
            for other in others
        )

    def _sampling(self) -> dict[str, Any]:
        """What decides which samples are made, beside the weights."""
        return dict(data_split=self.data, sample_kwargs=self.sample_kwargs, generate=self.generate)

    def before_train(self, runner) -> None:
        """Share networks with the other evaluations, and see that best checkpoints have a place to go.

        What the metrics need is loaded now, so that what is missing is found before anything is trained. From the file
        of results, those of later iterations, which will be made again, are removed.

        Raises:
            ValueError: It has none, or another evaluation's best checkpoints would take the same one, or what metrics
                need does not fit.
        """
        self.share(runner.hooks)
        evaluations = [hook for hook in runner.hooks if isinstance(hook, GenerativeEvalHook)]
        names = [best.name for hook in evaluations for best in hook.best]
        shared = [best.name for best in self.best if names.count(best.name) > 1]
        if shared:
            raise ValueError(
                f'evaluation {self.name}: another entry keeps the best checkpoint of {", ".join(shared)} too, in the '
                'same place; give one of them a prefix of its own, or set save_best_ckpt=False in it'
            )
        if self.best and runner.checkpoint_hook is None:
            raise ValueError(
                f'evaluation {self.name}: save_best_ckpt=True, but checkpoint_config is not set, which says where '
                'checkpoints go; set it, for example to dict(interval=1000), or set save_best_ckpt=False'
            )
        if self.interval is not None:
            runner.strategy.ranks.on_main(self.bind)
            self.check(runner.cfg.data, ranks=runner.strategy.ranks)
        runner.strategy.ranks.on_main(lambda: forget_later(runner.work_dir, runner.iter))

    def before_train_epoch(self, runner) -> None:
        """Make up for an evaluation in which the run was stopped, or which failed."""
        owed, self.owed = self.owed, None
        if owed == runner.iter:
            self._evaluate(runner, owed)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Evaluate if it is time to; log the numbers, and save the run if it is the best so far.

        What fails in all processes at the same place, as it does unless networks are divided among them, does so after
        the run is saved, by which all of them are needed.
        """
        if self.is_due(runner.iter + 1):
            self._evaluate(runner, runner.iter + 1)

    def _evaluate(self, runner, iteration: int) -> None:
        if runner.failure is not None:  # of another evaluation
            self.owed = iteration
            return
        try:
            self._evaluate_and_log(runner, iteration)
        except EvaluationStoppedError as stopped:
            logger.info('%s; it will be made when the run goes on', stopped)
            self.owed, runner.strategy.stop_requested = iteration, True
        except Exception as error:
            if not runner.strategy.ranks.is_common(error):  # other processes wait for this one, and cannot be told
                raise
            self.owed = iteration
            runner.end_with(error)

    def _evaluate_and_log(self, runner, iteration: int) -> None:
        strategy = runner.strategy
        with phase('evaluation'):
            results, grid = self.run(
                runner.model,
                runner.cfg.data,
                run_name(runner.work_dir),
                str(iteration),
                seed=runner.seed,
                ranks=strategy.ranks,
                is_divided=strategy.is_sharded,
                stop=lambda: runner.is_asked_to_stop,
                iteration=iteration,
                keep_references=is_frozen(self.reference_kwargs or {}) or self.compares_like_one_of(runner.hooks),
            )
        numbers = {f'{self.name}_{metric}': value for metric, value in results['metrics'].items()}

        def log() -> None:
            absent = [best.name for best in self.best if best.name not in numbers]
            if absent:
                raise ValueError(
                    f'evaluation {self.name}.best_metric: {", ".join(absent)} has not been computed, only '
                    f'{", ".join(numbers)}; the metric that promised it is at fault'
                )
            if numbers:
                runner.visualizer.add_scalars(numbers, step=iteration, file_path=f'{runner.timestamp}.json')
            record(runner.work_dir, iteration, results)
            if grid is not None:
                runner.visualizer.add_image(self.name, grid, step=iteration)

        strategy.ranks.on_main(log)
        for best in self.best:
            if best.update(numbers[best.name], iteration):
                runner.checkpoint_hook.save_best(iteration, best.name, best.value)

    def state_dict(self) -> dict[str, Any]:
        """The best values so far and when they were reached, and the evaluation that is owed, as plain data."""
        return dict(best=[best.state_dict() for best in self.best], owed=self.owed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.owed = state.get('owed')
        found = state['best'] or []  # of versions that kept one: its state, or None
        if self.best:
            restore(self.best, [found] if isinstance(found, Mapping) else found)
