"""What is known of the images that samples are compared with: moments of their features, and the features."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lakonlab.storage import files
from lakonlab.storage.array_pickle import UnsafeArrayError, read_array_pickle
from lakonlab.storage.errors import StorageError
from lakonlab.storage.local import sha256_of

FORMAT = 'lakonlab.reference_statistics.1'
SUFFIX = '.safetensors'
NPZ_NAMES = {
    'mean': ('mean', 'mu'),
    'covariance': ('covariance', 'cov', 'sigma'),
    'features': ('features', 'real_feats_np', 'pool_3'),
}
"""Name here -> names in files of NumPy: ours or the published one, then those of ADM and pytorch-fid."""


class ReferenceFileError(ValueError):
    """A file of reference statistics that is damaged or says too little."""


@dataclass
class ReferenceStatistics:
    """Statistics of reference images.

    Args:
        mean: Mean of their features, shape (D,), float64.
        covariance: Unbiased covariance, shape (D, D), float64.
        num_images: How many images there were; None if it is not recorded.
        features: Shape (N, D), float32; None if only the moments are known.
        provenance: Where they come from: extractor, preparation of images, source; as far as it is recorded.
        sha256: Of the file they were read from; empty if there is none.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None
    features: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ''

    def __post_init__(self):
        size = self.mean.shape[0] if self.mean.dim() == 1 else -1
        if self.covariance.shape != (size, size):
            raise ReferenceFileError(
                f'mean {tuple(self.mean.shape)} and covariance {tuple(self.covariance.shape)} differ'
            )
        if self.features is not None and (self.features.dim() != 2 or self.features.shape[1] != size):
            raise ReferenceFileError(f'features {tuple(self.features.shape)} do not fit a mean of {size} numbers')
        if not all(torch.isfinite(part).all() for part in (self.mean, self.covariance)):
            raise ReferenceFileError('the moments are not finite')

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, all or nothing.

        Args:
            path: The file, of any scheme.
        """
        from safetensors.torch import save

        tensors = {'mean': self.mean.double(), 'covariance': self.covariance.double()}
        if self.features is not None:
            tensors['features'] = self.features.float()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        facts = dict(num_images=self.num_images, provenance=dict(self.provenance))
        text = json.dumps(facts, sort_keys=True, default=str)
        files.write_bytes(path, save(tensors, metadata={'format': FORMAT, 'facts': text}))


def read_reference(path: str | Path, setting: str = 'reference') -> ReferenceStatistics:
    """Read reference statistics; the same file only once as long as it does not change.

    Args:
        path: Of any scheme: ``.safetensors`` as :meth:`ReferenceStatistics.save` writes it; ``.pkl`` in the published
            layout (``mean``, ``cov``, ``real_feats_np``, ``num_real_feeded``), of which nothing is run; or ``.npz``
            with ``mean``/``mu``, ``cov``/``sigma`` and, optionally, ``features``/``pool_3``.
        setting: Config key that names it, for messages.

    Returns:
        The statistics.

    Raises:
        ValueError: The file is damaged, is of another kind or says too little.
        OSError: There is no such file, or it cannot be downloaded.
    """
    try:
        local = files.fetch(path)
    except StorageError as error:
        raise type(error)(f'{setting}: {error}') from error
    if not local.is_file():
        raise FileNotFoundError(f'{setting}: there is no file of reference statistics {str(path)!r}')
    stat = local.stat()
    try:
        return _read(str(local), str(path), stat.st_mtime_ns, stat.st_size)
    except ReferenceFileError as error:
        raise ReferenceFileError(f'{setting}: {error}') from error.__cause__


@lru_cache(maxsize=4)
def _read(local: str, path: str, modified: int, size: int) -> ReferenceStatistics:
    readers = {SUFFIX: _read_ours, '.pkl': _read_pickle, '.npz': _read_npz}
    suffix = Path(path.partition('#')[0]).suffix
    if suffix not in readers:
        raise ReferenceFileError(f'reference statistics {path!r}: expected a name that ends in {", ".join(readers)}')
    try:
        statistics = readers[suffix](Path(local))
    except ReferenceFileError as error:
        raise ReferenceFileError(f'reference statistics {path!r}: {error}') from error.__cause__
    statistics.sha256 = sha256_of(Path(local))
    return statistics


def _read_ours(path: Path) -> ReferenceStatistics:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ReferenceFileError(f'it is damaged ({error})') from error
    if metadata.get('format') != FORMAT or not {'mean', 'covariance'} <= set(tensors):
        raise ReferenceFileError('it holds no reference statistics; tools/make_reference.py makes them')
    return ReferenceStatistics(**tensors, **json.loads(metadata['facts']))


def _read_pickle(path: Path) -> ReferenceStatistics:
    try:
        with path.open('rb') as stream:
            content = read_array_pickle(stream)
    except UnsafeArrayError as error:
        raise ReferenceFileError(f'as a pickle of arrays {error}') from error
    return _of_arrays(content, content.get('num_real_feeded'))


def _read_npz(path: Path) -> ReferenceStatistics:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            wanted = {name for names in NPZ_NAMES.values() for name in names} | {'num_images'}
            content = {name: archive[name] for name in archive.files if name in wanted}
            found = list(archive.files)
    except Exception as error:  # zip files fail in many ways
        raise ReferenceFileError(f'it is damaged ({type(error).__name__}: {error})') from error
    if 'arr_0' in found and 'mu' not in found and 'mean' not in found:
        raise ReferenceFileError(
            'it holds images, not statistics; make statistics of them with tools/make_reference.py'
        )
    return _of_arrays(content, content.get('num_images'))


def _of_arrays(content: Mapping[str, Any], num_images: Any) -> ReferenceStatistics:
    found = {}
    for name, names in NPZ_NAMES.items():
        array = next((content[other] for other in names if isinstance(content.get(other), np.ndarray)), None)
        if array is not None:
            array = np.array(array, dtype=np.float32 if name == 'features' else np.float64, order='C')
            found[name] = torch.from_numpy(array)
    if not {'mean', 'covariance'} <= set(found):
        raise ReferenceFileError(f'it has {", ".join(map(str, content)) or "nothing"}, but no mean and covariance')
    if found.get('features') is not None and num_images is None:
        num_images = len(found['features'])
    return ReferenceStatistics(**found, num_images=None if num_images is None else int(num_images))
