"""Run metrics over the samples of a model, or over real images."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.images import ImageFolder
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.references import ReferenceSamples
from lakonlab.evaluation.samples import SampleBatch, real_images
from lakonlab.evaluation.sampling import sample


def evaluate(
    model: nn.Module | None,
    dataloader: Iterable[dict],
    metrics: Sequence[Metric],
    *,
    sample_kwargs: Mapping[str, Any] | None = None,
    reference_kwargs: Mapping[str, Any] | None = None,
    references: ReferenceSamples | None = None,
    data: str = 'val',
    version: object = None,
    images: ImageFolder | None = None,
    feed_batch_size: int = 512,
    generate: bool = True,
    seed: int = 0,
    name: str = 'evaluation',
) -> dict[str, Any]:
    """Generate every sample of a data split once and measure them.

    Args:
        model: Has ``val_step``; put into evaluation mode while it samples. Not needed for real images.
        dataloader: Batches with ``ids``, noise and conditions, or with real images.
        metrics: What to measure; reset first.
        sample_kwargs: Arguments of ``val_step``: ``role``, ``test_cfg_override``.
        reference_kwargs: The same, for the samples that ``ReferenceRMSE`` compares with.
        references: Where reference samples are kept between evaluations.
        data: Name of the split.
        version: What changes when the weights of the model do.
        images: Where to write samples.
        feed_batch_size: Largest batch given to a feature extractor.
        generate: If False, the real images of the split are measured.
        seed: Seed of what the sampler draws beyond the data set's noise.
        name: Title of the progress bar.

    Returns:
        ``metrics`` (name -> number), ``protocol`` (class of the metric -> its protocol), ``num_samples``, ``nfe``
        (network evaluations per sample), ``seconds``, and the sampling arguments with ``sampling_seed``, which every
        protocol repeats; None for real images.

    Raises:
        ConfigError: A metric needs reference samples and ``reference_kwargs`` is not given, or there are no samples.
    """
    needs_reference = any(metric.needs_reference for metric in metrics)
    if needs_reference and reference_kwargs is None:
        raise ConfigError(f'{name}: a metric compares with reference samples; set reference_kwargs in this entry')
    references = references if references is not None else ReferenceSamples()
    for metric in metrics:
        metric.reset()
    start, count, nfe = time.perf_counter(), 0, None
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        total = len(dataloader.dataset) if isinstance(dataloader, DataLoader) else None
        with tqdm(total=total, desc=name, unit='sample', leave=False, disable=None) as progress:
            for batch in dataloader:
                if generate:
                    pixels, seconds, nfe = sample(model, batch, sample_kwargs or {}, seed)
                else:
                    pixels, seconds = real_images(batch), None
                reference = None
                if needs_reference:
                    reference = references.get(model, batch, data, reference_kwargs, version).to(pixels.device)
                generated = SampleBatch(
                    pixels, batch['ids'], batch.get('labels'), reference, seconds, feed_batch_size=feed_batch_size
                )
                for metric in metrics:
                    metric.feed(generated)
                if images is not None:
                    images.add(pixels, batch['ids'])
                count += len(batch['ids'])
                progress.update(len(batch['ids']))
    finally:
        if model is not None:
            model.train(was_training)
    if count == 0:
        raise ConfigError(f'{name}: the data split {data!r} has no samples')
    numbers: dict[str, float] = {}
    for metric in metrics:
        numbers.update(metric.compute())
    sampling_seed = seed if generate else None
    return dict(
        metrics=numbers,
        protocol={type(metric).__name__: {**metric.protocol(), 'sampling_seed': sampling_seed} for metric in metrics},
        num_samples=count,
        nfe=nfe,
        seconds=time.perf_counter() - start,
        generated=generate,
        sample_kwargs=dict(sample_kwargs or {}),
        sampling_seed=sampling_seed,
        reference_kwargs=dict(reference_kwargs) if needs_reference else None,
    )


def build_evaluation_loader(data: Mapping[str, Any], split: str, loader: str = 'val_dataloader') -> DataLoader:
    """Build the loader of a split that an evaluation names.

    Args:
        data: Section ``data`` of a config.
        split: Key of a data set in it: ``val``, ``val2``, ``test``, ``train``, ....
        loader: Key of the loader arguments that override the common ones.

    Returns:
        A loader that reads every item once, in order.

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
    return build_dataloader(DATASETS.build(dict(data[split])), **options)
