"""HPSv3 (Ma et al., 2025): how much people would like an image and its match with the prompt, by Qwen2-VL."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lakonlab.evaluation.hub_models import SETTING_SUFFIXES, digest_of, hub_name
from lakonlab.evaluation.preparation import as_rgb, to_bytes
from lakonlab.evaluation.prompt_scorer import PromptMetric, PromptScorer
from lakonlab.registry import METRICS, PROMPT_SCORERS
from lakonlab.storage import files
from lakonlab.storage.fetch import fetch
from lakonlab.storage.local import sha256_of

REWARD_TOKEN = '<|Reward|>'
PIXELS = 256 * 28 * 28
INSTALL = 'pip install --no-deps hpsv3==1.0.0'
#: What tensors are called by versions of transformers -> by that of today.
RENAMED = {'model.visual.': 'visual.', 'model.language_model.': 'language_model.', 'model.': 'language_model.'}


def packaged_instruction() -> str:
    """What the model is told, from the package that published it; the package is read, not imported.

    Returns:
        A text with ``{text_prompt}`` and the reward token.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    found = importlib.util.find_spec('hpsv3')
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f'HPSv3 asks what its package says, which is not installed: {INSTALL}; or name a file with instruction'
        )
    path = Path(next(iter(found.submodule_search_locations))) / 'dataset' / 'data_collator_qwen.py'
    texts = {}
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts[node.targets[0].id] = node.value.value
    return texts['INSTRUCTION'] + texts['prompt_with_special_token']


@PROMPT_SCORERS.register_module()
class Qwen2VLReward(PromptScorer):
    """The mean of the reward that a Qwen2-VL with a head of its own predicts at its reward token.

    Args:
        weights: File of the whole model with its head, of any scheme.
        base: Folder or repository with the configuration and the processor of the model.
        instruction: File of what the model is told, with ``{text_prompt}`` and ``<|Reward|>``; None for that of the
            package ``hpsv3``.
        torch_dtype: Dtype of the weights; the head computes in float32.
        pixels: Area that images are brought to.

    Raises:
        ModuleNotFoundError: ``instruction`` is None and the package is not installed.
        OSError: A file cannot be had.
        ValueError: A file holds something else.
    """

    def __init__(
        self,
        weights: str = 'huggingface://MizzenAI/HPSv3/HPSv3.safetensors',
        base: str = 'huggingface://Qwen/Qwen2-VL-7B-Instruct',
        instruction: str | None = None,
        torch_dtype: str = 'bfloat16',
        pixels: int = PIXELS,
    ):
        super().__init__()
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

        self.instruction = packaged_instruction() if instruction is None else files.read_text(instruction)
        for part in ('{text_prompt}', REWARD_TOKEN):
            if self.instruction.count(part) != 1:
                raise ValueError(f'Qwen2VLReward.instruction={instruction!r}: expected {part} in it, once')
        self.processor = AutoProcessor.from_pretrained(hub_name(base), padding_side='right')
        size = {'shortest_edge': pixels, 'longest_edge': pixels}
        self.processor.image_processor.size = size
        tokenizer = self.processor.tokenizer
        tokenizer.add_special_tokens({'additional_special_tokens': [REWARD_TOKEN]})
        self.reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        path = fetch(weights)
        if not path.is_file():
            raise FileNotFoundError(f'Qwen2VLReward.weights: there is no file {weights}')
        state = load_file(path)
        config = AutoConfig.from_pretrained(hub_name(base))
        dtype = getattr(torch, torch_dtype)
        with torch.device('meta'):
            self.net: nn.Module = Qwen2VLModel(config)
            self.net.resize_token_embeddings(len(tokenizer))
            self.head = ranknet_head(config.get_text_config().hidden_size)
        head = {name.removeprefix('rm_head.'): tensor.float() for name, tensor in state.items() if _is_head(name)}
        body = {present_name(name): tensor.to(dtype) for name, tensor in state.items() if not _is_head(name)}
        body.pop('lm_head.weight', None)  # predicts words, which nobody asks for
        try:
            self.head.load_state_dict(head, assign=True)
            self.net.load_state_dict(body, assign=True)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:300]
            raise ValueError(f'Qwen2VLReward.weights: {weights} does not hold this model: {reason}') from None
        self._compute_buffers()
        self.torch_dtype, self.pixels = torch_dtype, pixels
        self.weights_hash = sha256_of(path)
        self.instruction_hash = hashlib.sha256(self.instruction.encode()).hexdigest()
        self.base_hash = digest_of(hub_name(base), self.net, SETTING_SUFFIXES)

    def _compute_buffers(self) -> None:
        """Compute what no file holds: frequencies of positions."""
        for module in self.net.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                fresh = type(module)(module.config)
                for name, buffer in fresh.named_buffers(recurse=False):
                    module.register_buffer(name, buffer, persistent=False)
                module.attention_scaling = fresh.attention_scaling

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = to_bytes(as_rgb(images)).permute(0, 2, 3, 1).cpu().numpy()
        texts = [self._conversation(prompt) for prompt in prompts]
        pictures = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors='pt').to(images.device)
        inputs['pixel_values'] = inputs['pixel_values'].to(self.net.dtype)
        states = self.net(**inputs).last_hidden_state
        place = (inputs['input_ids'] == self.reward_id).float().argmax(dim=1)
        rewards = self.head(states[torch.arange(len(states), device=states.device), place].float())
        return rewards[:, 0]  # the mean; the second is the logarithm of its uncertainty

    def _conversation(self, prompt: str) -> str:
        told = self.instruction.replace('{text_prompt}', prompt)
        content = [dict(type='image'), dict(type='text', text=told)]
        return self.processor.apply_chat_template(
            [dict(role='user', content=content)], tokenize=False, add_generation_prompt=True
        )

    def protocol(self) -> dict[str, Any]:
        return dict(
            name='Qwen2-VL reward',
            weights_sha256=self.weights_hash,
            base_sha256=self.base_hash,
            instruction_sha256=self.instruction_hash,
            dtype=self.torch_dtype,
            pixels=self.pixels,
        )


def ranknet_head(size: int) -> nn.Sequential:
    """The published head: mean and uncertainty of a reward, of a state."""
    return nn.Sequential(
        nn.Linear(size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def present_name(name: str) -> str:
    """Where a tensor of the published file is in the model of today's transformers."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_head(name: str) -> bool:
    return name.startswith('rm_head.')


@METRICS.register_module()
class HPSv3(PromptMetric):
    """Human preference score v3.

    Args:
        scorer: Arguments of :class:`Qwen2VLReward`; with ``type``, of another scorer of prompts.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'hpsv3'

    def __init__(self, scorer: dict[str, Any] | None = None, prefix: str = ''):
        super().__init__({'type': 'Qwen2VLReward', **(scorer or {})}, prefix)
