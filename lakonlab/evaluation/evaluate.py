"""Run metrics over the samples of a model, or over real images."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.images import ImageFolder, WrittenImages
from lakonlab.evaluation.initial_noise import digest
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.preparation import quantised
from lakonlab.evaluation.references import ReferenceSamples, needs_reference_kwargs
from lakonlab.evaluation.rounds import Share, in_order, shares, to_send
from lakonlab.evaluation.samples import SampleBatch, captions_of, finite_rows, marked, prompts_of, real_images
from lakonlab.evaluation.sampling import device_of, given_noise, nfe_of, sample
from lakonlab.phases import beat
from lakonlab.ranks import ALONE, Ranks

logger = logging.getLogger('lakonlab.evaluation')


def _attention_flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


#: What torch's counter does not know: operation -> its floating-point operations, of the shapes of its arguments.
FURTHER_OPERATIONS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class EvaluationStoppedError(Exception):
    """The run was asked to stop in the middle of an evaluation, of which nothing is kept."""


def evaluate(
    model: nn.Module | None,
    dataloader: DataLoader,
    metrics: Sequence[Metric],
    *,
    sample_kwargs: Mapping[str, Any] | None = None,
    reference_kwargs: Mapping[str, Any] | None = None,
    references: ReferenceSamples | None = None,
    keep_references: bool = True,
    data: str = 'val',
    version: object = None,
    images: ImageFolder | None = None,
    written: WrittenImages | None = None,
    feed_batch_size: int = 512,
    generate: bool = True,
    quantize: str = 'float',
    seed: int = 0,
    name: str = 'evaluation',
    ranks: Ranks = ALONE,
    is_divided: bool = False,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Generate every sample of a data split once and measure them.

    Several processes call it together. Each samples its share of the split; the main process measures, and is given the
    samples in the batches that one process would have made, so that the numbers do not depend on how many there are.

    Args:
        model: Has ``val_step``; put into evaluation mode while it samples. Not needed for real images.
        dataloader: Made by :func:`build_evaluation_loader`: batches with ``ids``, noise and conditions, or with real
            images.
        metrics: What to measure; reset before and after, so that they hold no samples between evaluations. Only those
            of the main process are used.
        sample_kwargs: Arguments of ``val_step``: ``role``, ``test_cfg_override``.
        reference_kwargs: The same, for the samples that ``ReferenceRMSE`` compares with.
        references: Where reference samples are kept between evaluations.
        keep_references: Whether a later evaluation compares with the same ones.
        data: Name of the split.
        version: What changes when the weights of the model do.
        images: Where to write samples; only that of the main process is used.
        written: Images of these samples, made before, that need not be made again; metrics then see 8 bits per channel.
        feed_batch_size: Largest batch given to a feature extractor.
        quantize: ``'float'``: metrics see samples as the model makes them; ``'uint8'``: rounded to 8 bits per channel,
            as files have them.
        generate: If False, the real images of the split are measured.
        seed: Seed of what the sampler draws beyond the data set's noise.
        name: Title of the progress bar.
        ranks: The processes.
        is_divided: Whether the networks are divided among the processes, which then wait for each other in them.
        stop: Whether this process is asked to stop; asked before every round of batches.

    Returns:
        In every process: ``metrics`` (name -> number), ``protocol`` (class of the metric -> its protocol, with the
        names of its ``numbers``), ``num_samples``, ``num_not_finite`` (samples with pixels that are not finite, of
        which most numbers are NaN), ``nfe`` (network evaluations per sample), ``seconds``, ``num_processes``, and the
        sampling arguments with ``sampling_seed``, None for real images, ``initial_noise``, a hash of that of all
        samples, None where it is not known, ``quantize``, and ``image_sizes``, height and width of the images, which
        every protocol repeats; and ``reused``, of images written before, how many samples were ``read`` and how many
        were ``made``, None if none were to be read.

    Raises:
        ConfigError: A metric needs reference samples and ``reference_kwargs`` is not given, or there are no samples.
        EvaluationStoppedError: ``stop`` has said so in any process; in all of them.
        Exception: What failed in any process, in all of them; where networks are divided, in that process alone.
    """
    needs_reference = any(metric.needs_reference for metric in metrics)
    needs_flops = any(metric.needs_flops for metric in metrics)
    if needs_reference and reference_kwargs is None:
        raise ConfigError(needs_reference_kwargs(name, [metric.title for metric in metrics if metric.needs_reference]))
    if written is not None and quantize != 'uint8':
        raise ConfigError(f"{name}: images in files have 8 bits per channel: set quantize='uint8' to measure them")
    references = references if references is not None else ReferenceSamples()
    for metric in metrics:
        metric.reset()
    start, count, nfe = time.perf_counter(), 0, None
    num_read = 0  # by this process, from images that were written before
    sizes: set[tuple[int, int]] = set()
    not_finite: list[int] = []
    hashes: dict[int, str | None] = {}

    def make(share: Share, warm_up: bool, make_reference: bool) -> tuple[SampleBatch, torch.device]:
        nonlocal nfe, num_read
        batch, seconds, reference, flops, noise, phases = share.batch, None, None, None, None, None
        found = None if written is None else written.read(batch['ids'])
        if is_divided and written is not None and not all(ranks.all_gather(found is not None)):
            found = None  # a network that is divided makes the samples of all processes or of none
        if found is not None:
            pixels, noise = found.images.to(device_of(model)), given_noise(batch) or found.noise
            num_read += share.count
        elif generate and warm_up and needs_flops:
            with FlopCounterMode(display=False, custom_mapping=FURTHER_OPERATIONS) as counter:
                pixels, seconds, nfe, noise, phases = sample(model, batch, sample_kwargs or {}, seed)
            flops = counter.get_total_flops() / len(batch['ids'])
        elif generate:
            pixels, seconds, nfe, noise, phases = sample(model, batch, sample_kwargs or {}, seed)
        else:
            pixels = real_images(batch)
        if needs_reference:
            reference = references.get(
                model, batch, data, reference_kwargs, version, make_reference, seed, keep_references
            )
        labels, prompts = batch.get('labels'), prompts_of(batch)
        made = SampleBatch(
            pixels, batch['ids'], labels, reference, seconds,
            warm_up=warm_up, prompts=prompts, flops=flops, noise=noise, phases=phases,
        )  # fmt: skip
        return to_send(made, share.count), pixels.device

    def measure(parts: Sequence[SampleBatch], device: torch.device) -> None:
        nonlocal count
        for batch in in_order(parts, dataloader.batch_sampler.samples_per_gpu, device, feed_batch_size):
            if images is not None:
                images.add(batch.images, batch.ids, captions_of(batch), batch.noise)
            sizes.add(tuple(batch.images.shape[-2:]))
            not_finite.extend(batch.ids[row] for row in (~finite_rows(batch.images)).nonzero().flatten().tolist())
            hashes.update(zip(batch.ids, batch.noise or [None] * len(batch.ids), strict=True))
            batch.images = quantised(marked(batch.images), quantize)
            if batch.reference is not None:
                batch.reference = quantised(marked(batch.reference), quantize)
            for metric in metrics:
                metric.feed(batch)
            count += len(batch.ids)
            progress.update(len(batch.ids))

    def summarise() -> dict[str, Any]:
        if count == 0:
            raise ConfigError(f'{name}: the data split {data!r} has no samples')
        if not_finite:
            first = ', '.join(map(str, not_finite[:4])) + (', ...' if len(not_finite) > 4 else '')
            logger.warning(
                '%s: %d of %d samples have pixels that are not finite (%s): numbers that they are part of are nan, and '
                'no images of them are written',
                name,
                len(not_finite),
                count,
                first,
            )
        numbers: dict[str, float] = {}
        names: dict[str, list[str]] = {}
        with tqdm(metrics, desc=f'{name}: numbers', unit='metric', leave=False, disable=None) as progress:
            for metric in progress:
                progress.set_postfix_str(metric.title)
                computed = metric.compute()
                names[metric.title] = list(computed)
                numbers.update(computed)
                beat()
        sampling_seed = seed if generate else None
        image_sizes = [list(size) for size in sorted(sizes)]
        noise = digest(hashes)
        common = dict(sampling_seed=sampling_seed, initial_noise=noise, quantize=quantize, image_sizes=image_sizes)
        return dict(
            metrics=numbers,
            protocol={
                metric.title: dict(numbers=names[metric.title], **metric.protocol(), **common) for metric in metrics
            },
            num_samples=count,
            num_not_finite=len(not_finite),
            nfe=nfe_of(model, sample_kwargs or {}) if nfe is None and generate else nfe,
            seconds=time.perf_counter() - start,
            num_processes=ranks.world_size,
            generated=generate,
            sample_kwargs=dict(sample_kwargs or {}),
            sampling_seed=sampling_seed,
            initial_noise=noise,
            quantize=quantize,
            image_sizes=image_sizes,
            reference_kwargs=dict(reference_kwargs) if needs_reference else None,
            reused=None if written is None else dict(read=total_read, made=count - total_read),
        )

    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        hidden = None if ranks.is_main else True  # None: hidden if there is no terminal
        with tqdm(total=len(dataloader.dataset), desc=name, unit='sample', leave=False, disable=hidden) as progress:
            for number, share in enumerate(shares(dataloader, ranks)):
                if stop is not None and any(ranks.all_gather(stop())):
                    size = len(dataloader.dataset)
                    raise EvaluationStoppedError(f'{name} was stopped after {count} of {size} samples')
                make_reference = needs_reference and any(
                    ranks.all_gather(references.lacks(share.batch['ids'], data, reference_kwargs, version, seed))
                )
                made, device = ranks.together(
                    partial(make, share, number == 0, make_reference), exchanges=is_divided and generate
                )
                ranks.on_main(partial(measure, ranks.gather(made), device))
                beat()
    finally:
        if model is not None:
            model.train(was_training)
    total_read = sum(ranks.all_gather(num_read))
    try:
        return ranks.on_main(summarise)
    finally:
        for metric in metrics:
            metric.reset()


def build_evaluation_loader(
    data: Mapping[str, Any], split: str, loader: str = 'val_dataloader', ranks: Ranks = ALONE
) -> DataLoader:
    """Build the loader of a split that an evaluation names.

    Args:
        data: Section ``data`` of a config.
        split: Key of a data set in it: ``val``, ``val2``, ``test``, ``train``, ....
        loader: Key of the loader arguments that override the common ones.
        ranks: The processes that share the split.

    Returns:
        A loader of this process's items, each of them once, in order.

    Raises:
        ConfigError: There is no such data set.
    """
    from lakonlab.datasets.loader import build_dataloader
    from lakonlab.registry import DATASETS

    if split not in data or 'type' not in data[split]:
        splits = [key for key, value in data.items() if isinstance(value, Mapping) and 'type' in value]
        raise ConfigError(f'an evaluation names data={split!r}, but data has only {", ".join(splits)}')
    options = {key: value for key, value in data.items() if not re.fullmatch(r'(train|val|test)\d*(_.*)?', key)}
    options.update(data.get(loader) or data.get('val_dataloader') or {})
    options.setdefault('samples_per_gpu', 1)
    return build_dataloader(DATASETS.build(dict(data[split])), **options, rank=ranks.rank, world_size=ranks.world_size)
