"""The networks against recorded vectors of the published numerics."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.models.architecture.loading import read_weights
from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import RecordedSource
from lakonlab.registry import MODULES
from tests import golden

FORWARD = [name for name in golden.names('arch_dit') if not name.startswith('init_from_teacher')]
INITIALISATION = [
    (topic, name)
    for topic in ('arch_dit', 'arch_flux', 'arch_qwen')
    for name in golden.names(topic, 'init_from_teacher')
]
FLUX = [name for name in golden.names('arch_flux') if not name.startswith('init_from_teacher')]
QWEN = [name for name in golden.names('arch_qwen') if not name.startswith('init_from_teacher')]
#: Family -> type of the teacher.
TEACHERS = {
    'arch_dit': 'DiTTransformer2DModelMod',
    'arch_flux': 'FluxTransformer2DModel',
    'arch_qwen': 'QwenImageTransformer2DModel',
}
TYPE_OF = {'gm_mlp2d': 'GMFlowMLP2DDenoiser', 'spectrum_mlp': 'SpectrumMLP'}
MANIFESTS = sorted((golden.DATA.parent / 'manifests').glob('*.json.gz'))


def build(case: dict, name: str = '', **arguments) -> torch.nn.Module:
    config = {'type': TYPE_OF.get(name), **case['params']['build'], **arguments}
    return MODULES.build({key: value for key, value in config.items() if value is not None}).eval()


@pytest.mark.parametrize('name', FORWARD)
def test_forward(name):
    case = golden.load('arch_dit')[name]
    network = build(case, name)
    network.load_state_dict(case['net'])  # strict: the names are the published ones
    given, expected = case['in'], case['out']
    if name == 'spectrum_mlp':
        found = {size: network(given[f'{size}.mean'], given[f'{size}.var']) for size in ('sz8x8', 'sz6x5')}
    elif name == 'gm_mlp2d':
        found = network(given['x'], given['t'])
    else:
        found = {}
        for size, images, times in (('native', 'x', given['t']), ('other', 'x2', given['t'] / 1000)):
            output = network(given[images], times, given['class_labels'])
            output = output if isinstance(output, dict) else {'y': output}
            found.update({f'{size}.{key}': value for key, value in output.items()})
    assert found.keys() == expected.keys()
    for key in expected:
        golden.assert_close(found[key], expected[key], 2e-5)


def with_weights(case: dict, **arguments) -> torch.nn.Module:
    """The network of a case, its weights put in by their published names."""
    network = build(case, **arguments)
    state = dict(named_state(network))
    assert state.keys() == case['net'].keys()
    for name, tensor in state.items():
        tensor.data.copy_(case['net'][name])
    return network


def as_dict(output) -> dict[str, torch.Tensor]:
    return output if isinstance(output, dict) else {'y': output}


@torch.no_grad()
@pytest.mark.parametrize('name', FLUX)
def test_flux_forward(name):
    case = golden.load('arch_flux')[name]
    given = dict(case['in'])
    found = as_dict(with_weights(case)(given.pop('x'), given.pop('t'), **given))
    assert found.keys() == case['out'].keys()
    for key, expected in case['out'].items():
        golden.assert_close(found[key], expected, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', QWEN)
@pytest.mark.parametrize('prompts', ['equal', 'ragged', 'single'])
def test_qwen_image_forward(name, prompts):
    """Recorded where padding is attended to; where it is masked, a sample of a ragged batch is as if it were alone."""
    case = golden.load('arch_qwen')[name]
    given = case['in']
    mask = given['mask' if prompts == 'equal' else 'mask_ragged']
    arguments = {'encoder_hidden_states': given['encoder_hidden_states'], 'encoder_hidden_states_mask': mask}
    rows = slice(0, 1) if prompts == 'single' else slice(None)
    inputs = given['x'][rows], given['t'][rows]
    arguments = {key: value[rows] for key, value in arguments.items()}
    expected = {key.partition('.')[2]: value for key, value in case['out'].items() if key.startswith(prompts)}
    found = as_dict(with_weights(case, attend_to_padding=True)(*inputs, **arguments))
    assert found.keys() == expected.keys()
    for key in expected:
        golden.assert_close(found[key], expected[key], 2e-5)

    masked = as_dict(with_weights(case)(*inputs, **arguments))
    for key in expected:
        alone = case['out'][f'single.{key}']
        golden.assert_close(masked[key][:1], alone if prompts != 'equal' else expected[key][:1], 2e-5)


@pytest.mark.parametrize(('topic', 'name'), INITIALISATION)
def test_initialisation_from_teacher(topic, name, tmp_path):
    case = golden.load(topic)[name]
    arguments = golden.load(topic)[topic.removeprefix('arch_')]['params']['build'].keys()
    shape = {key: value for key, value in case['params']['build'].items() if key in arguments}
    teacher = MODULES.build({**shape, 'type': TEACHERS[topic]})
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter)
    heads = {key.removeprefix('teacher.'): value for key, value in case['in'].items() if key.startswith('teacher.')}
    weights = {**{key: value.detach() for key, value in named_state(teacher)}, **heads}
    save_file(weights, tmp_path / 'teacher.safetensors')

    student = build(case)
    draw = case['in']['draw']
    source = RecordedSource({'head_bias': [draw] if draw.numel() else []})
    loaded = read_weights(str(tmp_path / 'teacher.safetensors'))
    student.load_published(student.remap_pretrained(loaded, source), 'the teacher')

    assert not any(source.remaining.values())
    state = dict(named_state(student))
    for key in case['params']['copied_keys']:
        assert torch.equal(state[key], weights[key]), key
    for key, expected in case['out'].items():
        golden.assert_close(state[key], expected, 1e-6)


def _manifest(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize(
    'path', [p for p in MANIFESTS if 'adapter' in p.name and 'imagenet' in p.name], ids=lambda p: p.name[:-8]
)
def test_exported_files_fit(path):
    """A published export is a whole network; beyond its tensors it may hold only what we declare to ignore."""
    manifest = _manifest(path)
    config = dict(manifest['config_json'])
    config = {key: value for key, value in config.items() if key != '_diffusers_version'}
    with torch.device('meta'):
        network = MODULES.build({'type': config.pop('_class_name'), **config})
    state = dict(named_state(network))
    extra = manifest['tensors'].keys() - state.keys()
    assert extra <= set(network.ignored_keys)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: shape for name, (shape, *_) in manifest['tensors'].items() if name not in extra
    }
