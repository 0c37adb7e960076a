"""Class-conditional images from a GMFlow DiT."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from lakonlab.models.diffusions.gmflow import GMFlow
from lakonlab.models.diffusions.schedulers import SCHEDULER_MODULES, scheduler_class
from lakonlab.ops.random_source import PerRowSource, TorchSource
from lakonlab.pipelines.adapter_files import CONFIG_FILE
from lakonlab.pipelines.dit_pipeline import DiTPipeline, build_network, known_labels

MODEL_INDEX = 'model_index.json'
NETWORKS = {'transformer': 'GMDiTTransformer2DModel', 'spectrum_net': 'SpectrumMLP'}
FILES = ('*.json', '*.safetensors', '*/*.json', '*/*.safetensors')
SUFFIX = 'Scheduler'
#: Arguments of ``from_pretrained`` of diffusers about how files are read, which here is always the same.
WITHOUT_EFFECT = ('low_cpu_mem_usage', 'use_safetensors', 'disable_mmap')
#: Published names of schedulers -> those of :mod:`lakonlab.models.diffusions.schedulers`.
RENAMED = {'GMFlowODE': 'FlowEulerODE', 'FlowMatchEulerDiscrete': 'FlowEulerODE', 'GMFlowSDE': 'FlowSDE'}


class GMDiTPipeline(DiTPipeline):
    """Samples a GMFlow DiT.

    Args:
        transformer: :class:`~lakonlab.models.architecture.gmflow.gmdit.GMDiTTransformer2DModel`, or its version 2.
        spectrum_net: :class:`~lakonlab.models.architecture.gmflow.spectrum_mlp.SpectrumMLP`, from which the mode
            ``'sample'`` draws; None to draw pixels independently.
        vae: ``AutoencoderKL`` of diffusers; None for networks of pixels.
        scheduler: ``FlowEulerODEScheduler`` or ``FlowSDEScheduler``.
        id2label: Class -> its names, separated by commas.
    """

    _optional_components = ['spectrum_net', 'vae']
    model_cpu_offload_seq = 'transformer->spectrum_net->vae'

    def __init__(
        self,
        transformer: nn.Module,
        spectrum_net: nn.Module | None,
        vae: nn.Module | None,
        scheduler: Any,
        id2label: Mapping[int, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, spectrum_net=spectrum_net, vae=vae, scheduler=scheduler)
        self.id2label = {int(label): str(names) for label, names in (id2label or {}).items()}
        self.labels = {
            word.strip(): label for label, names in self.id2label.items() for word in names.split(',') if word.strip()
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, torch_dtype=None, dtype=None, **kwargs):
        """Read a pipeline, whatever modules its ``model_index.json`` says that its classes are of.

        Args:
            pretrained_model_name_or_path: Local folder, or repository of the Hugging Face hub.
            torch_dtype: Of the networks and the autoencoder; None for float32.
            dtype: Newer name of it.
            **kwargs: ``variant`` of the files, such as ``'bf16'``; of :func:`huggingface_hub.snapshot_download`;
                components that take the place of those in the folder; those of :data:`WITHOUT_EFFECT`.

        Raises:
            ValueError: A component is missing, or of a class that is not known.
        """
        variant = kwargs.pop('variant', None)
        for name in WITHOUT_EFFECT:
            kwargs.pop(name, None)
        given = {
            name: kwargs.pop(name) for name in ('transformer', 'spectrum_net', 'vae', 'scheduler') if name in kwargs
        }
        from huggingface_hub import snapshot_download

        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, allow_patterns=list(FILES), **kwargs))
        else:
            unknown = sorted(set(kwargs) - set(inspect.signature(snapshot_download).parameters))
            if unknown:
                raise TypeError(f'from_pretrained has no argument {unknown[0]!r}')
        if not (folder / MODEL_INDEX).is_file():
            raise ValueError(f'{str(pretrained_model_name_or_path)!r} is no saved pipeline: it has no {MODEL_INDEX}')
        index = json.loads((folder / MODEL_INDEX).read_text(encoding='utf-8'))
        chosen = dtype or torch_dtype or torch.float32
        parts = {name: _read_network(folder, name, chosen, variant) for name in NETWORKS if name not in given}
        if 'vae' not in given:
            parts['vae'] = _read_vae(folder, chosen, variant)
        if 'scheduler' not in given:
            parts['scheduler'] = _read_scheduler(folder)
        if {**parts, **given}['transformer'] is None:
            raise ValueError(f'{str(folder)!r} has no folder transformer')
        return cls(**parts, **given, id2label=index.get('id2label'))

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write what :meth:`from_pretrained` reads.

        Args:
            save_directory: Folder, made if need be.
            **kwargs: None is known.
        """
        from safetensors.torch import save_file

        if kwargs:
            raise TypeError(f'save_pretrained has no argument {sorted(kwargs)[0]!r}')
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        index = {'_class_name': type(self).__name__, 'id2label': self.id2label}
        for name in NETWORKS:
            network = getattr(self, name)
            if network is None:
                continue
            (folder / name).mkdir(exist_ok=True)
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
            save_file(state, folder / name / 'diffusion_pytorch_model.safetensors', {'format': 'pt'})
            config = {'_class_name': type(network).__name__, **network.build_arguments}
            (folder / name / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
            index[name] = [type(network).__module__, type(network).__name__]
        if self.vae is not None:
            self.vae.save_pretrained(folder / 'vae')
            index['vae'] = ['diffusers', type(self.vae).__name__]
        self.scheduler.save_pretrained(folder / 'scheduler')
        index['scheduler'] = [type(self.scheduler).__module__, type(self.scheduler).__name__]
        (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Classes of words.

        Raises:
            ValueError: A word names no class.
        """
        words = [label] if isinstance(label, str) else list(label)
        unknown = [word for word in words if word not in self.labels]
        if unknown:
            raise ValueError(
                f'{unknown[0]!r} names no class; the classes are {", ".join(sorted(self.labels)[:8])}, ...'
            )
        return [self.labels[word] for word in words]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 0.45,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 32,
        num_inference_substeps: int = 4,
        output_mode: str = 'mean',
        order: int = 2,
        orthogonal_guidance: float = 1.0,
        gm2_coefs: Sequence[float] = (0.005, 1.0),
        gm2_correction_steps: int = 0,
        output_type: str = 'pil',
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: Classes, or one.
            guidance_scale: Probabilistic guidance, 0 (none) up to, but not, 1.
            generator: Of the noise and of what the solver draws; one, or one per image,
                with which an image does not depend on the batch it is in.
            num_inference_steps: Network evaluations.
            num_inference_substeps: Solver steps for each of them.
            output_mode: ``'mean'`` (GM-ODE) or ``'sample'`` (GM-SDE) of the mixture.
            order: 1 or 2.
            orthogonal_guidance: Share of the guidance along the prediction that is removed.
            gm2_coefs: See :class:`~lakonlab.models.diffusions.gmflow.GMFlowTestConfig`.
            gm2_correction_steps: As there.
            output_type: ``'pil'``, ``'np'``, ``'pt'`` or ``'latent'``.
            return_dict: Return an output object instead of a tuple.

        Raises:
            ValueError: A value is out of range.
        """
        network = self.transformer
        device = self._execution_device
        null = network.build_arguments.get('num_embeds_ada_norm', 1000)
        labels = known_labels(class_labels, null).to(device)
        noise = self.noise_of(labels, generator)
        conditions = labels
        if guidance_scale not in (0, 1):
            conditions = torch.cat([torch.full_like(labels, null), labels])
        kind = type(self.scheduler).__name__.removesuffix(SUFFIX)
        if kind not in SCHEDULER_MODULES:
            raise ValueError(f'{type(self.scheduler).__name__}: expected FlowEulerODEScheduler or FlowSDEScheduler')
        known = inspect.signature(type(self.scheduler).__init__).parameters
        own = {name: value for name, value in self.scheduler.config.items() if name in known}
        own.pop('num_train_timesteps', None)
        shift = own.pop('shift', 1.0)
        flow = GMFlow(
            network,
            spectrum_net=self.spectrum_net,
            num_timesteps=self.scheduler.config.num_train_timesteps,
            timestep_sampler={'type': 'ContinuousTimeStepSampler', 'shift': shift},
            test_cfg=dict(
                sampler=kind,
                sampler_kwargs={name: own[name] for name in ('h',) if name in own},
                num_timesteps=num_inference_steps,
                num_substeps=num_inference_substeps,
                output_mode=output_mode,
                order=order,
                orthogonal_guidance=orthogonal_guidance,
                gm2_coefs=tuple(gm2_coefs),
                gm2_correction_steps=gm2_correction_steps,
            ),
        ).eval()
        source = PerRowSource(generator) if isinstance(generator, (list, tuple)) else TorchSource(generator)
        bar = not getattr(self, '_progress_bar_config', {}).get('disable', False)
        latents = flow.forward_test(noise, guidance_scale, class_labels=conditions, source=source, show_pbar=bar)
        return self.output_of(latents, output_type, return_dict)


def _config_of(folder: Path) -> dict[str, Any] | None:
    file = folder / CONFIG_FILE
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None


def _read_network(folder: Path, name: str, dtype: torch.dtype, variant: str | None) -> nn.Module | None:
    """A network of this package from a folder; None if there is none."""
    config = _config_of(folder / name)
    if config is None:
        return None
    file = f'diffusion_pytorch_model.{variant}.safetensors' if variant else 'diffusion_pytorch_model.safetensors'
    found = folder / name / file
    pretrained = str(found if found.is_file() else folder / name)
    return build_network({'_class_name': NETWORKS[name], **config}, str(folder / name), dtype, pretrained=pretrained)


def _read_vae(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module | None:
    if _config_of(folder / 'vae') is None:
        return None
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / 'vae', dtype=dtype, variant=variant)


def _read_scheduler(folder: Path) -> Any:
    file = folder / 'scheduler' / 'scheduler_config.json'
    if not file.is_file():
        return scheduler_class('FlowEulerODE')()
    config = json.loads(file.read_text(encoding='utf-8'))
    name = str(config.get('_class_name', 'FlowEulerODEScheduler')).lstrip('_').removesuffix(SUFFIX)
    kind = scheduler_class(RENAMED.get(name, name))
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in config.items() if key in known and not key.startswith('_')})
