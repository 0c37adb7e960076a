"""Prompts for text-to-image models, with what belongs to them: embeddings, images, latents, noise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lakonlab.datasets.cached_prompts import CachedPrompts, fit_embeds
from lakonlab.datasets.noise import seeded_noise
from lakonlab.datasets.paired_images import PairedImages, scaling_of
from lakonlab.datasets.prompt_cache import read_embeds
from lakonlab.datasets.prompt_cache.embeds_file import CACHE_ARGUMENTS
from lakonlab.datasets.prompt_record import PromptRecord
from lakonlab.datasets.prompt_rows import PromptRows
from lakonlab.datasets.slices import item_range
from lakonlab.registry import DATASETS
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.datasets')

#: Configs of published models have no text encoder of their own, which is why one is named beside.
CACHE_COMMAND = f'python tools/cache_image_prompt_data.py {CACHE_ARGUMENTS}'
NEGATIVE_COMMAND = f'python tools/cache_negative_prompt.py {CACHE_ARGUMENTS}'


@DATASETS.register_module()
class ImagePrompt(Dataset):
    """Prompts for training, with images or latents if the trainer needs them, or with noise for sampling.

    Prompts come from a cache of embeddings or, as text for the model's text encoder, from a data set of the Hugging
    Face library. Where both are named the cache is used if it is there; if it is not, the log says so, and the model
    must have a text encoder. See ``docs/data.md``.

    Args:
        data_root: Folder that ``cache_dir`` and the folders of images are in; local or a URL, as all paths here.
        cache_dir: Folder of the prompt cache.
        cache_datalist_path: List of its records, which is written when the cache is complete; None for the index of the
            cache itself.
        ignore_cached_latents: Leave latents of the cache aside, but for their shape.
        prompt_dataset_kwargs: Arguments of ``datasets.load_dataset``; of several splits ``train``, or the first.
        image_dir: Folder of one image to each prompt.
        image_datalist_path: List of the images in the order of the prompts; None for all of the folder by name.
        image_extension: Extension of their files.
        image_scale_factor: Factor of their height and width.
        image_scale_method: ``'bicubic'`` or ``'lanczos'``.
        condition_image_dir: Folder of one image to each prompt that the model is shown, to edit it.
        condition_image_datalist_path: As that of the images.
        condition_image_extension: As that of the images.
        condition_image_scale_factor: As that of the images.
        negative_prompt_embeds_path: File of the embeddings of what guidance moves away from, the same for all.
        negative_prompt_kwargs: The same as arguments of the text encoder, used where there are no embeddings.
        pad_seq_len: Number of text tokens of embeddings: longer ones are cut, shorter ones padded and masked.
        latent_size: Shape (C, *, H, W) of a sample, where nothing of the item tells it.
        latent_patch_size: Latents whose height and width are multiples of this number; images are scaled for it.
        vae_scale_factor: Pixels per latent, along all dimensions or along each.
        repeat: How often each prompt follows itself; every time with noise of its own.
        start_ind: First prompt, as in a Python slice.
        end_ind: Prompt after the last one, as in a Python slice.
        bucketize: Tell the sampler which items have the same shape.
        prompt_key: Column of the prompts.
        test_mode: Items hold noise to start sampling from instead of images or latents.

    The files are opened when they are first needed, in each process.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        data_root: str,
        cache_dir: str | None = None,
        cache_datalist_path: str | None = None,
        ignore_cached_latents: bool = False,
        prompt_dataset_kwargs: Mapping[str, Any] | None = None,
        image_dir: str | None = None,
        image_datalist_path: str | None = None,
        image_extension: str = '.png',
        image_scale_factor: float = 1.0,
        image_scale_method: str = 'bicubic',
        condition_image_dir: str | None = None,
        condition_image_datalist_path: str | None = None,
        condition_image_extension: str = '.png',
        condition_image_scale_factor: float = 1.0,
        negative_prompt_embeds_path: str | None = None,
        negative_prompt_kwargs: Mapping[str, Any] | None = None,
        pad_seq_len: int | None = None,
        latent_size: Sequence[int] = (16, 128, 128),
        latent_patch_size: int = 2,
        vae_scale_factor: int | Sequence[int] = 8,
        repeat: int = 1,
        start_ind: int | None = None,
        end_ind: int | None = None,
        bucketize: bool = False,
        prompt_key: str = 'prompt',
        test_mode: bool = False,
    ):
        if prompt_dataset_kwargs is None and cache_dir is None:
            raise ValueError('set cache_dir, prompt_dataset_kwargs, or both: without them there are no prompts')
        for kind, folder, datalist in (
            ('cache', cache_dir, cache_datalist_path),
            ('image', image_dir, image_datalist_path),
            ('condition_image', condition_image_dir, condition_image_datalist_path),
        ):
            if datalist is not None and folder is None:
                raise ValueError(f'{kind}_datalist_path={datalist!r} has no effect without {kind}_dir: set both')
        numbers = dict(pad_seq_len=pad_seq_len, latent_patch_size=latent_patch_size)
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f'{name}={value!r}: expected a positive number')
        self.data_root = str(data_root)
        self.cache_dir = cache_dir
        self.cache_datalist_path = cache_datalist_path
        self.ignore_cached_latents = ignore_cached_latents
        self.prompt_dataset_kwargs = prompt_dataset_kwargs
        self.negative_prompt_embeds_path = negative_prompt_embeds_path
        self.negative_prompt_kwargs = None if negative_prompt_kwargs is None else dict(negative_prompt_kwargs)
        self.pad_seq_len = pad_seq_len
        self.latent_size = tuple(latent_size)
        self.factors = factors_of(vae_scale_factor, len(self.latent_size) - 1)
        multiple = tuple(factor * latent_patch_size for factor in self.factors[-2:])
        self._image_arguments = (
            image_dir,
            image_datalist_path,
            image_extension,
            scaling_of(image_scale_factor, image_scale_method, multiple),
            'image_dir',
        )
        self._condition_arguments = (
            condition_image_dir,
            condition_image_datalist_path,
            condition_image_extension,
            scaling_of(condition_image_scale_factor, image_scale_method, multiple, 'condition_'),
            'condition_image_dir',
        )
        if repeat < 1:
            raise ValueError(f'repeat={repeat!r}: expected a positive number')
        self.repeat = repeat
        self.start_ind = start_ind
        self.end_ind = end_ind
        self.bucketize = bucketize
        self.prompt_key = prompt_key
        self.test_mode = test_mode

    # -- where things come from

    @cached_property
    def source(self) -> CachedPrompts | PromptRows:
        """Where prompts come from."""
        if self.is_cached:
            folder = files.join(self.data_root, self.cache_dir)
            return CachedPrompts(folder, self.cache_datalist_path, self.pad_seq_len, self.ignore_cached_latents)
        return PromptRows(self.prompt_dataset_kwargs, self.prompt_key)

    @cached_property
    def is_cached(self) -> bool:
        """Whether prompts come from the cache, as embeddings; said in the log if a cache is named and they do not.

        Raises:
            FileNotFoundError: The cache is missing, and no other source is named.
        """
        missing = self._missing_of_cache
        if self.cache_dir is None or missing is None:
            return self.cache_dir is not None
        if self.prompt_dataset_kwargs is None:
            raise FileNotFoundError(f'{missing}. Make the cache with {CACHE_COMMAND}, or set prompt_dataset_kwargs.')
        logger.warning(
            '%s, so prompts are embedded as they come, by the text encoder of the model; %s makes the cache',
            missing,
            CACHE_COMMAND,
        )
        return False

    @cached_property
    def _missing_of_cache(self) -> str | None:
        """What the cache lacks, as a sentence without a stop; None if it is there or not asked for."""
        if self.cache_dir is None:
            return None
        folder = files.join(self.data_root, self.cache_dir)
        if not files.is_directory(folder):
            return f'cache_dir={self.cache_dir!r}: there is no folder {folder}'
        path = self.cache_datalist_path
        if path is not None and not files.is_file(path):
            return (
                f'cache_datalist_path={path!r}: there is no such file, so the cache in {folder} is not complete or '
                'belongs to another list'
            )
        return None

    def _paired(self, directory: str | None, *arguments: Any) -> PairedImages | None:
        if directory is None:
            return None
        images = PairedImages(files.join(self.data_root, directory), *arguments)
        if len(images) != len(self.source):
            raise ValueError(
                f'{arguments[-1]}={directory!r}: there are {len(images)} images and {len(self.source)} prompts; '
                'every prompt needs one image, in the same order'
            )
        return images

    @cached_property
    def images(self) -> PairedImages | None:
        """The images that belong to the prompts; None if there are none."""
        return self._paired(*self._image_arguments)

    @cached_property
    def condition_images(self) -> PairedImages | None:
        """The images to be edited; None if there are none."""
        return self._paired(*self._condition_arguments)

    @cached_property
    def negative(self) -> dict[str, Any]:
        """What every item says of the negative prompt."""
        path = self.negative_prompt_embeds_path
        found: dict[str, Any] = {}
        if path is not None and files.is_file(path):
            embeds = fit_embeds(read_embeds(path), self.pad_seq_len, f'negative_prompt_embeds_path={path!r}')
            found['negative_prompt_embed_kwargs'] = embeds
        elif path is not None:
            missing = f'negative_prompt_embeds_path={path!r}: there is no such file'
            if self.negative_prompt_kwargs is None:
                raise FileNotFoundError(
                    f'{missing}. Make it with {NEGATIVE_COMMAND}, or set negative_prompt_kwargs, such as '
                    "dict(prompt=''), for the text encoder of the model."
                )
            logger.warning(
                '%s, so the negative prompt is embedded as it comes, by the text encoder of the model; %s makes it',
                missing,
                NEGATIVE_COMMAND,
            )
        if self.negative_prompt_kwargs is not None:
            found['negative_prompt_kwargs'] = dict(self.negative_prompt_kwargs)
        return found

    # -- what a run asks before it starts

    @property
    def needs_text_encoder(self) -> str | None:
        """Why the model must have a text encoder, as a sentence without a stop; None if everything is embedded."""
        negative = self.negative
        if not self.is_cached:
            return self._missing_of_cache or 'prompt_dataset_kwargs: the prompts are texts'
        if 'negative_prompt_kwargs' in negative and 'negative_prompt_embed_kwargs' not in negative:
            return 'negative_prompt_kwargs: the negative prompt is a text'
        return None

    @property
    def has_images(self) -> bool:
        """Whether items hold images or latents, which a trainer on data needs; the first item stands for all."""
        if self.images is not None:
            return True
        return self.is_cached and self.source[self.positions[0]].latents is not None

    # -- items

    @cached_property
    def positions(self) -> range:
        """Numbers of the prompts that are used, in the source."""
        return item_range(len(self.source), self.start_ind, self.end_ind)

    @cached_property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every item, for the sampler; None unless ``bucketize``."""
        if not self.bucketize:
            return None
        ids = self.source.bucket_ids
        if ids is None and self.images is not None:
            ids = self.images.bucket_ids
        if ids is None:
            raise ValueError(
                'bucketize=True: neither cache_datalist_path nor image_datalist_path tells buckets (bucket_id or '
                'size_idx in every line, or image_size), and the prompts have no columns height and width'
            )
        chosen = np.asarray(ids)[self.positions.start : self.positions.stop]
        return np.repeat(chosen, self.repeat)

    def __len__(self) -> int:
        return len(self.positions) * self.repeat

    def __getitem__(self, index: int) -> dict:
        """Return one item.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Returns:
            ``ids`` int; ``name``, the prompt; ``prompt_embed_kwargs``, tensors, or ``prompt_kwargs``, texts; the same
            with ``negative_`` before their names where configured; ``condition_images`` (3, H, W) in [0, 1] or
            ``condition_latents`` where there are some. For training ``images`` (3, H, W) in [0, 1], or cached
            ``latents``, or else ``latent_size``, the shape for a trainer without data. In test mode ``noise``.

        Raises:
            IndexError: ``index`` is out of range.
            ValueError: What belongs to the item is damaged or does not fit.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The items of a batch, whose embeddings are read together; see :meth:`__getitem__`."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f'item {index} of an ImagePrompt data set of {len(self)}')
        positions = [self.positions[index // self.repeat] for index in indices]
        records = self.source.records(positions)
        return [self._item(*known) for known in zip(indices, positions, records)]

    def _item(self, index: int, position: int, record: PromptRecord) -> dict:
        item: dict[str, Any] = {'ids': index, 'name': record.prompt, **record.conditions, **self.negative}
        if self.condition_images is not None:
            item['condition_images'] = self.condition_images[position]
        elif record.condition_latents is not None:
            item['condition_latents'] = record.condition_latents
        if self.test_mode:
            # the seed is the number of the item, so that repeated prompts differ
            return {**item, 'noise': seeded_noise(index, self.size_of(position, record))}
        sample = self._sample(position, record)
        return {**item, **sample}

    def _sample(self, position: int, record: PromptRecord) -> dict[str, Any]:
        if self.images is not None:
            return {'images': self.images[position]}
        if record.latents is not None:
            return {'latents': record.latents}
        return {'latent_size': self.size_of(position, record)}

    def size_of(self, position: int, record: PromptRecord) -> tuple[int, ...]:
        """Shape of the latents of a prompt: cached, of its condition or image, or as its row or the config says.

        Args:
            position: Number of the prompt.
            record: The prompt.

        Raises:
            ValueError: The size in pixels is no multiple of ``vae_scale_factor``, or has more dimensions than latents.
        """
        if record.latent_size is not None:
            return record.latent_size
        if record.condition_latents is not None:
            return tuple(record.condition_latents.shape)
        pixels = record.sample_size if self.images is None else self.images.size(position)
        if pixels is None:
            return self.latent_size
        if len(pixels) > len(self.factors):
            raise ValueError(
                f'prompt {position}: its size has {len(pixels)} dimensions (frames, height and width), but '
                f'latent_size={self.latent_size} {len(self.factors)} after the channels: set a latent_size with '
                'frames, or leave out the column frames'
            )
        factors = self.factors[-len(pixels) :]
        if any(length % factor for length, factor in zip(pixels, factors, strict=True)):
            raise ValueError(
                f'prompt {position}: {" x ".join(map(str, pixels))} pixels are no multiple of vae_scale_factor, '
                f'{" x ".join(map(str, factors))}'
            )
        lengths = [length // factor for length, factor in zip(pixels, factors, strict=True)]
        return (*self.latent_size[: len(self.latent_size) - len(lengths)], *lengths)


def factors_of(vae_scale_factor: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Pixels per latent along every dimension of a sample.

    Raises:
        ValueError: There is another number of them, or one is not positive.
    """
    if isinstance(vae_scale_factor, int):
        factors = (vae_scale_factor,) * dimensions
    else:
        factors = tuple(vae_scale_factor)
    if len(factors) != dimensions or any(factor < 1 for factor in factors):
        raise ValueError(
            f'vae_scale_factor={vae_scale_factor!r}: expected a positive number, or one for each of the {dimensions} '
            'dimensions of latent_size after the first'
        )
    return factors
