"""Samples in the layouts that other evaluators read: ADM's, DPG-Bench, GenEval and the HPSv3 benchmark."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import tempfile
import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lakonlab.evaluation.expected import Expected, with_prompts
from lakonlab.evaluation.images import to_uint8
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS
from lakonlab.storage import files


class PromptExport(Metric):
    """Writes the samples of each prompt where another evaluator looks for them; it has no numbers of its own.

    The data set must repeat each prompt as often as there are samples of it (``repeat`` of ``ImagePrompt``).

    Args:
        out_dir: Folder of any scheme; samples go into a folder in it, which is named after the weights that made them.
        samples_per_prompt: Samples of each prompt.
        export_size: Side of the images in pixels; None for that of the samples.
        clear_existing: Remove the folder of these weights first; otherwise it must be empty.
        metadata: File of the benchmark that says which prompts there are, of any scheme; None to go without.
    """

    def __init__(
        self,
        out_dir: str,
        samples_per_prompt: int = 4,
        export_size: int | None = 1024,
        clear_existing: bool = True,
        metadata: str | None = None,
    ):
        for name, value in dict(samples_per_prompt=samples_per_prompt, export_size=export_size).items():
            if value is not None and value < 1:
                raise ValueError(f'{type(self).__name__}.{name}={value!r}: expected a positive number')
        files.require(out_dir, 'write', 'list', setting=f'{type(self).__name__}.out_dir')
        self.out_dir = self.folder = out_dir
        self._is_ready = False
        self.samples_per_prompt = samples_per_prompt
        self.export_size = export_size
        self.clear_existing = clear_existing
        self.metadata_path = metadata
        self._metadata: Any = None
        super().__init__()

    @property
    def title(self) -> str:
        return f'{type(self).__name__} ({self.out_dir})'

    def expect(self, samples: Expected) -> None:
        with_prompts(samples, type(self).__name__)

    def reset(self) -> None:
        self.num_images = 0
        self._pending: dict[int, tuple[str, dict[int, Image.Image]]] = {}

    def prepare(self, tag: str) -> None:
        """Make room for the samples of some weights.

        Raises:
            FileExistsError: There are files already.
            ValueError: The file of the benchmark says something else.
            OSError: It is missing.
        """
        self.folder = files.join(self.out_dir, tag) if tag else self.out_dir
        if self.metadata_path is not None:
            self._metadata = self.read_metadata(files.read_text(self.metadata_path))
        if self.clear_existing:
            files.remove_directory(self.folder)
        elif files.list_names(self.folder):
            raise FileExistsError(
                f'{type(self).__name__}.out_dir: {self.folder} is not empty, and what is in it would be evaluated '
                'too: name another out_dir, or set clear_existing=True, which removes all of it'
            )
        self._is_ready = True

    def feed(self, batch: SampleBatch) -> None:
        """Write the prompts of which all samples are there.

        Raises:
            ValueError: The samples have no prompts, other ones than the benchmark, or not each prompt
                ``samples_per_prompt`` times in a row.
        """
        if batch.prompts is None:
            raise ValueError(f'{type(self).__name__} needs samples with prompts')
        if not self._is_ready:
            self.prepare('')
        for number, prompt, pixels in zip(batch.ids, batch.prompts, to_uint8(batch.images), strict=True):
            index, sample = divmod(number, self.samples_per_prompt)
            first, group = self._pending.setdefault(index, (prompt, {}))
            if prompt != first:
                raise ValueError(
                    f'{type(self).__name__}: samples {index * self.samples_per_prompt} to '
                    f'{(index + 1) * self.samples_per_prompt - 1} should be of one prompt, but are of {first!r} and '
                    f'{prompt!r}; set repeat={self.samples_per_prompt} in the data set, or samples_per_prompt=1 here'
                )
            group[sample] = self._resized(Image.fromarray(pixels))
            if len(group) == self.samples_per_prompt:
                del self._pending[index]
                self.write(index, prompt, [group[key] for key in sorted(group)])
        self.num_images += len(batch.ids)

    def compute(self) -> dict[str, float]:
        """No numbers.

        Raises:
            ValueError: A prompt has fewer samples than there should be.
        """
        self._is_ready = False
        if self._pending:
            index, (_, group) = next(iter(self._pending.items()))
            raise ValueError(
                f'{type(self).__name__}: prompt {index} has {len(group)} of {self.samples_per_prompt} samples; set '
                f'repeat={self.samples_per_prompt} in the data set'
            )
        return {}

    def protocol(self) -> dict[str, Any]:
        return dict(
            num_images=self.num_images,
            folder=self.folder,
            samples_per_prompt=self.samples_per_prompt,
            export_size=self.export_size,
            metadata=self.metadata_path,
        )

    @abstractmethod
    def write(self, index: int, prompt: str, images: Sequence[Image.Image]) -> None:
        """Write the samples of one prompt.

        Args:
            index: Number of the prompt.
            prompt: Its text.
            images: Its samples.
        """

    def read_metadata(self, text: str) -> Any:
        """What the file of the benchmark says; layouts without such a file refuse it."""
        raise ValueError(f'{type(self).__name__}.metadata={self.metadata_path!r}: its layout has none; leave it out')

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.export_size
        if size is None or image.size == (size, size):
            return image
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def save(self, image: Image.Image, *names: str) -> None:
        """Write an image below the folder."""
        content = io.BytesIO()
        image.save(content, 'PNG')
        files.write_bytes(files.join(self.folder, *names), content.getvalue())

    def entry(self, index: int) -> Any:
        """What a list of the benchmark says about a prompt."""
        if index >= len(self._metadata):
            count = len(self._metadata)
            raise ValueError(f'{type(self).__name__}: there is a prompt {index}, but {self.metadata_path} has {count}')
        return self._metadata[index]

    def check_prompt(self, index: int, prompt: str, expected: str) -> None:
        """Refuse samples of other prompts than the benchmark's."""
        if ' '.join(prompt.split()) != ' '.join(expected.split()):
            raise ValueError(
                f'{type(self).__name__}: prompt {index} is {prompt!r}, but {self.metadata_path} has {expected!r} there'
            )


def tiled(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows, without space between them."""
    width, height = images[0].size
    canvas = Image.new('RGB', (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        canvas.paste(image, (number % columns * width, number // columns * height))
    return canvas


@METRICS.register_module()
class DPGBenchExport(PromptExport):
    """A square grid of samples per prompt, ``<id>.png``, for DPG-Bench.

    ``metadata`` is ``dpg_bench.csv`` of the benchmark, with the columns ``item_id`` and ``text``; without it, prompts
    are called by their numbers.
    """

    def read_metadata(self, text: str) -> dict[str, str]:
        rows = list(csv.DictReader(io.StringIO(text)))
        if not rows or not {'item_id', 'text'} <= set(rows[0]):
            raise ValueError(f'DPGBenchExport.metadata={self.metadata_path!r}: expected columns item_id and text')
        return {' '.join(row['text'].split()): row['item_id'] for row in rows}

    def write(self, index: int, prompt: str, images: Sequence[Image.Image]) -> None:
        name = str(index)
        if self._metadata is not None:
            name = self._metadata.get(' '.join(prompt.split()))
            if name is None:
                raise ValueError(f'DPGBenchExport: {self.metadata_path} has no prompt {prompt!r}')
        self.save(tiled(images, math.isqrt(len(images) - 1) + 1), f'{name}.png')


@METRICS.register_module()
class GenEvalExport(PromptExport):
    """``<prompt>/samples/<sample>.png``, ``<prompt>/metadata.jsonl`` and ``<prompt>/grid.png``, for GenEval.

    ``metadata`` is ``evaluation_metadata.jsonl`` of the benchmark, a line per prompt, which its evaluator needs.
    """

    def read_metadata(self, text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def write(self, index: int, prompt: str, images: Sequence[Image.Image]) -> None:
        facts: Mapping[str, Any] = dict(prompt=prompt)
        if self._metadata is not None:
            facts = self.entry(index)
            self.check_prompt(index, prompt, facts['prompt'])
        folder = f'{index:05d}'
        for number, image in enumerate(images):
            self.save(image, folder, 'samples', f'{number:04d}.png')
        self.save(tiled(images, len(images)), folder, 'grid.png')
        files.write_text(files.join(self.folder, folder, 'metadata.jsonl'), json.dumps(facts) + '\n')


@METRICS.register_module()
class HPSv3BenchmarkExport(PromptExport):
    """``<category>/<prompt>_<sample>.png`` with the prompt beside each in a ``.txt``, for the benchmark of HPSv3.

    ``metadata`` is a JSON file, category -> list of prompts, in the order of the data set; without it, all prompts are
    of one category.
    """

    def read_metadata(self, text: str) -> list[tuple[str, str]]:
        content = json.loads(text)
        if not isinstance(content, dict) or not all(isinstance(prompts, list) for prompts in content.values()):
            raise ValueError(
                f'HPSv3BenchmarkExport.metadata={self.metadata_path!r}: expected category -> list of prompts'
            )
        return [(category, prompt) for category, prompts in content.items() for prompt in prompts]

    def write(self, index: int, prompt: str, images: Sequence[Image.Image]) -> None:
        category = 'all'
        if self._metadata is not None:
            category, expected = self.entry(index)
            self.check_prompt(index, prompt, expected)
        for number, image in enumerate(images):
            name = f'{index:05d}_{number:02d}'
            self.save(image, category, f'{name}.png')
            files.write_text(files.join(self.folder, category, f'{name}.txt'), prompt)


@METRICS.register_module()
class ADMExport(Metric):
    """All samples in one ``.npz``, as the evaluator of ADM (guided diffusion) reads them.

    ``arr_0`` is uint8 of shape (N, H, W, 3), ``arr_1`` the classes, if there are any.

    Args:
        path: The file, of any scheme.
        num_images: Only the first so many samples are written; None for all.
    """

    def __init__(self, path: str, num_images: int | None = None):
        if not path.endswith('.npz'):
            raise ValueError(f'ADMExport.path={path!r}: expected a name that ends in .npz')
        files.require(path, 'write', setting='ADMExport.path')
        self.path = path
        self.limit = num_images
        super().__init__()

    @property
    def title(self) -> str:
        return f'ADMExport ({self.path})'

    def reset(self) -> None:
        self._images: BinaryIO | None = None  # on disk, because all samples may not fit into memory
        self._shape: tuple[int, ...] = ()
        self._labels: list[np.ndarray] = []
        self.num_images = 0

    def feed(self, batch: SampleBatch) -> None:
        count = len(batch.ids) if self.limit is None else min(len(batch.ids), self.limit - self.num_images)
        if count <= 0:
            return
        pixels = to_uint8(batch.images[:count])
        if self._images is None:
            self._images, self._shape = tempfile.TemporaryFile(), pixels.shape[1:]  # noqa: SIM115 - kept until compute
        if pixels.shape[1:] != self._shape:
            raise ValueError(
                f'ADMExport.path={self.path!r} holds samples of one size, but found {pixels.shape[1:]} after '
                f'{self._shape}'
            )
        self._images.write(pixels.tobytes())
        if batch.labels is not None:
            self._labels.append(batch.labels[:count].cpu().numpy())
        self.num_images += count

    def compute(self) -> dict[str, float]:
        """Write the file.

        Returns:
            No numbers.
        """
        with files.open_write(self.path) as stream, zipfile.ZipFile(stream, 'w', allowZip64=True) as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = dict(descr='|u1', fortran_order=False, shape=(self.num_images, *self._shape))
                np.lib.format.write_array_header_1_0(member, header)
                if self._images is not None:
                    self._images.seek(0)
                    shutil.copyfileobj(self._images, member, 2**20)
                    self._images.close()
                    self._images = None
            if self._labels:
                with archive.open('arr_1.npy', 'w', force_zip64=True) as member:
                    np.lib.format.write_array(member, np.concatenate(self._labels))
        return {}

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=self.num_images, path=self.path)
