"""The same weights in every process before the first step."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.state import training_state
from lakonlab.ranks import Ranks

logger = logging.getLogger('lakonlab.parallel')

NUM_SAMPLED = 4096


def synchronise(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the main one's trained weights, and make sure that the frozen ones agree.

    Processes draw the same initial weights and read the same files, so what usually happens is a comparison. Trained
    tensors that differ are replaced, which is logged; frozen ones that differ come from different files.

    Args:
        model: The whole model, on the CPU.
        ranks: The processes.

    Raises:
        RuntimeError: Frozen weights differ, or the processes hold different tensors.
    """
    if ranks.world_size == 1:
        return
    trained = training_state(model)
    seen = {id(tensor) for tensor in trained.values()}
    frozen: dict[str, Tensor] = {}
    for name, tensor in named_state(model):
        if id(tensor) not in seen:  # roles share the weights of one base
            seen.add(id(tensor))
            frozen[name] = tensor
    sums = {name: checksum(tensor) for name, tensor in trained.items()}
    sums |= {name: checksum(tensor, NUM_SAMPLED) for name, tensor in frozen.items()}
    tensors = {**trained, **frozen}
    kinds = {name: (name in trained, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
    main_sums, main_kinds = ranks.broadcast((sums, kinds))
    own = _differing(sums, main_sums), _differing(kinds, main_kinds)
    differing, unlike = (sorted({name for names in part for name in names}) for part in zip(*ranks.all_gather(own)))
    if unlike:
        raise RuntimeError(
            f'{len(unlike)} tensors are not there in all processes, or not trained, or of another shape or dtype, '
            f'among them {", ".join(unlike[:4])}: the processes do not build the same model'
        )
    foreign = [name for name in differing if name in frozen]
    if foreign:
        raise RuntimeError(
            f'{len(foreign)} frozen tensors differ between processes, among them {", ".join(foreign[:4])}: the nodes '
            'read different files. Check `pretrained` and model_name_or_path on every node, or name a revision.'
        )
    if differing:
        logger.warning('%d initial tensors differed between processes; those of the main one are used', len(differing))
        with torch.no_grad():
            for name in differing:
                dist.broadcast(trained[name].data, src=0, group=ranks.group)


def checksum(tensor: Tensor, num_sampled: int | None = None) -> int:
    """A number that changes with the bits of a tensor.

    Args:
        tensor: Any tensor in memory.
        num_sampled: Look at about so many elements, evenly spaced, instead of all.
    """
    flat = tensor.detach().reshape(-1)
    if num_sampled is not None and len(flat) > num_sampled:
        flat = flat[:: len(flat) // num_sampled]
    return zlib.crc32(memoryview(flat.contiguous().view(torch.uint8).numpy()))


def _differing(own: Mapping[str, Any], main: Mapping[str, Any]) -> list[str]:
    return [name for name in {*own, *main} if own.get(name) != main.get(name)]
