"""Pretrained text encoders, called as the pipelines of the diffusers library call them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lakonlab.models.architecture.diffusers.pretrained import (
    PretrainedPart,
    is_planned,
    load_part,
    local_folder,
    note_unknown,
    obtain_parts,
    read_json,
    repository,
)
from lakonlab.models.architecture.loading import PretrainedError


class PretrainedTextEncoder(PretrainedPart):
    """A pipeline of the diffusers library without everything that is not for text.

    A subclass names the pipeline, the modules to keep, and calls the pipeline's ``encode_prompt``.

    Args:
        model_name_or_path: Folder of a whole pipeline, or repository of the hub.
        max_sequence_length: Largest number of text tokens.
        freeze: Whether its parameters get no gradient.
        eval_mode: Whether it stays in evaluation mode.
        torch_dtype: Dtype of its weights.
        variant: Variant of the files, such as ``'fp16'``.
        revision: Revision of the repository.

    Raises:
        PretrainedError: It cannot be loaded.
    """

    #: Name of the pipeline's class in diffusers.
    pipeline_type: str
    #: Modules of the pipeline that encode text.
    encoders: tuple[str, ...]
    #: Other parts of the pipeline that are needed for it.
    tokenizers: tuple[str, ...]

    def __init__(
        self,
        model_name_or_path: str,
        max_sequence_length: int = 512,
        freeze: bool = True,
        eval_mode: bool = True,
        torch_dtype: str = 'bfloat16',
        variant: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(freeze, eval_mode, torch_dtype)
        if max_sequence_length < 1:
            raise ValueError(f'max_sequence_length={max_sequence_length}: expected at least 1')
        self.max_sequence_length = max_sequence_length
        name = repository(model_name_or_path)
        what = f'model_name_or_path={name!r}'
        dtype = self.torch_dtype
        self.pipeline = None
        if is_planned():
            self._plan(name, dtype, what)
        else:
            options = {'variant': variant, 'revision': revision}
            self._load(name, dtype, what, {key: value for key, value in options.items() if value is not None})
        self.prepare()

    def _load(self, name: str, dtype: torch.dtype, what: str, options: dict[str, Any]) -> None:
        import diffusers

        name, revision = obtain_parts(name, (*self.encoders, *self.tokenizers), options.pop('revision', None))
        options = options if revision is None else {**options, 'revision': revision}
        pipeline = getattr(diffusers, self.pipeline_type)
        needed = (*self.encoders, *self.tokenizers)
        unused = {
            part: None for part in list(inspect.signature(pipeline.__init__).parameters)[1:] if part not in needed
        }
        self.pipeline = load_part(lambda: pipeline.from_pretrained(name, dtype=dtype, **unused, **options), what)
        for part in self.encoders:
            self.add_module(part, getattr(self.pipeline, part))

    def _plan(self, name: str, dtype: torch.dtype, what: str) -> None:
        folder = local_folder(name)
        if folder is None:
            note_unknown(what)
            return
        import transformers

        index = read_json(folder / 'model_index.json', what)
        for part in self.encoders:
            if part not in index:
                raise PretrainedError(f'{what} is no {self.pipeline_type}: its model_index.json has no {part!r}')
            kind = getattr(transformers, index[part][1])
            config = kind.config_class.from_pretrained(Path(folder, part))
            self.add_module(part, kind(config).to(dtype))

    @property
    def device(self) -> torch.device:
        """Device of the encoders."""
        return next(self.parameters()).device

    def encode(self, prompt: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """Embed prompts by the pipeline's own means."""
        raise NotImplementedError(f'{type(self).__name__} does not say how it encodes')

    @torch.no_grad()
    def forward(self, prompt: str | Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """Embed prompts.

        Args:
            prompt: One or several texts.
            **kwargs: What else the pipeline's ``encode_prompt`` takes, such as ``prompt_2``.

        Returns:
            Arguments of the transformer, each with B rows.
        """
        if self.pipeline is None:
            raise RuntimeError(f'{type(self).__name__} was built on the meta device, to plan; it cannot encode')
        return self.encode([prompt] if isinstance(prompt, str) else list(prompt), **kwargs)
