"""Whole FLUX.1 and Qwen-Image pipelines at tiny size: real classes, random weights, tokenizers trained here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CORPUS = ('a photo of a brown bear', 'two red apples on a table', 'the sea at night', 'a small house') * 20
SIZES = {
    'Flux': dict(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    'QwenImage': dict(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
    ),
}


def flux_folder(path: Path, seed: int = 0) -> Path:
    """Save a FLUX.1 pipeline; 4 latent channels at an eighth of the resolution, text of width 32."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip, t5 = _clip_tokenizer(), t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            down_block_types=['DownEncoderBlock2D'] * 4,
            up_block_types=['UpDecoderBlock2D'] * 4,
            block_out_channels=(4, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(patch_size=1, **SIZES['Flux']),
    ).save_pretrained(path)
    return path


def qwen_image_folder(path: Path, seed: int = 0) -> Path:
    """Save a Qwen-Image pipeline; 4 latent channels at an eighth of the resolution, text of width 64."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    rotary = dict(rope_type='default', rope_theta=1e6, mrope_section=[2, 3, 3])
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            rope_parameters=rotary,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=0,
        ),
        vision_config=dict(
            depth=1, hidden_size=64, intermediate_size=64, num_heads=4, out_hidden_size=64, fullatt_block_indexes=[0]
        ),
        tie_word_embeddings=False,
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(patch_size=2, out_channels=4, **SIZES['QwenImage']),
    ).save_pretrained(path)
    return path


def _trained(tokenizer, trainer, corpus) -> dict:
    """A tokenizer's model after training, as plain data."""
    tokenizer.train_from_iterator(list(corpus), trainer)
    return json.loads(tokenizer.to_str())['model']


def _pairs(merges: list) -> list[tuple[str, str]]:
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(' ')) for merge in merges]


def _clip_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    backend = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix='</w>', unk_token='<|endoftext|>'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        end_of_word_suffix='</w>',
        initial_alphabet=alphabet,
        special_tokens=['<|startoftext|>', '<|endoftext|>'],
    )
    model = _trained(tokenizer, trainer, [*CORPUS, *(f'{letter} ' for letter in alphabet)])
    vocabulary = model['vocab']
    for letter in alphabet:
        vocabulary.setdefault(f'{letter}</w>', len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=_pairs(model['merges']), model_max_length=77)


def t5_tokenizer():
    """A tokenizer of T5 for a few words and all letters."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import T5TokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = T5TokenizerFast(extra_ids=0)._tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        unk_token='<unk>',
        show_progress=False,
        special_tokens=['<pad>', '</s>', '<unk>'],
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )
    vocabulary = [tuple(entry) for entry in _trained(tokenizer, trainer, CORPUS)['vocab']]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def qwen_tokenizer():
    """Its template has 34 tokens before the prompt, which the pipeline drops: every word of it is one token here."""
    from diffusers import QwenImagePipeline
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    special = ['<|im_start|>', '<|im_end|>']
    pieces = template.format('')
    for token in special:
        pieces = pieces.replace(token, '\0')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    model = _trained(tokenizer, trainer, [piece for piece in pieces.split('\0') if piece] * 1000 + list(CORPUS))
    qwen = Qwen2Tokenizer(vocab=model['vocab'], merges=_pairs(model['merges']), model_max_length=4096)
    qwen.add_special_tokens({'additional_special_tokens': special})
    return qwen
