"""Class-conditional images from an exported pi-Flow student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from lakonlab.models.architecture.adapters import POLICY_KEY
from lakonlab.models.diffusions.piflow import PiFlow
from lakonlab.pipelines.adapter_files import CONFIG_FILE, AdapterError, load_adapter_files, weights_name
from lakonlab.pipelines.dit_pipeline import DiTPipeline, build_network, known_labels
from lakonlab.pipelines.piflow_mixin import check_settings
from lakonlab.pipelines.policy_scheduler import chosen_temperature
from lakonlab.pipelines.recipe import RECIPE_KEY, Recipe
from lakonlab.storage.adapter_layout import published_tensors

#: How a student is sampled whose file does not say it.
DEFAULTS = Recipe(
    shift=1.0, final_step_size_scale=1.0, total_substeps=128, num_timesteps=1000, flip_model_timesteps=False
)


class PiDiTPipeline(DiTPipeline):
    """Samples a class-conditional student: a DiT whose output is a policy.

    Args:
        transformer: The network, such as ``GMDiTTransformer2DModelV2``.
        vae: ``AutoencoderKL`` of diffusers; None for networks of pixels.
        policy: ``dict(type='GMFlow')`` or ``dict(type='DX', segment_size=..., ...)``.
        recipe: How the student is sampled.
    """

    _optional_components = ['vae']
    model_cpu_offload_seq = 'transformer->vae'

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module | None = None,
        policy: Mapping[str, Any] | None = None,
        recipe: Recipe | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        policy = dict(policy or {'type': 'GMFlow'})
        self.policy_type = policy.pop('type')
        self.policy_kwargs = policy
        self.recipe = Recipe(**{**DEFAULTS.known(), **(recipe or Recipe()).known()})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        vae: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        **hub_options: Any,
    ) -> PiDiTPipeline:
        """Read what ``tools/export_piflow_to_diffusers.py`` wrote for a class-conditional student.

        Args:
            pretrained_model_name_or_path: Local folder, URL of one, or repository of the Hugging Face hub.
            subfolder: Folder in it.
            vae: The autoencoder that the student was trained with; None for students of pixels.
            dtype: Of the network.
            variant: Middle part of the name of the file, such as ``'fp16'``.
            **hub_options: Of :func:`huggingface_hub.hf_hub_download`.

        Raises:
            AdapterError: There is no such export, or it is none of a class-conditional student.
            PretrainedError: Its tensors do not fit its config.
        """
        path = str(pretrained_model_name_or_path)
        adapter = load_adapter_files(path, subfolder, 'transformer', variant, **hub_options)
        try:
            network = build_network(adapter.config, adapter.where, dtype)
        except (TypeError, ValueError) as error:
            raise AdapterError(f'{adapter.where!r} is no class-conditional student: {error}') from error
        network.load_published(adapter.tensors, adapter.where)
        if adapter.recipe is not None and adapter.recipe.shift is None:
            raise AdapterError(f'{adapter.where!r} was trained with a shift that depends on the size of images')
        return cls(network, vae, adapter.policy, adapter.recipe)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write what :meth:`from_pretrained` reads; the autoencoder is not part of it.

        Args:
            save_directory: Folder, made if need be.
            **kwargs: None is known.
        """
        from safetensors.torch import save_file

        if kwargs:
            raise TypeError(f'save_pretrained has no argument {sorted(kwargs)[0]!r}')
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        policy = {**self.policy_kwargs, 'type': self.policy_type}
        metadata = {'format': 'pt', POLICY_KEY: json.dumps(policy), RECIPE_KEY: self.recipe.to_json()}
        tensors = published_tensors(self.transformer.state_dict(), '')
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / weights_name(), metadata)
        config = {'_class_name': type(self.transformer).__name__, **self.transformer.build_arguments}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int | None = None,
        total_substeps: int | None = None,
        temperature: str | float = 'auto',
        final_step_size_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = 'pil',
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: Classes, or one.
            num_inference_steps: Network evaluations; None for the number that the student was trained for.
            total_substeps: Substeps of the policy over the whole schedule; None for the student's.
            temperature: Of a mixture, on all but the last step. ``'auto'`` is the student's own at its own number of
                steps, else ``(num_inference_steps - 1) / 10``, at most 1.
            final_step_size_scale: Length of the last step relative to the others; None for the student's.
            generator: Of the noise; one, or one per image, with which an image does not depend on the batch it is in.
            latents: The noise, (B, C, H, W), in place of a generator.
            output_type: ``'pil'``, ``'np'``, ``'pt'`` or ``'latent'``.
            return_dict: Return an output object instead of a tuple.

        Raises:
            ValueError: A label is not known, or a setting is not one that can be sampled with.
        """
        check_settings(num_inference_steps, total_substeps, temperature, final_step_size_scale)
        network, recipe = self.transformer, self.recipe
        steps = num_inference_steps or recipe.nfe
        if steps is None:
            raise ValueError('num_inference_steps: the file of this student does not say how many it was trained for')
        num_classes = network.build_arguments.get('num_embeds_ada_norm', 1000)
        labels = known_labels(class_labels, num_classes).to(self._execution_device)
        noise = self.noise_of(labels, generator, latents)
        chosen = chosen_temperature(self.policy_type, recipe, temperature, steps)
        flow = PiFlow(
            network,
            policy_type=self.policy_type,
            policy_kwargs=self.policy_kwargs,
            timestep_sampler=dict(shift=recipe.shift),
            test_cfg=dict(
                nfe=steps,
                total_substeps=total_substeps or recipe.total_substeps,
                final_step_size_scale=final_step_size_scale or recipe.final_step_size_scale,
                temperature=1.0 if chosen is None else chosen,
            ),
            num_timesteps=recipe.num_timesteps,
            flip_model_timesteps=recipe.flip_model_timesteps,
        ).eval()
        bar = not getattr(self, '_progress_bar_config', {}).get('disable', False)
        samples = flow.forward_test(noise, class_labels=labels, show_pbar=bar)
        return self.output_of(samples, output_type, return_dict)
