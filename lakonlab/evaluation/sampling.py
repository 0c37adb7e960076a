"""Sampling one batch for evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lakonlab.evaluation.initial_noise import RecordingSource, noise_hashes
from lakonlab.phases import SAMPLING_PHASES, PhaseClock

SAMPLE_ARGUMENTS = ('role', 'test_cfg_override')


class Samples(NamedTuple):
    """Generated images and what they cost.

    Args:
        images: Shape (B, C, H, W), in [0, 1].
        seconds: Wall time of the batch.
        nfe: Network evaluations per sample; None if the model does not say.
        noise: Hash of the noise that each sample started from; None if neither the data set brought nor the model drew
            any.
        phases: Seconds of ``'network'`` and of ``'policy'``, the rest of the sampling loop, as far as the model marks
            them and the device can be timed without waiting for it.
    """

    images: Tensor
    seconds: float
    nfe: int | None
    noise: list[str] | None = None
    phases: Mapping[str, float] | None = None


def check_sample_kwargs(kwargs: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Check the arguments with which an evaluation samples.

    Args:
        kwargs: ``role`` and ``test_cfg_override``, both optional.
        name: Config key they come from.

    Returns:
        The arguments as a dict.

    Raises:
        ValueError: There are others.
    """
    unknown = sorted(set(kwargs or {}) - set(SAMPLE_ARGUMENTS))
    if unknown:
        raise ValueError(f'{name}: unknown {", ".join(unknown)}; expected {" and ".join(SAMPLE_ARGUMENTS)}')
    return dict(kwargs or {})


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device('cpu'))


def given_noise(batch: Mapping[str, Any]) -> list[str] | None:
    """Hashes of the noise that a data set gives each sample; None if it gives none."""
    return None if batch.get('noise') is None else noise_hashes(batch['noise'])


def nfe_of(model: nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """Network evaluations of a sample, without making one; None if the model does not say.

    Args:
        model: Has ``val_step``.
        kwargs: Arguments of ``val_step``.
    """
    if not hasattr(model, 'role'):
        return None
    return model.role(kwargs.get('role')).num_function_evaluations(kwargs.get('test_cfg_override'))


def sample(model: nn.Module, batch: dict, kwargs: Mapping[str, Any], seed: int = 0) -> Samples:
    """Generate the images of one batch.

    What a sampler draws beyond the data set's noise is a function of the sample's id, not of the batch it is in.

    Args:
        model: Has ``val_step``.
        batch: A batch of a data set in test mode.
        kwargs: Arguments of ``val_step``.
        seed: Seed of what the sampler draws.

    Returns:
        The images and what they cost.
    """
    device, hashes = device_of(model), given_noise(batch)
    source = RecordingSource(seed, row_ids=batch['ids'])
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    start, clock = time.perf_counter(), PhaseClock(device)
    with torch.no_grad(), clock.active():
        outputs = model.val_step(batch, source=source, **kwargs)
    images = outputs['pred_imgs']
    if images.device.type not in ('cpu', 'meta'):
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - start
    phases = clock.seconds() if device.type in ('cpu', 'cuda') else {}
    phases = {name: phases[name] for name in SAMPLING_PHASES if name in phases}
    return Samples(images, seconds, outputs.get('nfe'), source.hashes if hashes is None else hashes, phases)
