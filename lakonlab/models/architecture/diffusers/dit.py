"""The class-conditional ImageNet DiT with one shared embedding of time and class, in plain torch.

Architecture: Peebles & Xie, "Scalable diffusion models with transformers", ICCV 2023 (adaLN-Zero). Unlike the original,
whose blocks each embed time and class anew, all blocks share one embedding; weights of the original are remapped when
they are loaded. Parameter names are those of the diffusers library.

``B`` batch, ``C`` channels, ``H W`` image size, ``L`` tokens, ``D`` width, ``P`` patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from lakonlab.models.architecture.embeddings import TableCache, TimestepEmbedder, position_table
from lakonlab.models.architecture.heads import fold_tokens, require_positive
from lakonlab.models.architecture.network import Network, at_least
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import MODULES

TIME_EMBEDDING_WIDTH = 256
ROW_ORDER = 'patch_major'
#: Activation of the MLP -> ``approximate`` of ``torch.nn.functional.gelu``.
ACTIVATIONS = {'gelu': 'none', 'gelu-approximate': 'tanh'}


class PatchEmbed(nn.Module):
    """Cuts the image into patches, embeds each and adds its position."""

    def __init__(self, in_channels: int, width: int, patch_size: int, sample_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.tables = TableCache(partial(position_table, width, sample_size // patch_size))

    def forward(self, images: Tensor) -> Tensor:
        """Shape ``(B, C, H, W)`` to ``(B, L, D)``."""
        features = self.proj(images)
        rows, columns = features.shape[-2:]
        table = self.tables.get(features.device, rows, columns, features.dtype)
        return features.flatten(2).transpose(1, 2) + table


class ClassEmbedder(nn.Module):
    """A table of class embeddings; the last row is of the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Labels ``(B,)`` to embeddings ``(B, D)``."""
        return self.embedding_table(class_labels)


class TimeClassEmbedding(nn.Module):
    """Sum of the time's and the class's embedding."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(TIME_EMBEDDING_WIDTH, width)
        self.class_embedder = ClassEmbedder(num_classes, width)

    def forward(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Times ``(B,)`` and labels ``(B,)`` to ``(B, D)``."""
        return self.timestep_embedder(timestep) + self.class_embedder(class_labels)


class AdaptiveModulation(nn.Module):
    """Shift, scale and gate of both halves of a block, from the conditioning embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, activated_condition: Tensor) -> tuple[Tensor, ...]:
        """Shape ``(B, D)`` to six tensors ``(B, 1, D)``."""
        return self.linear(activated_condition).unsqueeze(1).chunk(6, dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, width: int, num_heads: int, bias: bool, dropout: float, upcast: bool):
        super().__init__()
        self.num_heads = num_heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape ``(B, L, D)`` to the same."""
        batch, length, width = tokens.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (to(tokens).view(heads).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        dtype = query.dtype
        if self.upcast:
            query, key, value = query.float(), key.float(), value.float()
        mixed = F.scaled_dot_product_attention(query, key, value).to(dtype)
        projection, dropout = self.to_out
        return dropout(projection(mixed.transpose(1, 2).reshape(batch, length, width)))


class GELUProjection(nn.Module):
    """A linear layer followed by GELU."""

    def __init__(self, in_features: int, out_features: int, approximate: str):
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` to ``(..., out_features)``."""
        return F.gelu(self.proj(tokens), approximate=self.approximate)


class FeedForward(nn.Module):
    """The MLP of a block."""

    def __init__(self, width: int, inner: int, approximate: str, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(width, inner, approximate), nn.Dropout(dropout), nn.Linear(inner, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape ``(B, L, D)`` to the same."""
        return self.net(tokens)


class DiTBlock(nn.Module):
    """Attention and MLP, each between a modulated layer norm and a gate (adaLN-Zero)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        approximate: str,
        attention_bias: bool,
        dropout: float,
        upcast_attention: bool,
        norm_eps: float,
        norm_elementwise_affine: bool,
    ):
        super().__init__()
        self.norm1 = AdaptiveModulation(width)
        self.attn1 = SelfAttention(width, num_heads, attention_bias, dropout, upcast_attention)
        self.norm3 = nn.LayerNorm(width, norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(width, int(mlp_ratio * width), approximate, dropout)

    def forward(self, tokens: Tensor, activated_condition: Tensor) -> Tensor:
        """Tokens ``(B, L, D)`` and SiLU of the conditioning embedding ``(B, D)`` to tokens."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.norm1(activated_condition)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        tokens = tokens + gate_attn * self.attn1(modulate(normed, shift_attn, scale_attn))
        return tokens + gate_mlp * self.ff(modulate(self.norm3(tokens), shift_mlp, scale_mlp))


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``normed * (1 + scale) + shift``."""
    return torch.addcmul(shift, normed, 1 + scale)


class DiTBackbone(Network):
    """Everything of a DiT but its output layer: what teachers and students share.

    A subclass adds its output layers, calls :meth:`prepare` at the end of its constructor, and is called as
    ``network(hidden_states, timestep, class_labels)``.

    Args:
        num_attention_heads: Number of attention heads.
        attention_head_dim: Width of a head; ``D`` is the product of both.
        in_channels: ``C`` of the input.
        out_channels: ``C`` of the prediction; None for ``in_channels``.
        num_layers: Number of blocks.
        dropout: Dropout probability after attention and in the MLP, drawn for each sample apart.
        attention_bias: Whether query, key and value have a bias.
        sample_size: Height and width of the images the network is trained at; positions of other sizes are scaled.
        patch_size: ``P``; height and width of an image are multiples of it.
        activation_fn: ``'gelu-approximate'`` or ``'gelu'``.
        mlp_ratio: Hidden width of the MLPs, in units of ``D``.
        num_embeds_ada_norm: Number of classes; the label of this value is the null class.
        class_dropout_prob: Probability of replacing a label by the null class in training.
        upcast_attention: Whether to compute attention in float32.
        norm_type: Only ``'ada_norm_zero'``, for files of the published configuration.
        norm_num_groups: Without effect, for files of the published configuration.
        norm_elementwise_affine: Whether the layer norms before the MLPs have weights.
        norm_eps: Epsilon of these layer norms.
        **network_options: See :class:`~lakonlab.models.architecture.network.Network`.

    Raises:
        ValueError: An argument is out of range.
    """

    ignored_keys = ('pos_embed.pos_embed',)  # the published writer saves the position table

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = 'gelu-approximate',
        mlp_ratio: float = 4.0,
        num_embeds_ada_norm: int = 1000,
        class_dropout_prob: float = 0.0,
        upcast_attention: bool = False,
        norm_type: str = 'ada_norm_zero',
        norm_num_groups: int = 32,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        **network_options,
    ):
        super().__init__(**network_options)
        require_positive(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            num_layers=num_layers,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
        )
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f'activation_fn={activation_fn!r}: expected one of {", ".join(ACTIVATIONS)}')
        if norm_type != 'ada_norm_zero':
            raise ValueError(f"norm_type={norm_type!r}: the DiT has only 'ada_norm_zero'")
        if sample_size % patch_size:
            raise ValueError(f'sample_size={sample_size} is no multiple of patch_size={patch_size}')
        width = num_attention_heads * attention_head_dim
        if width % 4:
            raise ValueError(
                f'num_attention_heads * attention_head_dim = {width}: the position table needs a multiple of 4'
            )
        self.width = width
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch_size = patch_size
        self.null_label = num_embeds_ada_norm
        self.class_dropout_prob = class_dropout_prob

        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size)
        self.emb = TimeClassEmbedding(num_embeds_ada_norm, width)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                width,
                num_attention_heads,
                mlp_ratio,
                ACTIVATIONS[activation_fn],
                attention_bias,
                dropout,
                upcast_attention,
                norm_eps,
                norm_elementwise_affine,
            )
            for _ in range(num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as in the paper: Xavier uniform layers, and zeros where adaLN-Zero asks for the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.width, -1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.emb.timestep_embedder.linear_2.weight, std=0.02)
        for layer in (*(block.norm1.linear for block in self.transformer_blocks), self.proj_out_1):
            nn.init.zeros_(layer.weight)
        self.init_output_layers()

    def init_output_layers(self) -> None:
        """Initialise the output layers for training from scratch; every subclass defines it."""
        raise NotImplementedError(f'{type(self).__name__} does not define init_output_layers')

    def remap_pretrained(self, state: dict[str, Tensor], source: RandomSource | None = None) -> dict[str, Tensor]:
        """See the base class: shared embedding of original DiT files, means of those that also predict a variance."""
        original = any('.norm1.emb.' in name or name.startswith('final_layer.') for name in state)
        state = share_embedding(rename_original(state))
        own = getattr(self, 'proj_out_2', None)
        if not original and own is not None and own.weight.shape == state.get('proj_out_2.weight', own.weight).shape:
            return state  # weights of this very architecture
        return keep_prediction_rows(state, self.patch_size, self.out_channels)

    def example_inputs(self, batch_size: int, latent_size: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of a forward pass on the device and in the dtype of the weights, for planning.

        Args:
            batch_size: ``B``.
            latent_size: ``(C, H, W)``.
        """
        weight = self.proj_out_1.weight
        return {
            'hidden_states': torch.zeros((batch_size, *latent_size), dtype=weight.dtype, device=weight.device),
            'timestep': torch.ones(batch_size, device=weight.device),
            'class_labels': torch.zeros(batch_size, dtype=torch.long, device=weight.device),
        }

    def encode(
        self, images: Tensor, timestep: Tensor, class_labels: Tensor, source: RandomSource | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Run everything before the output layers.

        Args:
            images: Shape ``(B, C, H, W)``.
            timestep: Shape ``(B,)``, in the unit the network is trained with.
            class_labels: Integers, shape ``(B,)``.
            source: Random source of ``class_dropout`` and ``network_dropout``; None for torch's global state.

        Returns:
            Modulated tokens ``(B, L, D)``, the conditioning embedding ``(B, D)``, the number of token rows and columns.

        Raises:
            ValueError: The image size is no multiple of the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f'image size {height} x {width} is no multiple of patch_size={self.patch_size}')
        if self.training and self.class_dropout_prob > 0:
            draw = self.draw(source, 'class_dropout', class_labels.shape, device=class_labels.device)
            class_labels = class_labels.masked_fill(draw < self.class_dropout_prob, self.null_label)
        tokens = self.pos_embed(images.to(self.pos_embed.proj.weight.dtype))
        condition = self.emb(timestep, class_labels)
        activated = F.silu(condition)
        with self.dropping(self, images, source):
            for block in self.transformer_blocks:
                tokens = self.run_block(block, tokens, activated)
        shift, scale = self.proj_out_1(activated).unsqueeze(1).chunk(2, dim=-1)
        tokens = modulate(F.layer_norm(tokens, (self.width,), eps=1e-6), shift, scale)
        return tokens, condition, (height // self.patch_size, width // self.patch_size)


@MODULES.register_module()
class DiTTransformer2DModelMod(DiTBackbone):
    """DiT that predicts one image, such as a velocity: the teacher of ImageNet and of the digits.

    Args:
        **backbone: See :class:`DiTBackbone`.
    """

    output_modules = ('proj_out_1', 'proj_out_2')

    def __init__(self, **backbone):
        super().__init__(**backbone)
        self.proj_out_2 = nn.Linear(self.width, self.patch_size * self.patch_size * self.out_channels)
        self.prepare()

    def init_output_layers(self) -> None:
        """Start from a prediction of zero."""
        nn.init.zeros_(self.proj_out_2.weight)
        nn.init.zeros_(self.proj_out_2.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, source: RandomSource | None = None
    ) -> Tensor:
        """Predict an image.

        Args:
            hidden_states: Shape ``(B, C, H, W)``.
            timestep: Shape ``(B,)``, in the unit the network is trained with.
            class_labels: Integers in ``[0, num_embeds_ada_norm]``, shape ``(B,)``; the largest is the null class.
            source: Random source of ``class_dropout`` and ``network_dropout``; None for torch's global state.

        Returns:
            Shape ``(B, C, H, W)``.
        """
        with self.autocast(hidden_states.device):
            tokens, _, grid = self.encode(hidden_states, timestep, class_labels, source)
            rows = self.proj_out_2(tokens.to(self.proj_out_2.weight.dtype))
        return at_least(fold_tokens(rows, grid, self.patch_size, 1, ROW_ORDER).squeeze(1), hidden_states.dtype)


#: Start of a name in the original repository of DiT (also of REPA) -> start of our name.
ORIGINAL_NAMES = {
    'x_embedder.proj.': 'pos_embed.proj.',
    't_embedder.mlp.0.': 'emb.timestep_embedder.linear_1.',
    't_embedder.mlp.2.': 'emb.timestep_embedder.linear_2.',
    'y_embedder.': 'emb.class_embedder.',
    'final_layer.adaLN_modulation.1.': 'proj_out_1.',
    'final_layer.linear.': 'proj_out_2.',
}
#: Part of the name of a block's layer there -> its part here; query, key and value are one layer there.
ORIGINAL_BLOCK_NAMES = {
    'adaLN_modulation.1.': 'norm1.linear.',
    'attn.proj.': 'attn1.to_out.0.',
    'mlp.fc1.': 'ff.net.0.proj.',
    'mlp.fc2.': 'ff.net.2.',
}
#: What those files hold beyond the network: fixed positions, and REPA's heads for features, which only train it.
ORIGINAL_EXTRAS = ('pos_embed', 'projectors.')


def rename_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remap the names of the original repository of DiT, which REPA follows; other files are returned unchanged.

    Names say nothing of what a network predicts. A teacher here predicts ``noise - data`` at times that grow with the
    noise, as REPA's do. SiT's checkpoints have the same names, but time and sign are the other way round, and the first
    DiT's predict noise: they are networks to start from, not teachers.
    """
    if not any(name.startswith('final_layer.') for name in state):
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(ORIGINAL_EXTRAS):
            continue
        if not name.startswith('blocks.'):
            start = next((start for start in ORIGINAL_NAMES if name.startswith(start)), '')
            renamed[ORIGINAL_NAMES.get(start, '') + name[len(start) :]] = tensor
            continue
        _, index, part = name.split('.', 2)
        block = f'transformer_blocks.{index}.'
        if part.startswith('attn.qkv.'):
            for own, rows in zip('qkv', tensor.chunk(3)):
                renamed[f'{block}attn1.to_{own}.{part.removeprefix("attn.qkv.")}'] = rows
            continue
        start = next((start for start in ORIGINAL_BLOCK_NAMES if part.startswith(start)), '')
        renamed[block + ORIGINAL_BLOCK_NAMES.get(start, '') + part[len(start) :]] = tensor
    return renamed


def share_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remap an original DiT, whose blocks each have a time and class embedding, to one shared embedding.

    The first block's embedding is kept, as published; the copies of the others are dropped. Files with a shared
    embedding are returned unchanged.
    """
    first = 'transformer_blocks.0.norm1.emb.'
    if not any(name.startswith(first) for name in state):
        return dict(state)
    remapped = {}
    for name, tensor in state.items():
        if name.startswith(first):
            remapped['emb.' + name[len(first) :]] = tensor
        elif '.norm1.emb.' not in name:
            remapped[name] = tensor
    return remapped


def keep_prediction_rows(state: dict[str, Tensor], patch_size: int, channels: int) -> dict[str, Tensor]:
    """Drop what an output layer predicts beside the image, for every patch position.

    Files of the original DiT also predict a variance per channel (``2 C`` rows instead of ``C``); those of a mixture
    with one component also its weight (``C + 1`` rows).
    """
    area = patch_size * patch_size
    state = dict(state)
    for name in ('proj_out_2.weight', 'proj_out_2.bias'):
        if name in state and state[name].shape[0] in (area * 2 * channels, area * (channels + 1)):
            rows = state[name]
            state[name] = rows.reshape(area, -1, *rows.shape[1:])[:, :channels].reshape(-1, *rows.shape[1:])
    return state
