"""What the samples of an evaluation will be, known before any is made, so that what they lack is found early."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import DataLoader

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.samples import prompts_of, real_images

if TYPE_CHECKING:
    from lakonlab.evaluation.metrics import Metric


class Expected(NamedTuple):
    """Samples to come.

    Args:
        count: How many.
        has_labels: Whether each is of a class.
        has_prompts: Whether each has a prompt.
        generated: Whether they are made, in place of real images.
    """

    count: int
    has_labels: bool = True
    has_prompts: bool = True
    generated: bool = True


def at_least_two(samples: Expected, metric: str) -> None:
    """Refuse what has no spread."""
    if samples.count < 2:
        raise ValueError(f'{metric} needs at least 2 samples, because a covariance does')


def made_now(samples: Expected, metric: str) -> None:
    """Refuse real images."""
    if not samples.generated:
        raise ValueError(f'{metric} needs samples that are generated now, not real images or images in files')


def with_prompts(samples: Expected, metric: str) -> None:
    """Refuse samples of which it is not said what they show."""
    if not samples.has_prompts:
        raise ValueError(f'{metric} needs samples with prompts')


def expected_samples(dataloader: DataLoader, generate: bool) -> Expected:
    """What a data split will bring, of which one item is read.

    Args:
        dataloader: Made by :func:`lakonlab.evaluation.evaluate.build_evaluation_loader`.
        generate: Whether samples are made, in place of real images.

    Raises:
        ValueError: It has no items, or no real images though they are wanted.
    """
    dataset = dataloader.dataset
    if len(dataset) == 0:
        raise ConfigError('it has no samples')
    batch = dataloader.collate_fn([dataset[0]])
    if not generate:
        real_images(batch)
    return Expected(len(dataset), batch.get('labels') is not None, prompts_of(batch) is not None, generate)


def check_expected(metrics: Iterable[Metric], dataloader: DataLoader, generate: bool, name: str, data: str) -> None:
    """See that the samples to come suffice for the metrics of an evaluation.

    Args:
        metrics: Bound to their networks.
        dataloader: See :func:`expected_samples`.
        generate: The same.
        name: Of the evaluation.
        data: Of the data split.

    Raises:
        ConfigError: They do not.
    """
    try:
        expected = expected_samples(dataloader, generate)
    except ValueError as error:
        raise ConfigError(f'evaluation {name}: data={data!r}: {error}') from error
    for metric in metrics:
        try:
            metric.expect(expected)
        except ValueError as error:
            raise ConfigError(f'evaluation {name}: data={data!r}, {expected.count} samples: {error}') from error
