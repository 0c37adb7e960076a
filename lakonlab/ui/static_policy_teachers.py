"""The teachers of the toy experiments: published ones, a class-conditional one of ours, or a local Qwen-Image."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lakonlab.config.errors import ConfigError, describe_unknown
from lakonlab.config.load import load_config
from lakonlab.config.resolved import parse_resolved
from lakonlab.datasets.imagenet import read_label_names
from lakonlab.models.architecture.diffusers.dit import DiTBackbone
from lakonlab.models.architecture.loading import locate_weights
from lakonlab.registry import MODULES
from lakonlab.storage.checkpoint import find_checkpoint, read_manifest
from lakonlab.storage.paths import is_remote
from lakonlab.ui.static_policy_experiment import Subject

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
IMAGENET_CONFIG = CONFIGS / 'misc' / 'flowdit_imagenet_test.py'
QWEN_CONFIG = CONFIGS / 'piqwen' / 'gmqwen_k8_datafree_piid_4step_32gpus.py'
IMAGENET_GUIDANCE = QWEN_GUIDANCE = 4.0
QWEN_CHANNELS, QWEN_REDUCTION, QWEN_PATCH = 16, 8, 2
OF_FLOW = (
    'type',
    'denoising',
    'num_timesteps',
    'timestep_sampler',
    'flip_model_timesteps',
    'denoising_mean_mode',
    'sigma_min',
)
DIGITS_HINT = (
    'the digits teacher is made by `make demo` or by `python tools/train.py configs/digits/dit_digits_teacher.py`, and '
    'is then in checkpoints/dit_digits_teacher/latest'
)


def class_subject(
    teacher: str | None, labels: Sequence[int], num_pairs: int, guidance_scale: float | None, dtype: str
) -> Subject:
    """A class-conditional DiT.

    Args:
        teacher: A checkpoint of a teacher trained here, such as that of the digits, whose config says what it is; a
            file of weights of the published ImageNet teacher; None for the latter from the hub.
        labels: Classes, for the pairs in turn.
        num_pairs: Number of pairs of noise and class.
        guidance_scale: Of the teacher; None for its own.
        dtype: Name of the dtype of the teacher's weights.

    Raises:
        ConfigError: The checkpoint holds something else than such a teacher, or there is no such class.
        FileNotFoundError: There is nothing at ``teacher``.
    """
    trained_here = teacher is not None and not is_remote(teacher) and not Path(teacher).is_file()
    values = _config_in(teacher) if trained_here else load_config(IMAGENET_CONFIG).to_dict()
    model = values['model']
    flow = {name: model['diffusion'][name] for name in OF_FLOW if name in model['diffusion']}
    guidance = dict(values.get('test_cfg') or {}) if trained_here else {'guidance_scale': IMAGENET_GUIDANCE}
    network = flow['denoising'] = {**flow['denoising'], 'freeze': True}
    if teacher is not None:
        network['pretrained'] = str(locate_weights(teacher, '--teacher'))
    network.update(torch_dtype=dtype, checkpointing=False)
    defaults = inspect.signature(DiTBackbone).parameters
    sizes = {
        name: network.get(name, defaults[name].default)
        for name in ('in_channels', 'sample_size', 'num_embeds_ada_norm')
    }
    num_classes = sizes['num_embeds_ada_norm']
    for label in labels:
        if not 0 <= label < num_classes:
            raise ConfigError(f'--class-label {label}: this teacher knows the classes 0 to {num_classes - 1}')
    chosen = [labels[pair % len(labels)] for pair in range(num_pairs)]
    return Subject(
        model_type=model['type'],
        teacher=flow,
        latent_size=(sizes['in_channels'], sizes['sample_size'], sizes['sample_size']),
        conditions={'labels': torch.tensor(chosen), 'negative_labels': torch.full((num_pairs,), num_classes)},
        names=[f'class {label}' for label in chosen],
        guidance=guidance if guidance_scale is None else {**guidance, 'guidance_scale': guidance_scale},
        vae=model.get('vae'),
    )


def label_of(name: str, path: str | Path) -> int:
    """Number of an ImageNet class.

    Args:
        name: Its name, all of it or one of the alternatives that the file lists for the class.
        path: File with a line ``label: 'names',`` per class.

    Raises:
        ConfigError: There is no such class.
        FileNotFoundError: There is no such file.
    """
    names = read_label_names(path)
    for label, text in names.items():
        if name == text or name in [part.strip() for part in text.split(',')]:
            return label
    known = [part.strip() for text in names.values() for part in text.split(',')]
    raise ConfigError(describe_unknown('--name', f'class of {path}', name, known))


def _config_in(path: str) -> dict[str, Any]:
    """The config in a checkpoint of a class-conditional teacher."""
    found = find_checkpoint(path)
    if found is None:
        raise FileNotFoundError(f'--teacher {path}: there is no checkpoint; {DIGITS_HINT}')
    where = f'--teacher {path}'
    values = parse_resolved(read_manifest(found)['config'], where)
    diffusion = (values.get('model') or {}).get('diffusion') or {}
    network = diffusion.get('denoising') or {}
    if diffusion.get('type') != 'GaussianFlow' or network.get('type') != 'DiTTransformer2DModelMod':
        raise ConfigError(
            f'{where}: is a {diffusion.get("type")} with a {network.get("type")}; expected a GaussianFlow with a '
            f'DiTTransformer2DModelMod; {DIGITS_HINT}'
        )
    return values


def prompt_subject(
    teacher: str | None,
    prompts: Sequence[str],
    num_pairs: int,
    size: tuple[int, int],
    guidance_scale: float | None,
    dtype: str,
    device: torch.device | str,
) -> Subject:
    """Qwen-Image; the prompts are embedded at once, and the text encoder is given up before anything else is loaded.

    Args:
        teacher: Folder of a pipeline in the layout of diffusers; None for the published one from the hub.
        prompts: For the pairs in turn.
        num_pairs: Number of pairs of noise and prompt.
        size: Height and width of the images in pixels, multiples of 16.
        guidance_scale: Of the teacher; None for 4.
        dtype: Name of the dtype of all weights.
        device: Where to embed.

    Raises:
        ConfigError: The size is impossible, or the folder holds something else.
        FileNotFoundError: There is no such folder.
    """
    unit = QWEN_REDUCTION * QWEN_PATCH
    if any(side < unit or side % unit for side in size):
        raise ConfigError(f'--h {size[0]} --w {size[1]}: expected multiples of {unit}')
    model = load_config(QWEN_CONFIG).model.to_dict()
    flow = model['teacher']
    vae = {'type': 'PretrainedVAEQwenImage', **(model.get('vae') or {})}
    text_encoder = {'type': 'PretrainedQwenImageTextEncoder', **(model.get('text_encoder') or {})}
    channels = QWEN_CHANNELS
    if teacher is not None:
        folder = Path(teacher).expanduser()
        transformer, autoencoder = (_part_config(folder, part) for part in ('transformer', 'vae'))
        flow['denoising'].update(_transformer_arguments(transformer), pretrained=str(folder / 'transformer'))
        channels = autoencoder['z_dim']
        for part in (vae, text_encoder):
            part.pop('from_pretrained', None)
            part['model_name_or_path'] = str(folder)
    for part in (flow['denoising'], vae, text_encoder):
        part['torch_dtype'] = dtype
    flow['denoising']['checkpointing'] = False
    chosen = [prompts[pair % len(prompts)] for pair in range(num_pairs)]
    return Subject(
        model_type=model['type'],
        teacher=flow,
        latent_size=(channels, size[0] // QWEN_REDUCTION, size[1] // QWEN_REDUCTION),
        conditions=_embed(text_encoder, chosen, device),
        names=[_shorten(prompt) for prompt in chosen],
        guidance={'guidance_scale': QWEN_GUIDANCE if guidance_scale is None else guidance_scale},
        vae=vae,
    )


def _part_config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(
            f'--teacher {folder}: there is no {path}; expected a folder of a Qwen-Image pipeline as diffusers saves it'
        )
    return json.loads(path.read_text(encoding='utf-8'))


def _transformer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our network for a transformer of diffusers, which folds its output's patches itself."""
    patch = config['patch_size']
    arguments = {
        name: config[name]
        for name in (
            'in_channels',
            'num_layers',
            'attention_head_dim',
            'num_attention_heads',
            'joint_attention_dim',
            'axes_dims_rope',
        )
    }
    return {**arguments, 'patch_size': patch, 'out_channels': config['out_channels'] * patch * patch}


def _embed(text_encoder: Mapping[str, Any], prompts: list[str], device: torch.device | str) -> dict[str, Any]:
    encoder = MODULES.build(dict(text_encoder)).to(device)
    embedded = {
        'prompt_embed_kwargs': encoder(prompts),
        'negative_prompt_embed_kwargs': encoder([' '] * len(prompts)),
    }
    del encoder
    if torch.device(device).type != 'cpu':
        torch.accelerator.empty_cache()
    return embedded


def _shorten(text: str, most_characters: int = 24) -> str:
    return text if len(text) <= most_characters else f'{text[: most_characters - 2]} …'
