"""Any transformer of the diffusers library as teacher or student, by configuration.

The transformer is unchanged but for its last layer, which a policy head replaces in a student (see
:mod:`lakonlab.models.architecture.packed_head`). It must end in ``norm_out(hidden, condition)`` and
``proj_out(hidden)``, as FLUX, Qwen-Image, Stable Diffusion 3 and many others do.

``B`` batch, ``C`` channels, ``H W`` size of the latents, ``P`` patch size, ``L`` image tokens.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lakonlab.models.architecture.diffusers.build_transformer import build_transformer
from lakonlab.models.architecture.diffusers.configured_weights import fill, load_adapter, load_configured
from lakonlab.models.architecture.diffusers.positions import Layout, check_positions, make_positions
from lakonlab.models.architecture.diffusers.same_base import require_same_base
from lakonlab.models.architecture.freezing import compute_like, freeze, select
from lakonlab.models.architecture.heads import ROW_ORDERS, cut_tokens, fold_tokens, require_positive
from lakonlab.models.architecture.loading import load_strictly, locate_weights
from lakonlab.models.architecture.lora import add_lora, copy_adapter
from lakonlab.models.architecture.network import Network, at_least
from lakonlab.models.architecture.packed_head import NORM, OUTPUT, build_head, hand_on_condition
from lakonlab.models.architecture.roles import (
    EMA,
    STUDENT,
    TEACHER,
    Backbone,
    average_of,
    callable_places,
    outermost_trained,
    own_state,
    without_adapters,
)
from lakonlab.models.architecture.row_dropout import RowCheckpoint, drop_by_row, row_keys
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import MODULES

logger = logging.getLogger(__name__)

LAYOUTS = ('tokens', 'images')


@MODULES.register_module()
class DiffusersTransformer(Network):
    """A transformer of the diffusers library, optionally with a policy head and with LoRA.

    Args:
        transformer: ``dict(type=<name of the class in diffusers>, ...)`` with the arguments of its constructor.
        head: ``dict(type='GMFlow', num_gaussians=...)`` or ``dict(type='DX', n_grid=...)``, see
            :data:`~lakonlab.models.architecture.packed_head.HEADS`; None for the transformer's own output.
        latents: What the transformer takes and gives: ``'tokens'``, patches (B, L, C P P) that are cut here, or
            ``'images'``, (B, C, H, W), which it cuts itself.
        patch_size: ``P``, pixels per side of a token.
        row_order: Order of the rows of the output layer, see :data:`~lakonlab.models.architecture.heads.ROW_ORDERS`;
            None for ``'channel_major'`` with tokens and ``'patch_major'`` with images. Tokens are cut in that order.
        timestep_scale: What the time is multiplied with before it is given to the transformer.
        positions: Position arguments, see :mod:`lakonlab.models.architecture.diffusers.positions`.
        text: Name of the condition that holds the text tokens (B, T, D).
        text_mask: Name of the argument with the mask of real text tokens, (B, T), nonzero where real; None if the
            transformer takes none.
        attend_to_padding: Let tokens attend to padded text up to the longest prompt of the batch, as published for
            Qwen-Image; by default padding is masked, so that no sample depends on its neighbours.
        use_lora: Train adapters in the layers of ``lora_target_modules``.
        lora_target_modules: See :func:`~lakonlab.models.architecture.lora.add_lora`.
        lora_rank: Rank of the adapters.
        lora_alpha: Their products are multiplied by ``lora_alpha / lora_rank``; None for ``lora_rank``, as in exports.
        lora_dropout: Probability of dropping their inputs in training, drawn for each sample apart, see
            :mod:`~lakonlab.models.architecture.row_dropout`.
        pretrained_adapter: Export of a trained student: layers that replace the pretrained ones, and adapters, which
            are merged into the weights, or with ``use_lora`` become the student's adapters.
        pretrained_lora: Adapters of a style or of a distilled teacher, merged into the weights; one or a list.
        pretrained_lora_scale: Factor of each.
        lora_converter: Class of diffusers that knows the layouts of published adapters of this architecture, such as
            ``'FluxLoraLoaderMixin'``.
        share_with: The teacher's network, whose frozen tensors this student uses (``tie_teacher=True``); never in a
            config.
        **network_options: See :class:`~lakonlab.models.architecture.network.Network`.

    Raises:
        ValueError: An argument is unknown, out of range, or contradicts another.
        PretrainedError: Weights cannot be read or do not fit.
    """

    def __init__(
        self,
        transformer: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        latents: str = 'tokens',
        patch_size: int = 1,
        row_order: str | None = None,
        timestep_scale: float = 1.0,
        positions: Mapping[str, Mapping[str, Any]] | None = None,
        text: str = 'encoder_hidden_states',
        text_mask: str | None = None,
        attend_to_padding: bool = False,
        use_lora: bool = False,
        lora_target_modules: Sequence[str] = (),
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        pretrained_adapter: str | None = None,
        pretrained_lora: str | Sequence[str] | None = None,
        pretrained_lora_scale: float | Sequence[float] = 1.0,
        lora_converter: str | None = None,
        share_with: DiffusersTransformer | None = None,
        **network_options,
    ):
        super().__init__(**network_options)
        if transformer is None:
            raise ValueError('transformer: missing; expected dict(type=<name of a class of diffusers>, ...)')
        require_positive(patch_size=patch_size)
        if latents not in LAYOUTS:
            raise ValueError(f'latents={latents!r}: expected one of {", ".join(LAYOUTS)}')
        self.row_order = row_order or {'tokens': 'channel_major', 'images': 'patch_major'}[latents]
        if self.row_order not in ROW_ORDERS:
            raise ValueError(f'row_order={row_order!r}: expected one of {", ".join(ROW_ORDERS)}')
        self.arguments = dict(transformer)
        self.latents, self.patch_size, self.timestep_scale = latents, patch_size, timestep_scale
        self.positions = dict(positions or {})
        check_positions(self.positions)
        self.text, self.text_mask, self.attend_to_padding = text, text_mask, attend_to_padding
        self.pretrained_adapter = pretrained_adapter
        self.pretrained_lora = [pretrained_lora] if isinstance(pretrained_lora, str) else list(pretrained_lora or ())
        scales = pretrained_lora_scale
        scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * len(self.pretrained_lora)
        if len(scales) != len(self.pretrained_lora):
            raise ValueError(
                f'pretrained_lora_scale has {len(scales)} entries, pretrained_lora {len(self.pretrained_lora)}'
            )
        self.pretrained_lora_scale = scales
        self.lora_converter = lora_converter
        self.lora = {
            'target_modules': list(lora_target_modules),
            'rank': lora_rank,
            'alpha': lora_alpha,
            'dropout': lora_dropout,
        }
        self.uses_lora = use_lora
        self.role = STUDENT
        if share_with is None:
            self._build_own(head)
        else:
            self._build_on(share_with, head)
        self.dropout_keys = drop_by_row(self.backbone.tree, self._published_name)
        if share_with is None or not share_with.is_compiled:
            self.compile_as_configured(self.backbone.tree)
        if share_with is not None:
            share_with.checkpointing = self.checkpointing  # only the student has a backward pass
        elif self.checkpointing:
            self.checkpointing = True
        if self.freeze:
            self._check_trained()

    # -- building

    def _build_own(self, head: Mapping[str, Any] | None) -> None:
        from_file = self.pretrained is not None and torch.get_default_device().type != 'meta'
        # tables that are no parameters are in no file: they are computed here, whatever is loaded
        with init_empty_weights(include_buffers=False) if from_file else contextlib.nullcontext():
            tree = build_transformer(self.arguments)
        self.backbone = Backbone(tree)
        self.transformer = tree
        self._set_head(tree, head)
        layer = self._new_output_layer()
        if layer is not None:
            setattr(tree, OUTPUT, layer)
            if self.head.needs_condition:
                hand_on_condition(tree.get_submodule(NORM))
            self.backbone.set_out_channels(self._packed_channels(layer))
        adapter = load_configured(self)
        if self.uses_lora:
            add_lora(tree, **self.lora, untouched=() if layer is None else (OUTPUT,))
            self.backbone.find_adapted()
            load_adapter(self, adapter, dict(self.role_state()))
        self.to(self.torch_dtype)
        if self.freeze:
            self._freeze()

    def _build_on(self, teacher: DiffusersTransformer, head: Mapping[str, Any] | None) -> None:
        """Become a student on the teacher's transformer, which stays the teacher's for everything frozen."""
        require_same_base(self, teacher)
        self.backbone = teacher.backbone
        tree = self.backbone.tree
        self._set_head(tree, head)
        layer = self._new_output_layer()
        teachers = {name: tensor.detach() for name, tensor in teacher.role_state().items() if name.startswith(OUTPUT)}
        teacher.hand_over()
        self.transformer = tree
        if layer is not None:
            self.backbone.give(OUTPUT, STUDENT, layer)
            self.backbone.set_out_channels(self._packed_channels(layer))
        if self.uses_lora:
            add_lora(tree, **self.lora, untouched=() if layer is None else (OUTPUT,))
        needed = [NORM] if layer is not None and self.head.needs_condition else []
        for path in (*needed, *self._trained_places()):
            if not self.backbone.in_switch(path):
                own = copy.deepcopy(tree.get_submodule(path))
                tree.set_submodule(path, without_adapters(tree.get_submodule(path)))
                self.backbone.give(path, STUDENT, own)
        self.backbone.find_adapted()
        if needed:
            hand_on_condition(self.backbone.switches[NORM].get_submodule(STUDENT))
        if layer is not None:
            own = self.role_state()
            if not any(tensor.is_meta for tensor in teachers.values()):
                fill(own, self.head.from_output_layer(teachers, own, OUTPUT))
        shared = {id(tensor) for tensor in teacher.role_state().values()}
        own = {name: tensor for name, tensor in self.role_state().items() if id(tensor) not in shared}
        if self.pretrained_adapter is not None:
            locate_weights(self.pretrained_adapter, 'pretrained_adapter')
            if not self._is_meta():
                from lakonlab.models.architecture.adapters import read_adapter

                load_adapter(self, read_adapter(self.pretrained_adapter), own)
        if not self.freeze_exclude_fp32:
            for tensor in own.values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(self.torch_dtype)
        self._freeze()

    def hand_over(self) -> None:
        """Become the teacher of a student that takes over the transformer."""
        self.role = TEACHER
        self.backbone.tree.requires_grad_(False)
        del self.transformer

    def _set_head(self, tree: nn.Module, head: Mapping[str, Any] | None) -> None:
        output = getattr(tree, OUTPUT, None)
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f'{type(tree).__name__} has no linear output layer {OUTPUT!r} (found {type(output).__name__}): only '
                f'transformers that end in {NORM} and {OUTPUT} can become students'
            )
        area = self.patch_size * self.patch_size
        if output.out_features % area:
            raise ValueError(
                f'patch_size={self.patch_size}: the {output.out_features} outputs per token of {type(tree).__name__} '
                f'are no multiple of {area}'
            )
        self.channels = output.out_features // area
        self.head = build_head(head, self.channels, self.patch_size, self.row_order)
        if self.head.needs_condition and not hasattr(tree, NORM):
            raise ValueError(
                f'{type(tree).__name__} has no {NORM!r}, which would know the condition: set constant_logstd'
            )

    def _new_output_layer(self) -> nn.Module | None:
        """The policy head's layer; on the default device, so that it has values when weights are loaded into it."""
        tree = self.backbone.tree
        norm = getattr(tree, NORM, None)
        linear = getattr(norm, 'linear', None)
        condition_features = linear.in_features if isinstance(linear, nn.Linear) else tree.proj_out.in_features
        layer = self.head.layer(tree.get_submodule(OUTPUT), condition_features)
        if hasattr(layer, 'init_weights'):
            layer.init_weights()
        return layer

    def _packed_channels(self, layer: nn.Module) -> int:
        """Channels of an image of all rows of the output layer."""
        if isinstance(layer, nn.Linear):
            return layer.out_features // (self.patch_size * self.patch_size)
        return (layer.means.out_features + layer.logweights.out_features) // (self.patch_size * self.patch_size) + 1

    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.backbone.tree.parameters())

    # -- weights

    def remap_pretrained(self, state: dict[str, Tensor], source: RandomSource | None = None) -> dict[str, Tensor]:
        """See the base class; a teacher's output layer becomes the head."""
        return self.head.from_output_layer(state, self.role_state(), OUTPUT, source)

    def load_published(self, state: Mapping[str, Tensor], where: str) -> None:
        """See the base class; the tensors become the weights, without a copy."""
        internal = self._internal_names()
        renamed = {internal.get(name, name): tensor for name, tensor in state.items()}
        load_strictly(
            self.transformer,
            renamed,
            where,
            self.ignored_keys,
            self.allowed_missing,
            assign=True,
            name_of=lambda name: self._published_name(name) or name,
        )

    def _published_name(self, name: str) -> str | None:
        """Name of a tensor or module of the tree in published files; None for another role's."""
        seen = self.backbone.name_for(self.role, name)
        if seen is None:
            return None
        if seen == OUTPUT or seen.startswith(f'{OUTPUT}.'):
            part = self.head.published_part(seen[len(OUTPUT) + 1 :])
            return None if part is None else OUTPUT + part
        return seen

    def _internal_names(self) -> dict[str, str]:
        names = (name for name, _ in own_state(self.backbone.tree))
        return {seen: name for name in names if (seen := self._published_name(name)) is not None}

    def role_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of this role by their published names, as they are; shared ones too."""
        state = own_state(self.backbone.tree)
        return {seen: tensor for name, tensor in state if (seen := self._published_name(name)) is not None}

    # -- what is trained

    def is_output(self, name: str) -> bool:
        """See the base class; adapters hand on float32 too, which the layer they belong to rounds."""
        return name == NORM or name.startswith((f'{NORM}.', OUTPUT)) or '.lora_' in name

    def _freeze(self) -> None:
        freeze(
            self.transformer,
            self.freeze_exclude,
            self.freeze_exclude_fp32,
            self.freeze_exclude_autocast_dtype,
            self.is_output,
            self._published_name,
        )

    def _trained_places(self) -> list[str]:
        """Outermost modules of the tree, adapters excepted, that the config wants trained and that are not the head."""
        roots, loose = select(self.transformer, self.freeze_exclude, self._published_name)
        places = [place for root in roots for place in callable_places(self.transformer, root)]
        places += [name.rpartition('.')[0] for name in loose]
        return [path for path in places if '.lora_' not in path and not self.backbone.in_switch(path)]

    def as_average(self) -> DiffusersTransformer:
        """A network that shares everything frozen, and holds a copy of everything trained, as the moving average."""
        backbone, tree = self.backbone, self.backbone.tree
        trained = {name for name, parameter in tree.named_parameters() if parameter.requires_grad}
        places = {self._place_of(name) for name in trained if '.lora_' not in name}
        for path in sorted(place for place in places if not any(place.startswith(f'{other}.') for other in places)):
            switch = backbone.switches.get(path)
            own = tree.get_submodule(path) if switch is None else switch.get_submodule(STUDENT)
            backbone.give(path, EMA, average_of(own))
        for switch in backbone.switches.values():
            if not hasattr(switch, EMA):  # nothing to average, such as dropout
                switch.add_module(EMA, average_of(switch.get_submodule(STUDENT)))
        if self.uses_lora:
            paths = {name.rpartition('.lora_')[0] for name in trained if '.lora_' in name}
            paths = sorted(path for path in paths if not backbone.in_switch(path))
            if paths:
                add_lora(tree, paths, self.lora['rank'], self.lora['alpha'], adapter=EMA)
            layers = [tree.get_submodule(path) for path in paths]
            copy_adapter(layers, 'default', EMA)
            for layer in layers:
                for matrices in (layer.lora_A, layer.lora_B):
                    matrices[EMA].requires_grad_(False)
                    compute_like(matrices[EMA], matrices['default'])
            backbone.find_adapted()
            backbone.activate_adapters()
        average = copy.copy(self)
        average.__dict__['_modules'] = {}
        average.role = EMA
        return average

    def _place_of(self, name: str) -> str:
        """Where the module with a trained parameter is: the switch that holds it, or the module itself."""
        for path in self.backbone.switches:
            if name.startswith(f'{path}.'):
                return path
        return outermost_trained(self.backbone.tree, name)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass instead of keeping their activations."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self._checkpointing = value
        if 'backbone' in self.__dict__:
            tree = self.backbone.tree
            keys = row_keys(tree)
            if not value:
                tree.disable_gradient_checkpointing()
            elif keys is None:
                tree.enable_gradient_checkpointing()
            else:
                tree.enable_gradient_checkpointing(RowCheckpoint(keys))

    def _check_trained(self) -> None:
        """Refuse adapters that would never train."""
        adapters = [tensor for name, tensor in self.role_state().items() if '.lora_' in name]
        if adapters and not any(tensor.requires_grad for tensor in adapters):
            raise ValueError(
                f'use_lora=True, but freeze_exclude={list(self.freeze_exclude)} names none of the adapters: add '
                "'lora', or set use_lora=False"
            )

    # -- running

    def example_inputs(self, batch_size: int, latent_size: Sequence[int], text_length: int = 512) -> dict[str, Tensor]:
        """Inputs of a forward pass on the device and in the dtype of the weights, for planning.

        Args:
            batch_size: ``B``.
            latent_size: ``(C, H, W)``.
            text_length: Number of text tokens.
        """
        weight = next(self.backbone.tree.parameters())
        config, device = self.backbone.tree.config, weight.device
        inputs = {
            'hidden_states': torch.zeros((batch_size, *latent_size), dtype=self.dtype, device=device),
            'timestep': torch.ones(batch_size, device=device),
        }
        if 'joint_attention_dim' in config:
            size = (batch_size, text_length, config.joint_attention_dim)
            inputs[self.text] = torch.zeros(size, dtype=self.dtype, device=device)
        if 'pooled_projections' in inspect.signature(self.backbone.tree.forward).parameters:
            size = (batch_size, config.pooled_projection_dim)
            inputs['pooled_projections'] = torch.zeros(size, dtype=self.dtype, device=device)
        if config.get('guidance_embeds'):
            inputs['guidance'] = torch.ones(batch_size, device=device)
        return inputs

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, source: RandomSource | None = None, **conditions: Any
    ) -> Tensor | dict[str, Tensor]:
        """Predict velocities, or the tensors of a policy.

        Args:
            hidden_states: Noisy latents, (B, C, H, W).
            timestep: (B,), in the unit the network is trained with.
            source: Random source of ``network_dropout``; None for torch's global state.
            **conditions: Arguments of the transformer, such as ``encoder_hidden_states`` (B, T, D),
                ``encoder_hidden_states_mask`` (B, T), ``pooled_projections`` and ``guidance`` (B,).

        Returns:
            (B, C, H, W); with a GMFlow head ``means (B, K, C, H, W)``, ``logweights (B, K, 1, H, W)`` and
            ``logstds (B, 1, 1, 1, 1)``; with a DX head (B, N, C, H, W).

        Raises:
            ValueError: The size of the latents is no multiple of the patch size, or a condition is missing.
        """
        height, width = hidden_states.shape[-2:]
        if hidden_states.dim() != 4 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'latents of shape {tuple(hidden_states.shape)}: expected (B, C, H, W) with H and W multiples of '
                f'patch_size={self.patch_size}'
            )
        grid = (height // self.patch_size, width // self.patch_size)
        conditions = self._prepare_conditions(conditions)
        text_length = conditions[self.text].shape[1] if self.text in conditions else 0
        device, dtype = hidden_states.device, hidden_states.dtype
        layout = Layout(len(hidden_states), *grid, text_length, device)
        inputs = hidden_states.to(self.dtype)
        if self.latents == 'tokens':
            inputs = cut_tokens(inputs, self.patch_size, self.row_order)
        with (
            self.backbone.playing(self.role) as transformer,
            self.autocast(device),
            self.dropping(self.backbone.tree, hidden_states, source),
        ):
            (output,) = transformer(
                hidden_states=inputs,
                timestep=timestep * self.timestep_scale,
                **conditions,
                **make_positions(self.positions, layout),
                return_dict=False,
            )
        if self.latents == 'tokens':
            output = fold_tokens(output, grid, self.patch_size, 1, self.row_order).squeeze(1)
        result = self.head.unpack(output)
        if isinstance(result, dict):
            return {name: at_least(tensor, dtype) for name, tensor in result.items()}
        return at_least(result, dtype)

    def _prepare_conditions(self, conditions: dict[str, Any]) -> dict[str, Any]:
        if self.backbone.tree.config.get('guidance_embeds') and conditions.get('guidance') is None:
            raise ValueError(
                f'{type(self.backbone.tree).__name__} has guidance embedded: set distilled_guidance_scale in test_cfg, '
                'train_cfg and train_cfg.teacher_test_cfg, or pass guidance (B,)'
            )
        prepared = {}
        for name, value in conditions.items():
            is_float = isinstance(value, Tensor) and value.is_floating_point() and name != 'guidance'
            prepared[name] = value.to(self.dtype) if is_float else value
        if self.text_mask is None or prepared.get(self.text_mask) is None:
            return prepared
        mask = prepared.pop(self.text_mask).bool()
        used = mask.any(dim=0)
        prepared[self.text] = prepared[self.text][:, used]
        mask = mask[:, used]
        prepared[self.text_mask] = None if self.attend_to_padding or bool(mask.all()) else mask
        return prepared
