"""Adapters in files: against diffusers' and peft's own treatment of them."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from lakonlab.models.architecture.adapters import merge_lora, read_adapter, read_lora
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.models.architecture.roles import named_state
from tests import tiny_text_image as tiny
from tests.golden import DATA

FLUX = dict(
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6),
)
QWEN = dict(
    patch_size=1,
    in_channels=16,
    out_channels=16,
    num_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    axes_dims_rope=(4, 6, 6),
)
TARGETS = {'Flux': ['to_q', 'proj_mlp', 'ff.net.2'], 'QwenImage': ['to_q', 'img_mlp.net.2']}
RANK = 3


def transformer(family):
    torch.manual_seed(0)
    kind = getattr(diffusers, f'{family}Transformer2DModel')
    return kind(**{'Flux': FLUX, 'QwenImage': QWEN}[family])


def matrices(family, prefix='transformer.'):
    """Random matrices for the layers of the family's targets."""
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, module in transformer(family).named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(TARGETS[family])):
            lora[f'{prefix}{name}.lora_A.weight'] = torch.randn(RANK, module.in_features, generator=generator)
            lora[f'{prefix}{name}.lora_B.weight'] = torch.randn(module.out_features, RANK, generator=generator)
    assert lora
    return lora


@pytest.mark.parametrize('family', list(TARGETS))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 0.125])
def test_merging_equals_fusing_by_diffusers(family, dtype, scale, tmp_path):
    save_file(matrices(family), tmp_path / 'lora.safetensors')
    ours, theirs = transformer(family).to(dtype), transformer(family).float()
    lora, alphas = read_lora(str(tmp_path / 'lora.safetensors'), f'{family}LoraLoaderMixin')
    merge_lora(ours, lora, scale, alphas)
    theirs.load_state_dict({name: value.float() for name, value in transformer(family).to(dtype).state_dict().items()})
    theirs.load_lora_adapter(matrices(family), prefix='transformer')
    theirs.fuse_lora(scale)
    theirs.unload_lora()
    expected = theirs.to(dtype).state_dict()  # fused in float32, then rounded
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(
            tensor.float(), expected[name].float(), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
        ), name


@pytest.mark.parametrize('family', list(TARGETS))
def test_alpha(family, tmp_path):
    """The factor is alpha / rank, whichever layout says it."""
    plain = matrices(family, '')
    layer = next(iter(plain)).removesuffix('.lora_A.weight')
    before = transformer(family)
    doubled = transformer(family)
    single = {name: value for name, value in plain.items() if name.startswith(layer)}
    merge_lora(doubled, single, 1.0, {layer: 2.0 * RANK})
    merged = transformer(family)
    merge_lora(merged, single)
    weights = [dict(model.named_parameters())[f'{layer}.weight'] for model in (before, merged, doubled)]
    torch.testing.assert_close(weights[2] - weights[0], 2 * (weights[1] - weights[0]), rtol=1e-4, atol=1e-5)


def test_layout_of_other_tools(tmp_path):
    """``diffusion_model.<layer>.lora_down.weight`` with an alpha, as few-step Qwen-Image adapters are published."""
    layer, alpha = 'transformer_blocks.0.img_mlp.net.2', 1.5
    plain = {name: value for name, value in matrices('QwenImage', '').items() if name.startswith(layer)}
    file = {
        f'diffusion_model.{layer}.lora_down.weight': plain[f'{layer}.lora_A.weight'],
        f'diffusion_model.{layer}.lora_up.weight': plain[f'{layer}.lora_B.weight'],
        f'diffusion_model.{layer}.alpha': torch.tensor(alpha),
    }
    save_file(file, tmp_path / 'lora.safetensors')
    lora, alphas = read_lora(str(tmp_path / 'lora.safetensors'), 'QwenImageLoraLoaderMixin')
    found, expected = transformer('QwenImage'), transformer('QwenImage')
    merge_lora(found, lora, 1.0, alphas)
    merge_lora(expected, plain, alpha / RANK)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_layout_that_nobody_knows(tmp_path):
    save_file({'lora_unet_nothing.lora_down.weight': torch.zeros(1)}, tmp_path / 'lora.safetensors')
    with pytest.raises(PretrainedError, match='FluxLoraLoaderMixin'):
        read_lora(str(tmp_path / 'lora.safetensors'), 'FluxLoraLoaderMixin')
    with pytest.raises(PretrainedError, match=r"lora_converter='Nobody'"):
        read_lora(str(tmp_path / 'lora.safetensors'), 'Nobody')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda lora: lora.pop('transformer_blocks.0.attn.to_q.lora_B.weight'), r'to_q has no lora_B.weight'),
        (
            lambda lora: lora.update({'x.lora_A.weight': torch.zeros(3, 3), 'x.lora_B.weight': torch.zeros(3, 3)}),
            r"no layer 'x'",
        ),
        (
            lambda lora: lora.update({'transformer_blocks.0.attn.to_q.lora_A.weight': torch.zeros(3, 31)}),
            r'to_q has weights \(32, 32\), its matrices \(3, 31\)',
        ),
    ],
)
def test_misfits_are_named_before_anything_changes(change, message):
    lora = matrices('Flux', '')
    change(lora)
    model = transformer('Flux')
    with pytest.raises(PretrainedError, match=message):
        merge_lora(model, lora)
    expected = transformer('Flux').state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_file_without_matrices(tmp_path):
    save_file({'a.weight': torch.zeros(1)}, tmp_path / 'a.safetensors')
    with pytest.raises(PretrainedError, match=r'pretrained_lora=.*1 tensors that are no low-rank matrices.*a\.weight'):
        read_lora(str(tmp_path / 'a.safetensors'))


class TestExport:
    """Files in the published layout, as a training run would be exported."""

    @pytest.fixture(scope='class')
    def weights(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp('weights')
        return {family: tiny.teacher_file(family, folder) for family in tiny.SIZES}

    def trained(self, family, policy, weights):
        """A student whose every trained tensor was moved."""
        model = tiny.build(tiny.config(family, policy, weights[family]), family)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in tiny.trainable(model).values():
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
        return model

    def exported(self, model, path, prefix='', metadata=None):
        names = tiny.trainable(model)
        state = {
            prefix + name.removeprefix('diffusion.denoising.').replace('.default.', '.'): value.detach().contiguous()
            for name, value in names.items()
        }
        save_file(state, path, metadata=metadata)
        return str(path), state

    def output(self, model, family):
        generator = torch.Generator().manual_seed(3)
        x_t = torch.randn(2, *tiny.LATENT_SIZE, generator=generator)
        conditions = dict(tiny.batch(family)['prompt_embed_kwargs'])
        if family == 'Flux':
            conditions['guidance'] = torch.full((2,), 3.5)
        with torch.no_grad():
            output = model.role('student').denoising(x_t, torch.tensor([0.3, 0.8]), **conditions)
        return torch.cat([value.flatten() for value in output.values()]) if isinstance(output, dict) else output

    @pytest.mark.parametrize('family', list(tiny.SIZES))
    @pytest.mark.parametrize('policy', ['GM', 'DX'])
    def test_merged_for_inference(self, family, policy, weights, tmp_path):
        model = self.trained(family, policy, weights)
        path, state = self.exported(model, tmp_path / 'a.safetensors', 'transformer.')
        adapter = read_adapter(path)
        assert adapter.lora.keys() | adapter.tensors.keys() == {name.removeprefix('transformer.') for name in state}
        denoising = dict(tiny.config(family, policy, weights[family])['diffusion']['denoising'])
        for key in ('freeze', 'freeze_exclude', 'use_lora', 'lora_target_modules', 'lora_rank'):
            denoising.pop(key)
        config = tiny.config(family, policy, weights[family], inference_only=True)
        config['diffusion']['denoising'] = {**denoising, 'pretrained_adapter': path}
        merged = tiny.build(config, family)
        expected, found = self.output(model, family), self.output(merged, family)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert not any('lora' in name for name, _ in named_state(merged))

    @pytest.mark.parametrize('policy', ['GM', 'DX'])
    def test_training_goes_on_from_it(self, policy, weights, tmp_path):
        """With a shared base the matrices become the student's adapter, and the teacher stays as it is."""
        model = self.trained('Flux', policy, weights)
        path, _ = self.exported(model, tmp_path / 'a.safetensors')
        config = tiny.config('Flux', policy, weights['Flux'], diffusion__denoising__pretrained_adapter=path)
        again = tiny.build(config)
        for name, value in tiny.trainable(model).items():
            assert torch.equal(tiny.trainable(again)[name], value), name
        assert torch.equal(self.output(again, 'Flux'), self.output(model, 'Flux'))

    def test_policy_in_the_metadata(self, weights, tmp_path):
        model = self.trained('Flux', 'DX', weights)
        text = '{"segment_size": 0.2857142857142857, "shift": 3.2, "type": "DX"}'
        path, _ = self.exported(model, tmp_path / 'a.safetensors', metadata={'policy_config': text})
        assert read_adapter(path).policy == {'segment_size': 2 / 7, 'shift': 3.2, 'type': 'DX'}
        path, _ = self.exported(model, tmp_path / 'b.safetensors', metadata={'policy_config': '{'})
        with pytest.raises(PretrainedError, match='policy_config is damaged'):
            read_adapter(path)

    def test_adapter_of_another_student(self, weights, tmp_path):
        path, _ = self.exported(self.trained('Flux', 'DX', weights), tmp_path / 'a.safetensors')
        config = tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__pretrained_adapter=path)
        with pytest.raises(PretrainedError, match=r'pretrained_adapter=.*proj_out\.bias'):
            tiny.build(config)


def test_manifests_of_exports_are_what_students_train():
    """Names and shapes of published exports equal those of the trained tensors of the config they come from."""
    import gzip
    import json

    from lakonlab.registry import MODULES

    manifests = DATA.parent / 'manifests'
    for path in sorted(manifests.glob('pi[fq]*.adapter.json.gz')):
        if 'imagenet' in path.name or '8step' in path.name or 'datafree' in path.name:
            continue
        adapter = json.loads(gzip.decompress(path.read_bytes()))
        student = json.loads(gzip.decompress(path.with_name(path.name.replace('adapter', 'student')).read_bytes()))
        config = {key: value for key, value in student['build'].items() if not key.startswith('pretrained')}
        with torch.device('meta'):
            network = MODULES.build(config)
        own = {
            name.replace('.default.', '.'): list(tensor.shape)
            for name, tensor in named_state(network)
            if tensor.requires_grad
        }
        assert own == {name: shape for name, (shape, *_) in adapter['tensors'].items()}, path.name
