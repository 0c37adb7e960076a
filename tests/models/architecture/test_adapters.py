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


ALPHA = 1.5  # half the rank


def product(lora, layer, alphas=()):
    """What a layer's matrices add to its weights."""
    down, up = lora[f'{layer}.lora_A.weight'].float(), lora[f'{layer}.lora_B.weight'].float()
    return dict(alphas).get(layer, down.shape[0]) / down.shape[0] * up @ down


def renamed(lora, down='lora_A.weight', up='lora_B.weight', change=lambda layer: layer, alpha=None):
    """The same matrices under the names of another tool."""
    file = {}
    for name, value in lora.items():
        layer, side = name.split('.lora_')
        file[f'{change(layer)}.{down if side == "A.weight" else up}'] = value
        if alpha is not None:
            file[f'{change(layer)}.alpha'] = torch.tensor(alpha)
    return file


def flat_name(layer):
    return 'lora_unet_' + layer.replace('.', '_')


LAYOUTS = {
    'without a prefix': dict(),
    'diffusers': dict(change='transformer.{}'.format),
    'a training run': dict(down='lora_A.default.weight', up='lora_B.default.weight'),
    'diffusers with alpha': dict(change='transformer.{}'.format, alpha=ALPHA),
}
OF_QWEN = {
    'lightx2v': dict(down='lora_down.weight', up='lora_up.weight', alpha=ALPHA),
    'lightx2v without alpha': dict(down='lora_down.weight', up='lora_up.weight'),
    'comfy': dict(change='diffusion_model.{}'.format),
    'comfy with alpha': dict(change='diffusion_model.{}'.format, alpha=ALPHA),
    'kohya': dict(down='lora_down.weight', up='lora_up.weight', change=flat_name, alpha=ALPHA),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ('family', 'layout'),
    [(family, name) for family in TARGETS for name in LAYOUTS] + [('QwenImage', name) for name in OF_QWEN],
)
def test_layouts(family, layout, dtype, tmp_path):
    """Whatever the names and whoever applies alpha: alpha / rank B A is added to the same layers."""
    plain = {name: value.to(dtype) for name, value in matrices(family, '').items()}
    options = {**LAYOUTS, **OF_QWEN}[layout]
    save_file(renamed(plain, **options), tmp_path / 'lora.safetensors')
    lora, alphas = read_lora(str(tmp_path / 'lora.safetensors'), f'{family}LoraLoaderMixin')
    assert lora.keys() == plain.keys()
    for layer in {name.split('.lora_')[0] for name in plain}:
        expected = product(plain, layer) * (0.5 if options.get('alpha') else 1)
        torch.testing.assert_close(product(lora, layer, alphas), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('family', list(TARGETS))
def test_alpha_equals_that_of_diffusers(family):
    plain, merged, fused = matrices(family, ''), transformer(family), transformer(family)
    layers = sorted({name.split('.lora_')[0] for name in plain})
    alphas = {layer: 0.5 + place for place, layer in enumerate(layers)}
    merge_lora(merged, plain, 0.75, alphas)
    named = {f'transformer.{layer}.alpha': alpha for layer, alpha in alphas.items()}
    fused.load_lora_adapter(matrices(family), prefix='transformer', network_alphas=named)
    fused.fuse_lora(0.75)
    fused.unload_lora()
    expected = fused.state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_layout_of_kohya_for_flux(tmp_path):
    """The fused projections of FLUX, at its width, are taken apart."""
    width, rank = 3072, 2
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=generator) for size in ((rank, width), (7 * width, rank)))
    name = 'lora_unet_single_blocks_0_linear1'
    file = {f'{name}.lora_down.weight': down, f'{name}.lora_up.weight': up, f'{name}.alpha': torch.tensor(1.0)}
    save_file(file, tmp_path / 'lora.safetensors')
    lora, alphas = read_lora(str(tmp_path / 'lora.safetensors'), 'FluxLoraLoaderMixin')
    parts = [f'single_transformer_blocks.0.{part}' for part in ('attn.to_q', 'attn.to_k', 'attn.to_v', 'proj_mlp')]
    assert {layer.split('.lora_')[0] for layer in lora} == set(parts)
    for part, rows in zip(parts, up.split([width, width, width, 4 * width])):
        found = {f'{part}.lora_A.weight': lora[f'{part}.lora_A.weight']}
        found[f'{part}.lora_B.weight'] = lora[f'{part}.lora_B.weight'][-8:]
        torch.testing.assert_close(product(found, part, alphas), rows[-8:] @ down / rank)


def test_convolutions():
    """Against the convolution of a convolution."""
    layer = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)
    model = torch.nn.ModuleDict({'conv': layer})
    down, up, images = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        added = torch.nn.functional.conv2d(torch.nn.functional.conv2d(images, down, padding=1), up)
        expected = layer(images) + 0.5 * added
        merge_lora(model, {'conv.lora_A.weight': down, 'conv.lora_B.weight': up}, 0.5)
        torch.testing.assert_close(layer(images), expected)


def test_half_precision_is_rounded_once():
    model, plain = transformer('Flux').bfloat16(), matrices('Flux', '')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model, {name: value.half() for name, value in plain.items()}, 0.3)
    for layer in {name.split('.lora_')[0] for name in plain}:
        exact = before[f'{layer}.weight'].double() + 0.3 * product(
            {name: value.half() for name, value in plain.items()}, layer
        )
        found = model.get_submodule(layer).weight
        away = (found.double() - exact).abs()
        step = torch.maximum(exact.abs(), torch.tensor(2.0**-20)) * 2.0**-8
        assert (away <= step * 1.001).all(), layer
        assert found.dtype == torch.bfloat16
    touched = {f'{name.split(".lora_")[0]}.weight' for name in plain}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name not in touched)


Q = 'transformer_blocks.0.attn.to_q'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda lora: lora.pop(f'{Q}.lora_B.weight'), r'to_q has no lora_B\.weight'),
        (lambda lora: lora.pop(f'{Q}.lora_A.weight'), r'to_q has no lora_A\.weight'),
        (
            lambda lora: lora.update({'x.lora_A.weight': torch.zeros(3, 3), 'x.lora_B.weight': torch.zeros(3, 3)}),
            r"no layer 'x'",
        ),
        (
            lambda lora: lora.update({f'{Q}.lora_A.weight': torch.zeros(3, 31)}),
            r'to_q has weights \(32, 32\), its matrices \(3, 31\)',
        ),
        (lambda lora: lora.update({f'{Q}.lora_A.weight': torch.zeros(2, 32)}), r'its matrices \(2, 32\) and \(32, 3\)'),
        (lambda lora: lora.update({f'{Q}.lora_A.weight': torch.zeros(())}), r'its matrices \(\) and \(32, 3\)'),
        (lambda lora: lora.update({f'{Q}.lora_B.bias': torch.zeros(32)}), r'to_q\.lora_B\.bias is no low-rank matrix'),
        (
            lambda lora: lora.update({f'{Q}.lora_magnitude_vector.weight': torch.zeros(32)}),
            r'to_q\.lora_magnitude_vector\.weight is no low-rank matrix',
        ),
    ],
)
def test_misfits_are_named_before_anything_changes(change, message):
    lora = matrices('Flux', '')
    change(lora)
    model = transformer('Flux')
    with pytest.raises(
        PretrainedError, match=rf'pretrained_lora: .*{message}.* no matrices for FluxTransformer2DModel'
    ):
        merge_lora(model, lora)
    expected = transformer('Flux').state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_all_misfits_are_told_at_once():
    lora = {name.replace('blocks.0', 'blocks.7'): value for name, value in matrices('Flux', '').items()}
    with pytest.raises(PretrainedError, match=r"no layer 'single.*7.*; there is no layer 'trans.*7") as caught:
        merge_lora(transformer('Flux'), lora, key='pretrained_adapter')
    assert str(caught.value).startswith('pretrained_adapter: ')


def test_alpha_of_a_layer_without_matrices():
    with pytest.raises(PretrainedError, match=r'norm has an alpha, but no matrices'):
        merge_lora(transformer('Flux'), matrices('Flux', ''), alphas={'norm': 1.0})


@pytest.mark.parametrize('name', ['dora_scale', 'lora_magnitude_vector.weight'])
def test_magnitudes_are_not_dropped(name, tmp_path):
    save_file({**matrices('Flux'), f'transformer.{Q}.{name}': torch.ones(32)}, tmp_path / 'lora.safetensors')
    with pytest.raises(PretrainedError, match=rf'pretrained_lora=.*DoRA.*{Q}\.{name}'):
        read_lora(str(tmp_path / 'lora.safetensors'), 'FluxLoraLoaderMixin')


def test_converters_refuse(tmp_path):
    path = str(tmp_path / 'lora.safetensors')
    save_file({'lora_unet_some_unet.lora_down.weight': torch.zeros(1, 2), 'y.alpha': torch.ones(1, 2)}, path)
    for converter in ('FluxLoraLoaderMixin', 'QwenImageLoraLoaderMixin'):
        with pytest.raises(PretrainedError, match=rf'pretrained_lora=.*no layout that {converter} knows'):
            read_lora(path, converter)
    with pytest.raises(PretrainedError, match="lora_converter='FluksLoraLoaderMixin' is no class of diffusers"):
        read_lora(path, 'FluksLoraLoaderMixin')


def test_export_of_a_training_checkpoint(tmp_path):
    """Whichever of both files is named, the adapter is the same; of a checkpoint, that of the average."""
    state = {**matrices('Flux', ''), 'norm_out.linear.bias': torch.ones(4), 'proj_out_means.bias': torch.ones(3)}
    save_file(state, tmp_path / 'a.safetensors')
    checkpoint = {}
    for prefix, factor in (('diffusion.denoising.', 0), ('diffusion_ema.denoising.', 1)):
        for name, value in state.items():
            side = name.replace('lora_A.', 'lora_A.default.').replace('lora_B.', 'lora_B.default.')
            checkpoint[prefix + side] = factor * value
    torch.save({'state_dict': checkpoint, 'meta': {'iter': 1}, 'optimizer': {}}, tmp_path / 'iter_1.pth')
    exported, trained = (read_adapter(str(tmp_path / name)) for name in ('a.safetensors', 'iter_1.pth'))
    for own, expected in ((trained.lora, exported.lora), (trained.tensors, exported.tensors)):
        assert own.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in own.items())
    assert set(exported.tensors) == {'norm_out.linear.bias', 'proj_out_means.bias'}
    assert exported.policy == trained.policy == {}


@pytest.mark.parametrize('where', ['file', 'folder', 'server'])
def test_policy_is_found_wherever_the_file_is(where, tmp_path, monkeypatch):
    folder = tmp_path / 'student_v0.1'
    folder.mkdir()
    path = folder / 'diffusion_pytorch_model.safetensors'
    save_file(matrices('Flux', ''), path, metadata={'policy_config': '{"type": "GMFlow"}'})
    if where == 'server':
        monkeypatch.setattr('lakonlab.models.architecture.loading.fetch', lambda uri: folder)
    name = {'file': str(path), 'folder': str(folder), 'server': 'huggingface://org/model/student_v0.1'}[where]
    assert read_adapter(name).policy == {'type': 'GMFlow'}


def test_file_without_matrices(tmp_path):
    save_file({'a.weight': torch.zeros(1)}, tmp_path / 'a.safetensors')
    with pytest.raises(PretrainedError, match=r'pretrained_lora=.*1 tensors that are no low-rank matrices.*a\.weight'):
        read_lora(str(tmp_path / 'a.safetensors'))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    return {family: tiny.teacher_file(family, folder) for family in tiny.SIZES}


class TestExport:
    """Files in the published layout, as a training run would be exported."""

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

    def changed(self, weights, tmp_path, change):
        path, state = self.exported(self.trained('Flux', 'GM', weights), tmp_path / 'a.safetensors')
        change(state)
        save_file(state, path)
        return path

    DAMAGES = {
        'no head': lambda state: [state.pop(name) for name in list(state) if name.startswith('proj_out_logstds')],
        'no matrices of a layer': lambda state: [state.pop(name) for name in list(state) if '0.ff.net.2' in name],
        'a layer of the base': lambda state: state.update({'x_embedder.weight': torch.full((32, 16), 7.0)}),
        'a head of another size': lambda state: state.update({'proj_out_logweights.bias': torch.zeros(3)}),
    }

    @pytest.mark.parametrize('damage', DAMAGES)
    @pytest.mark.parametrize('tie_teacher', [True, False])
    def test_what_is_not_whole_is_refused(self, damage, tie_teacher, weights, tmp_path):
        path = self.changed(weights, tmp_path, self.DAMAGES[damage])
        changes = dict(tie_teacher=tie_teacher, diffusion__denoising__pretrained_adapter=path)
        config = tiny.config('Flux', 'GM', weights['Flux'], **changes)
        if damage == 'a layer of the base' and not tie_teacher:
            network = tiny.build(config).diffusion.denoising  # a base of its own may be changed
            assert dict(named_state(network))['x_embedder.weight'].eq(7).all()
            return
        with pytest.raises(PretrainedError, match='pretrained_adapter=') as error:
            tiny.build(config)
        expected = {
            'no head': 'proj_out_logstds.1.weight',
            'no matrices of a layer': 'ff.net.2.lora_A',
            'a layer of the base': 'x_embedder.weight',
            'a head of another size': 'proj_out_logweights.bias',
        }
        assert expected[damage] in str(error.value)

    @pytest.mark.parametrize('tie_teacher', [True, False])
    @pytest.mark.parametrize('key', ['pretrained_adapter', 'pretrained_lora'])
    def test_a_plan_names_the_key_of_a_missing_file(self, key, tie_teacher, weights):
        part = 'diffusion' if key == 'pretrained_adapter' else 'teacher'
        changes = {'tie_teacher': tie_teacher, f'{part}__denoising__{key}': 'nowhere.safetensors'}
        config = tiny.config('Flux', 'GM', weights['Flux'], **changes)
        with torch.device('meta'), pytest.raises(FileNotFoundError, match=rf"{key}='nowhere.safetensors'"):
            tiny.build(config)

    def test_with_adapters_of_its_own_an_export_is_where_they_begin(self, weights, tmp_path):
        """Whether the base is shared or not."""
        model = self.trained('Flux', 'GM', weights)
        path, _ = self.exported(model, tmp_path / 'a.safetensors')
        changes = dict(tie_teacher=False, diffusion__denoising__pretrained_adapter=path)
        again = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], **changes))
        for name, value in tiny.trainable(model).items():
            assert torch.equal(tiny.trainable(again)[name], value), name


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
