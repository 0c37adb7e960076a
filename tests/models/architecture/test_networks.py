"""What holds for every network of the DiT family."""

import copy
import subprocess
import sys

import pytest
import torch

from lakonlab.config.signature import arguments_of
from lakonlab.models.architecture.embeddings import position_table
from lakonlab.ops.random_source import RecordedSource
from lakonlab.registry import MODULES
from tests.models.architecture.networks import ALL, TINY, build, flat, inputs, randomised


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def gradients(network, size=(8, 8)):
    network.zero_grad()
    output = flat(network(*inputs(size)))
    output.square().mean().backward()
    return output.detach(), {key: value.grad.clone() for key, value in network.named_parameters()}


def test_gradient_checkpointing_is_bitwise_equal(name):
    plain = randomised(build(name, checkpointing=False))
    recomputed = build(name, checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    output, expected = gradients(plain)
    same_output, found = gradients(recomputed)
    assert torch.equal(output, same_output)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_gradient_checkpointing_repeats_dropout(name):
    network = randomised(build(name, dropout=0.5))
    network.checkpointing = False
    torch.manual_seed(0)
    output, expected = gradients(network)
    network.checkpointing = True
    torch.manual_seed(0)
    same_output, found = gradients(network)
    assert torch.equal(output, same_output)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize('size', [(8, 8), (12, 6), (2, 2), (16, 8)])
def test_shapes_at_any_size(name, size):
    output = build(name)(*inputs(size))
    if isinstance(output, dict):
        assert output['means'].shape == (3, 3, 4, *size)
        assert output['logweights'].shape == (3, 3, 1, *size)
        assert output['logstds'].shape == (3, 1, 1, 1, 1)
        assert torch.allclose(output['logweights'].exp().sum(dim=1), torch.ones(3, 1, *size))
    else:
        assert output.shape == ((3, 4, *size) if name == 'DiTTransformer2DModelMod' else (3, 3, 4, *size))


def test_image_size_must_fit_the_patches(name):
    with pytest.raises(ValueError, match=r'7 x 8 is no multiple of patch_size=2'):
        build(name)(*inputs((7, 8)))


def test_gradient_does_not_reach_the_condition_through_the_standard_deviation():
    network = randomised(build('GMDiTTransformer2DModelV2'))
    network(*inputs())['logstds'].sum().backward()
    receivers = {key.split('.')[0] for key, value in network.named_parameters() if value.grad is not None}
    assert receivers == {'proj_out_logstds'}


def test_a_sample_does_not_depend_on_its_batch(name):
    network = randomised(build(name)).eval()
    images, times, labels = inputs()
    alone = flat(network(images[1:2], times[1:2], labels[1:2]))
    among = network(images, times, labels)
    among = {key: value[1:2] for key, value in among.items()} if isinstance(among, dict) else among[1:2]
    assert torch.allclose(alone, flat(among), atol=1e-5)


@pytest.mark.parametrize('options', [{'torch_dtype': 'bfloat16'}, {'autocast_dtype': 'bfloat16'}])
def test_lower_precision(name, options):
    network = randomised(build(name, **options))
    exact = randomised(build(name))
    expected, found = flat(exact(*inputs())), flat(network(*inputs()))
    assert found.dtype == torch.float32
    assert not torch.equal(expected, found)
    assert (expected - found).abs().max() < 0.05 * expected.abs().max()
    found.mean().backward()
    assert {value.dtype for value in network.parameters()} == {network.torch_dtype}


def test_float32_head_is_not_rounded_by_a_low_precision_input():
    network = build('GMDiTTransformer2DModelV2', freeze=True, freeze_exclude=['proj_out'], torch_dtype='bfloat16')
    images, times, labels = inputs()
    output = randomised(network)(images.bfloat16(), times, labels)
    assert {value.dtype for value in output.values()} == {torch.float32}
    assert not torch.equal(output['means'], output['means'].bfloat16().float())


def test_autocast_needs_float32_weights(name):
    with pytest.raises(ValueError, match="needs torch_dtype='float32', found 'bfloat16'"):
        build(name, torch_dtype='bfloat16', autocast_dtype='bfloat16')


def test_meta_construction_and_materialisation(name):
    with torch.device('meta'):
        network = build(name)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    expected = randomised(build(name))
    network.to_empty(device='cpu')
    network.load_state_dict(expected.state_dict())
    assert torch.equal(flat(network(*inputs())), flat(expected(*inputs())))


def test_meta_forward(name):
    with torch.device('meta'):
        network = build(name)
    output = network(*(tensor.to('meta') for tensor in inputs()))
    assert all(value.is_meta for value in (output.values() if isinstance(output, dict) else [output]))


def test_copies_are_independent(name):
    network = randomised(build(name, freeze=True, freeze_exclude=['proj_out'], torch_dtype='bfloat16'))
    twin = copy.deepcopy(network)
    before = flat(twin(*inputs())).detach()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(flat(twin(*inputs())), before)


def test_inference_before_training(name):
    network = randomised(build(name))
    with torch.inference_mode():
        network(*inputs())
    flat(network(*inputs())).mean().backward()


def test_compiles_to_one_graph(name):
    network = randomised(build(name, checkpointing=False))
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend='eager')
    for size in ((8, 8), (4, 6), (12, 6)):
        assert torch.equal(flat(compiled(*inputs(size))), flat(network(*inputs(size))))


def test_compile_forward():
    plain = randomised(build('DiTTransformer2DModelMod'))
    network = build('DiTTransformer2DModelMod', compile_forward=True, compile_kwargs={'backend': 'eager'})
    network.load_state_dict(plain.state_dict())
    assert torch.equal(network(*inputs()), plain(*inputs()))
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_class_dropout_replaces_labels_by_the_null_class():
    network = randomised(build('DiTTransformer2DModelMod', class_dropout_prob=0.5))
    images, times, labels = inputs()
    source = RecordedSource({'class_dropout': [torch.tensor([0.4, 0.6, 0.4])]})
    dropped = network(images, times, labels, source=source)
    labels = torch.tensor([10, labels[1], 10])
    network.eval()  # without a draw
    assert torch.equal(dropped, network(images, times, labels))


def test_constructor_arguments_are_visible_to_the_config_check(name):
    arguments = arguments_of(MODULES.get(name))
    assert {*TINY, *ALL[name], 'freeze', 'pretrained', 'torch_dtype', 'mlp_ratio'} <= arguments.names
    assert not arguments.is_open


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_layers': 0}, 'num_layers=0: expected a positive integer'),
        ({'activation_fn': 'relu'}, "activation_fn='relu': expected one of gelu"),
        ({'norm_type': 'layer_norm'}, "norm_type='layer_norm'"),
        ({'sample_size': 9}, 'sample_size=9 is no multiple of patch_size=2'),
        ({'attention_head_dim': 7}, 'num_attention_heads \\* attention_head_dim = 14'),
        ({'torch_dtype': 'float31'}, "torch_dtype='float31' is not a floating point dtype"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build('DiTTransformer2DModelMod', **arguments)


def test_dx_needs_a_grid_or_a_polynomial():
    with pytest.raises(ValueError, match='either n_grid or p_order, found n_grid=3, p_order=4'):
        build('DXDiTTransformer2DModel', n_grid=3, p_order=4)


def test_position_table_spans_the_range_of_the_native_size():
    native, wide = position_table(16, 4, 4, 4), position_table(16, 4, 4, 8)
    assert torch.equal(native.view(4, 4, 16), wide.view(4, 8, 16)[:, ::2])


def test_nothing_heavy_is_imported():
    code = (
        'import sys, lakonlab.models.architecture.dxflow.dxdit, lakonlab.models.architecture.gmflow.gmdit; '
        "print([name for name in ('diffusers', 'transformers', 'peft') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'
