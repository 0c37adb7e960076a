"""Every registry of the framework, each a child of mmengine's registry of the same kind.

A class registers itself where it is defined, with ``@MODULES.register_module()``. The tables below say in which module
each name lives, so that looking up a name imports that module and no other: a digits run never pays for importing
FLUX. A class of your own needs no line here if its module is imported by ``custom_imports`` in the config.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry


class LazyRegistry(Registry):
    """A registry that imports the home of a class when its name is first looked up.

    Args:
        name: Kind of object, used in error messages.
        homes: Module path -> names that importing it registers.
        parent: The mmengine registry that is searched for names not found here.
    """

    def __init__(self, name: str, homes: Mapping[str, tuple[str, ...]], parent: Registry | None = None):
        super().__init__(name, parent=parent, scope='lakonlab')
        self._home_of = {key: module for module, keys in homes.items() for key in keys}

    def get(self, key: str):
        """Return the class registered as ``key``, importing its home first; None if there is no such name."""
        if key in self._home_of and key not in self.module_dict:
            importlib.import_module(self._home_of[key])
        return super().get(key)

    def names(self) -> list[str]:
        """All names that can be looked up without searching mmengine, sorted."""
        return sorted(set(self._home_of) | set(self.module_dict))


MODELS = LazyRegistry(
    'model',
    {
        'lakonlab.models.latent_diffusion_class_image': ('LatentDiffusionClassImage',),
        'lakonlab.models.latent_diffusion_text_image': ('LatentDiffusionTextImage',),
        'lakonlab.models.diffusion_2d': ('Diffusion2D',),
    },
    mmengine_registry.MODELS,
)

MODULES = LazyRegistry(
    'module',
    {
        'lakonlab.models.diffusions.gaussian_flow': ('GaussianFlow',),
        'lakonlab.models.diffusions.gmflow': ('GMFlow',),
        'lakonlab.models.diffusions.piflow': ('PiFlowImitation', 'PiFlowImitationDataFree'),
        'lakonlab.models.diffusions.sampler': ('ContinuousTimeStepSampler',),
        'lakonlab.models.losses.diffusion_mse': ('DiffusionMSELoss',),
        'lakonlab.models.losses.diffusion_nll': ('DiffusionNLLLoss',),
        'lakonlab.models.losses.gmflow_nll': ('GMFlowNLLLoss',),
        'lakonlab.models.architecture.diffusers.dit': ('DiTTransformer2DModelMod',),
        'lakonlab.models.architecture.gmflow.gmdit': ('GMDiTTransformer2DModel', 'GMDiTTransformer2DModelV2'),
        'lakonlab.models.architecture.gmflow.gmmlp2d': ('GMFlowMLP2DDenoiser',),
        'lakonlab.models.architecture.gmflow.spectrum_mlp': ('SpectrumMLP',),
        'lakonlab.models.architecture.static_policy': ('StaticPolicyNetwork',),
        'lakonlab.models.architecture.dxflow.dxdit': ('DXDiTTransformer2DModel',),
        'lakonlab.models.architecture.diffusers.transformer': ('DiffusersTransformer',),
        'lakonlab.models.architecture.diffusers.pretrained_vae': (
            'PretrainedVAE',
            'PretrainedVAEEncoder',
            'PretrainedVAEDecoder',
        ),
        'lakonlab.models.architecture.diffusers.pretrained_vae_qwen_image': ('PretrainedVAEQwenImage',),
        'lakonlab.models.architecture.diffusers.pretrained_flux_text_encoder': ('PretrainedFluxTextEncoder',),
        'lakonlab.models.architecture.diffusers.pretrained_qwen_image_text_encoder': (
            'PretrainedQwenImageTextEncoder',
        ),
        'lakonlab.models.architecture.diffusers.pretrained_transformers_text_encoder': (
            'PretrainedTransformersTextEncoder',
        ),
        'lakonlab.models.architecture.diffusers.flux': ('FluxTransformer2DModel',),
        'lakonlab.models.architecture.diffusers.qwen_image': ('QwenImageTransformer2DModel',),
        'lakonlab.models.architecture.gmflow.gmflux': ('GMFluxTransformer2DModel',),
        'lakonlab.models.architecture.gmflow.gmqwen': ('GMQwenImageTransformer2DModel',),
        'lakonlab.models.architecture.dxflow.dxflux': ('DXFluxTransformer2DModel',),
        'lakonlab.models.architecture.dxflow.dxqwen': ('DXQwenImageTransformer2DModel',),
    },
)

DATASETS = LazyRegistry(
    'dataset',
    {
        'lakonlab.datasets.checkerboard': ('CheckerboardData',),
        'lakonlab.datasets.combine': ('ConcatDataset', 'Subset'),
        'lakonlab.datasets.digits': ('Digits',),
        'lakonlab.datasets.emoji': ('Emoji',),
        'lakonlab.datasets.fashion_mnist': ('FashionMNIST',),
        'lakonlab.datasets.image_prompt': ('ImagePrompt',),
        'lakonlab.datasets.imagenet': ('ImageNet',),
    },
    mmengine_registry.DATASETS,
)

METRICS = LazyRegistry(
    'metric',
    {
        'lakonlab.evaluation.metrics': (
            'FrechetDistance',
            'ClassAccuracy',
            'ReferenceRMSE',
        ),
        'lakonlab.evaluation.inception_metrics': ('InceptionMetrics',),
        'lakonlab.evaluation.clip_scores': ('CLIPSimilarity', 'HPSv2'),
        'lakonlab.evaluation.color_stats': ('ColorStats',),
        'lakonlab.evaluation.diversity': (
            'CosineDiversity',
            'FeatureDiversity',
            'LPIPSDiversity',
            'ReferenceLPIPS',
            'VendiScore',
        ),
        'lakonlab.evaluation.sampling_cost': ('SamplingCost', 'SamplingSpeed'),
        'lakonlab.evaluation.hpsv3': ('HPSv3',),
        'lakonlab.evaluation.vqa_score': ('VQAScore',),
        'lakonlab.evaluation.exports': ('ADMExport', 'DPGBenchExport', 'GenEvalExport', 'HPSv3BenchmarkExport'),
    },
    mmengine_registry.METRICS,
)

FEATURE_EXTRACTORS = LazyRegistry(
    'feature extractor',
    {
        'lakonlab.evaluation.digit_classifier': ('DigitClassifier',),
        'lakonlab.evaluation.dinov2': ('DINOv2',),
        'lakonlab.evaluation.inception': ('InceptionV3',),
        'lakonlab.evaluation.mobilenet': ('MobileNetV2',),
    },
)

IMAGE_DISTANCES = LazyRegistry(
    'distance of images',
    {
        'lakonlab.evaluation.lpips_network': ('LPIPSNetwork',),
    },
)

PROMPT_SCORERS = LazyRegistry(
    'prompt scorer',
    {
        'lakonlab.evaluation.clip_scores': ('OpenClipScorer',),
        'lakonlab.evaluation.hpsv3': ('Qwen2VLReward',),
        'lakonlab.evaluation.vqa_score': ('ClipT5Scorer',),
    },
)

HOOKS = LazyRegistry(
    'hook',
    {
        'lakonlab.runner.hooks.ema': ('ExponentialMovingAverageHook',),
        'lakonlab.runner.hooks.checkpoint': ('CheckpointHook',),
        'lakonlab.evaluation.hook': ('GenerativeEvalHook',),
    },
    mmengine_registry.HOOKS,
)

STRATEGIES = LazyRegistry(
    'strategy',
    {
        'lakonlab.parallel.single': ('single',),
        'lakonlab.parallel.ddp': ('ddp',),
        'lakonlab.parallel.fsdp': ('fsdp',),
        'lakonlab.parallel.fsdp2': ('fsdp2',),
    },
)
