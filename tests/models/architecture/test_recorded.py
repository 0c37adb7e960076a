"""The networks against recorded vectors of the published numerics."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.models.architecture.loading import load_pretrained
from lakonlab.ops.random_source import RecordedSource
from lakonlab.registry import MODULES
from tests import golden

FORWARD = [name for name in golden.names('arch_dit') if not name.startswith('init_from_teacher')]
INITIALISATION = golden.names('arch_dit', 'init_from_teacher')
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


@pytest.mark.parametrize('name', INITIALISATION)
def test_initialisation_from_teacher(name, tmp_path):
    case = golden.load('arch_dit')[name]
    shape = {key: value for key, value in case['params']['build'].items() if key in _arguments_of_dit()}
    teacher = MODULES.build({**shape, 'type': 'DiTTransformer2DModelMod'})
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter)
    heads = {key.removeprefix('teacher.'): value for key, value in case['in'].items() if key.startswith('teacher.')}
    weights = {**teacher.state_dict(), **heads}
    save_file(weights, tmp_path / 'teacher.safetensors')

    student = build(case)
    draw = case['in']['draw']
    source = RecordedSource({'head_bias': [draw] if draw.numel() else []})
    load_pretrained(student, str(tmp_path / 'teacher.safetensors'), source)

    assert not any(source.remaining.values())
    state = student.state_dict()
    for key in case['params']['copied_keys']:
        assert torch.equal(state[key], weights[key]), key
    for key, expected in case['out'].items():
        golden.assert_close(state[key], expected, 1e-6)


def _arguments_of_dit():
    return golden.load('arch_dit')['dit']['params']['build'].keys()


def _manifest(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize('path', [p for p in MANIFESTS if 'adapter' not in p.name], ids=lambda p: p.name[:-8])
def test_full_size_names_and_shapes(path):
    manifest = _manifest(path)
    config = {key: value for key, value in manifest['build'].items() if key != 'pretrained'}
    with torch.device('meta'):
        network = MODULES.build(config)
    found = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix('torch.'), int(tensor.requires_grad)]
        for name, tensor in network.named_parameters()
    }
    assert found == manifest['state']
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.state_dict().keys() == manifest['state'].keys()


@pytest.mark.parametrize('path', [p for p in MANIFESTS if 'adapter' in p.name], ids=lambda p: p.name[:-8])
def test_exported_files_fit(path):
    """A published export is a whole network; beyond its tensors it may hold only what we declare to ignore."""
    manifest = _manifest(path)
    config = dict(manifest['config_json'])
    config = {key: value for key, value in config.items() if key != '_diffusers_version'}
    with torch.device('meta'):
        network = MODULES.build({'type': config.pop('_class_name'), **config})
    state = network.state_dict()
    extra = manifest['tensors'].keys() - state.keys()
    assert extra <= set(network.ignored_keys)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: shape for name, (shape, *_) in manifest['tensors'].items() if name not in extra
    }
