"""What every network of this package has in common: the options of a config that are not about its architecture.

A network builds its layers, then calls :meth:`Network.prepare`, which loads weights, sets precision, freezes and
compiles, in this order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lakonlab.models.architecture.blocks import compile_blocks
from lakonlab.models.architecture.freezing import autocast, freeze, parse_dtype
from lakonlab.models.architecture.loading import load_pretrained, load_strictly
from lakonlab.models.architecture.row_dropout import DRAW, RowCheckpoint, RowKeys, drop_by_row, keys_of
from lakonlab.ops.random_source import RandomSource, TorchSource


def at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raise the precision of a result to ``dtype``; never lower it, an output layer may have computed in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


class Network(nn.Module):
    """A network that a config can load, freeze, cast, checkpoint and compile.

    Subclasses build their layers in ``__init__`` and end it with ``self.prepare()``.

    Args:
        freeze: Whether to freeze all parameters but those of ``freeze_exclude``.
        freeze_exclude: What stays trainable, see :func:`~lakonlab.models.architecture.freezing.freeze`.
        pretrained: Weights to start from, see :func:`~lakonlab.models.architecture.loading.load_pretrained`.
        torch_dtype: Dtype of the weights.
        autocast_dtype: Lower precision to compute in with float32 weights; None for none.
        freeze_exclude_fp32: Whether the parts of a frozen network that stay trainable have float32 weights.
        freeze_exclude_autocast_dtype: Precision these parts compute in.
        checkpointing: Whether to recompute activations in the backward pass instead of keeping them.
        compile_forward: Whether to call the network through ``torch.compile``, as one graph.
        compile_blocks: Whether to call each of its repeated blocks through ``torch.compile`` instead, which compiles
            one of them for all, and keeps gradient checkpointing outside of the compiled code.
        compile_kwargs: Arguments of ``torch.compile``. By default it compiles for each size of image and batch anew;
            with many of them, or with several roles of one base, raise ``recompile_limit``.

    Raises:
        ValueError: Options that contradict each other.
    """

    #: Names that a weights file may have though the network does not.
    ignored_keys: tuple[str, ...] = ()
    #: Names that a weights file may lack.
    allowed_missing: tuple[str, ...] = ()
    #: Modules that make the output: trained in float32, they hand on float32.
    output_modules: tuple[str, ...] = ()
    #: What the masks of its dropout layers are drawn from; None if it has none.
    dropout_keys: RowKeys | None = None

    def __init__(
        self,
        *,
        freeze: bool = False,
        freeze_exclude: Sequence[str] = (),
        pretrained: str | None = None,
        torch_dtype: str = 'float32',
        autocast_dtype: str | None = None,
        freeze_exclude_fp32: bool = True,
        freeze_exclude_autocast_dtype: str | None = 'float32',
        checkpointing: bool = True,
        compile_forward: bool = False,
        compile_blocks: bool = False,
        compile_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if freeze_exclude and not freeze:
            raise ValueError(f'freeze_exclude={list(freeze_exclude)} has no effect without freeze=True')
        if autocast_dtype is not None and parse_dtype(torch_dtype, 'torch_dtype') != torch.float32:
            raise ValueError(
                f"autocast_dtype={autocast_dtype!r} needs torch_dtype='float32', found {torch_dtype!r}: "
                'autocast computes in lower precision with float32 weights'
            )
        if compile_forward and compile_blocks:
            raise ValueError(
                'compile_forward=True and compile_blocks=True: expected one of them; compile_blocks compiles faster, '
                'compile_forward makes one graph of the network'
            )
        self.freeze = freeze
        self.freeze_exclude = tuple(freeze_exclude)
        self.freeze_exclude_fp32 = freeze_exclude_fp32
        self.freeze_exclude_autocast_dtype = freeze_exclude_autocast_dtype
        self.pretrained = pretrained
        self.torch_dtype = parse_dtype(torch_dtype, 'torch_dtype')
        self.autocast_dtype = None if autocast_dtype is None else parse_dtype(autocast_dtype, 'autocast_dtype')
        self.checkpointing = checkpointing
        self.compile_forward, self.compile_blocks = compile_forward, compile_blocks
        # one graph per image size: the position table of a size is a constant of its graph
        self.compile_kwargs = {'dynamic': False, **(compile_kwargs or {})}

    def init_weights(self) -> None:
        """Draw the weights of a network that is trained from scratch."""

    def remap_pretrained(self, state: dict[str, Tensor], source=None) -> dict[str, Tensor]:
        """Turn the tensors of a weights file into those of this network, without changing the network.

        Args:
            state: Name -> tensor as the file has them.
            source: Random source of what the file does not determine; None for torch's global state.

        Returns:
            Name -> tensor as this network names and shapes them.
        """
        return state

    def load_published(self, state: Mapping[str, Tensor], where: str) -> None:
        """Put tensors into place, refusing anything that does not fit.

        Args:
            state: Published name -> tensor, after :meth:`remap_pretrained`.
            where: What the tensors come from, for messages.

        Raises:
            PretrainedError: Names are missing, unexpected, or have another shape.
        """
        load_strictly(self, state, where, self.ignored_keys, self.allowed_missing)

    def prepare(self) -> None:
        """Initialise or load the weights, set the precision, freeze, draw dropout by row, compile."""
        self.init_weights()
        if self.pretrained is not None:
            load_pretrained(self, self.pretrained)
        self.to(self.torch_dtype)
        if self.freeze:
            freeze(
                self,
                self.freeze_exclude,
                self.freeze_exclude_fp32,
                self.freeze_exclude_autocast_dtype,
                self.is_output,
            )
        self.dropout_keys = drop_by_row(self)
        self.compile_as_configured(self)

    @property
    def is_compiled(self) -> bool:
        """Whether the network or its blocks are called through ``torch.compile``."""
        return self.compile_forward or self.compile_blocks

    def compile_as_configured(self, module: nn.Module) -> None:
        """Compile a module, or its blocks, or nothing, as ``compile_forward`` and ``compile_blocks`` say."""
        if self.compile_forward:
            # sources compute with numpy, which must not become part of a graph
            self.draw = torch.compiler.disable(self.draw)
            module.compile(**self.compile_kwargs)
        elif self.compile_blocks:
            compile_blocks(module, **self.compile_kwargs)

    def is_output(self, name: str) -> bool:
        """Whether a module makes the output or is part of one that does."""
        return any(name == output or name.startswith(f'{output}.') for output in self.output_modules)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, trainable parts of a frozen network excepted."""
        return self.torch_dtype

    def autocast(self, device: torch.device):
        """Context in which the network computes."""
        return autocast(device.type, self.autocast_dtype)

    def dropping(
        self, module: nn.Module, batch: Tensor, source: RandomSource | None
    ) -> contextlib.AbstractContextManager[None]:
        """Context of a forward pass, in which dropout is drawn row by row.

        Args:
            module: Nothing is drawn while it is in evaluation mode.
            batch: What the network is given, (B, *).
            source: Source of the draw ``network_dropout`` (B,); None for torch's global state.
        """
        if self.dropout_keys is None or not module.training:
            return contextlib.nullcontext()
        keys = keys_of(self.draw(source, DRAW, (len(batch),), torch.float64))
        return self.dropout_keys.using(keys.to(batch.device, non_blocking=True))

    @staticmethod
    def draw(
        source: RandomSource | None,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = 'cpu',
    ) -> Tensor:
        """Draw from U[0, 1); a source of None is torch's global state."""
        return (source or TorchSource()).uniform(name, shape, dtype, device)

    def run_block(self, block: nn.Module, *args: Tensor) -> Tensor:
        """Call a block, under gradient checkpointing where that is on."""
        if self.checkpointing and torch.is_grad_enabled():
            if self.dropout_keys is not None:
                return RowCheckpoint(self.dropout_keys)(block, *args)
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
