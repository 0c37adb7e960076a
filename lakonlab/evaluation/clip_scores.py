"""How well images match their prompts by contrastive models of open_clip: CLIP similarity and HPSv2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from lakonlab.evaluation.hub_models import NO_WEIGHTS
from lakonlab.evaluation.preparation import as_rgb
from lakonlab.evaluation.prompt_scorer import PromptMetric, PromptScorer
from lakonlab.registry import METRICS, PROMPT_SCORERS
from lakonlab.storage.fetch import fetch
from lakonlab.storage.local import sha256_of

FITS = {'shortest': 'crop', 'longest': 'pad', 'squash': 'squash'}
"""How open_clip says that images get the model's size -> ``fit``."""
HPS_WEIGHTS = 'huggingface://xswu/HPSv2/HPS_{}_compressed.pt'
HPS_VERSIONS = ('v2', 'v2.1')


@PROMPT_SCORERS.register_module()
class OpenClipScorer(PromptScorer):
    """Cosine of the angle between the embeddings of an image and of its prompt.

    Args:
        model: Name of a model of open_clip.
        pretrained: A tag of open_clip, which downloads weights, or a file of weights, of any scheme.
        precision: ``'fp32'``, ``'fp16'`` or ``'bf16'``.
        fit: How images get the model's size: ``'crop'`` resizes the shorter side to it and cuts out the middle;
            ``'pad'`` resizes the longer side to it and adds black; ``'squash'`` resizes both. None for what open_clip
            says about the tag, and ``'crop'`` where it says nothing.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: An argument is unknown to open_clip, or the file holds another model.
        OSError: The weights cannot be had.
    """

    def __init__(self, model: str, pretrained: str, precision: str = 'fp16', fit: str | None = None):
        super().__init__()
        if fit is not None and fit not in FITS.values():
            raise ValueError(f'OpenClipScorer.fit={fit!r}: expected one of {", ".join(map(repr, FITS.values()))}')
        try:
            import open_clip
        except ImportError as error:
            raise ModuleNotFoundError(
                f"OpenClipScorer.model={model!r} needs open_clip, which is not installed: pip install 'lakonlab[clip]'"
            ) from error
        if model not in open_clip.list_models():
            raise ValueError(f'OpenClipScorer.model={model!r} is no model of open_clip')
        path, told = _weights(model, pretrained)
        fit, wanted = fit or FITS.get(told['resize_mode']), told['interpolation']
        if fit is None or wanted != 'bicubic':
            raise ValueError(
                f'OpenClipScorer.pretrained={pretrained!r} wants images resized by {wanted}, {told["resize_mode"]}, '
                f'which is not known here: expected bicubic, and one of {", ".join(map(repr, FITS))}'
            )
        try:
            self.net = open_clip.create_model(model, pretrained=str(path), precision=precision)
        except NO_WEIGHTS as error:
            reason = str(error).partition('\n')[0]
            raise ValueError(f'OpenClipScorer.pretrained={pretrained!r} does not hold {model}: {reason}') from None
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model, self.precision, self.fit = model, precision, fit
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        size = self.net.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.weights_hash = sha256_of(path)
        self.normalisation = {name: list(told[name]) for name in ('mean', 'std')}
        for name, values in self.normalisation.items():
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Bring images to the model's size and normalise them.

        Args:
            images: Shape (B, 1 or 3, H, W), float in [0, 1].

        Returns:
            Shape (B, 3, size, size).
        """
        images = as_rgb(images).float()
        fitted = dict(crop=crop_to, pad=pad_to, squash=squash_to)[self.fit](images, self.size)
        return (fitted - self.mean) / self.std

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts)).to(images.device)
        image = self.net.encode_image(self.prepare(images).to(self.dtype), normalize=True)
        text = self.net.encode_text(tokens, normalize=True)
        return (image.float() * text.float()).sum(dim=1)

    def protocol(self) -> dict[str, Any]:
        return dict(
            name=f'open_clip {self.model}',
            weights_sha256=self.weights_hash,
            precision=self.precision,
            images=f'{self.size} x {self.size}, {self.fit}, bicubic, antialiased',
            **self.normalisation,
        )


def _weights(model: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """The local file of weights that a tag or a path names, and how open_clip prepares images for them."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    config = get_pretrained_cfg(model, pretrained)
    told = merge_preprocess_dict(PreprocessCfg(), config)
    if config:
        return Path(download_pretrained(config)), told
    path = fetch(pretrained)
    if not path.is_file():
        tags = ', '.join(list_pretrained_tags_by_model(model)) or 'none'
        raise FileNotFoundError(
            f'OpenClipScorer.pretrained={pretrained!r}: there is no such file, and no such tag of {model} (there are: '
            f'{tags})'
        )
    return path, told


def crop_to(images: Tensor, size: int) -> Tensor:
    """Resize images so that their shorter side has a size, and cut out the middle.

    Args:
        images: Shape (B, C, H, W), float.
        size: Side in pixels.

    Returns:
        Shape (B, C, size, size).
    """
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    longer = int(size * long / short)
    shape = (size, longer) if height <= width else (longer, size)
    if shape != (height, width):
        images = F.interpolate(images, shape, mode='bicubic', align_corners=False, antialias=True)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return images[..., top : top + size, left : left + size]


def pad_to(images: Tensor, size: int) -> Tensor:
    """Resize images so that their longer side has a size, and add black on both sides of the other one.

    Args:
        images: Shape (B, C, H, W), float.
        size: Side in pixels.

    Returns:
        Shape (B, C, size, size).
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    shape = (round(height * scale), round(width * scale))
    if scale != 1:
        images = F.interpolate(images, shape, mode='bicubic', align_corners=False, antialias=True)
    below, right = size - shape[0], size - shape[1]
    return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def squash_to(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) to squares of a side."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode='bicubic', align_corners=False, antialias=True)


@METRICS.register_module()
class CLIPSimilarity(PromptMetric):
    """Cosine similarity of images and prompts by CLIP, in [-1, 1], not scaled.

    Args:
        model: Name of a model of open_clip.
        pretrained: A tag of open_clip, or a file of weights, of any scheme.
        precision: ``'fp32'``, ``'fp16'`` or ``'bf16'``.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'clipsim'

    def __init__(
        self,
        model: str = 'ViT-L-14-336-quickgelu',
        pretrained: str = 'openai',
        precision: str = 'fp16',
        prefix: str = '',
    ):
        scorer = dict(type='OpenClipScorer', model=model, pretrained=pretrained, precision=precision)
        super().__init__(scorer, prefix)


@METRICS.register_module()
class HPSv2(PromptMetric):
    """Human preference score v2 (Wu et al., 2023), about 0.2 to 0.35, not scaled.

    Args:
        version: ``'v2'`` or ``'v2.1'``.
        pretrained: A file of weights, of any scheme; None for the published one of the version.
        model: Name of the model of open_clip that they are of.
        precision: ``'fp32'``, ``'fp16'`` or ``'bf16'``.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'hpsv2'

    def __init__(
        self,
        version: str = 'v2.1',
        pretrained: str | None = None,
        model: str = 'ViT-H-14-quickgelu',
        precision: str = 'fp16',
        prefix: str = '',
    ):
        if version not in HPS_VERSIONS:
            raise ValueError(f'HPSv2.version={version!r}: expected one of {", ".join(map(repr, HPS_VERSIONS))}')
        weights = HPS_WEIGHTS.format(version) if pretrained is None else pretrained
        scorer = dict(type='OpenClipScorer', model=model, pretrained=weights, precision=precision, fit='pad')
        super().__init__(scorer, prefix)
