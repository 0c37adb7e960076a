"""Class-conditional image generation, in the latents of an autoencoder or in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lakonlab.models.base_diffusion import BaseDiffusionTrainConfig
from lakonlab.models.latent_diffusion import Conditions, LatentDiffusion
from lakonlab.models.section import in_range
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import MODELS


@dataclass(kw_only=True)
class ClassImageTrainConfig(BaseDiffusionTrainConfig):
    """Keys of ``train_cfg`` that class-conditional training reads."""

    prob_class: float = 1.0
    """Probability of keeping the class label; otherwise the network is given the negative label."""
    teacher_sees_dropped_labels: bool = False
    """Give the teacher the labels after dropout instead of the true ones (as published in autumn 2025)."""

    def __post_init__(self):
        super().__post_init__()
        in_range(self, 0, 1, 'prob_class')


@MODELS.register_module()
class LatentDiffusionClassImage(LatentDiffusion):
    """A class-conditional image model. See :class:`LatentDiffusion` for batches and arguments.

    A batch also holds ``labels`` and ``negative_labels`` (B,).
    """

    train_cfg_class = ClassImageTrainConfig
    negative_hint = 'set negative_label in the dataset'

    def conditions_of(self, data: Mapping[str, Any], needs_negative: bool) -> Conditions:
        """Labels of a batch."""
        labels = data['labels'].to(self.device)
        negative = data.get('negative_labels')
        negative = None if negative is None else {'class_labels': negative.to(labels)}
        return Conditions({'class_labels': labels}, negative)

    def training_conditions(
        self, conditions: Conditions, data: Mapping[str, Any], source: RandomSource
    ) -> tuple[dict[str, Any], Conditions]:
        """Labels after dropout for the student, and before it for the teacher."""
        cfg = self.train_section
        if cfg.prob_class >= 1:
            return conditions.positive, conditions
        if conditions.negative is None:
            raise ValueError('train_cfg.prob_class < 1 needs negative_labels: set negative_label in the dataset')
        labels = conditions.positive['class_labels']
        keep = source.uniform('label_dropout', labels.shape, device=labels.device) < cfg.prob_class
        kept = {'class_labels': torch.where(keep, labels, conditions.negative['class_labels'])}
        return kept, conditions._replace(positive=kept) if cfg.teacher_sees_dropped_labels else conditions
