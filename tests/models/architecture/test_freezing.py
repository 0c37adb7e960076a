"""Which parameters train, and in which precision."""

import pytest
import torch

from lakonlab.models.architecture.freezing import freeze
from tests.models.architecture.networks import ALL, build, flat, inputs, randomised


def trainable(network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize('name', ALL)
def test_freeze_all(name):
    assert not trainable(build(name, freeze=True))
    assert all(parameter.requires_grad for parameter in build(name).parameters())


@pytest.mark.parametrize(
    ('keys', 'prefixes'),
    [
        (['proj_out'], ('proj_out',)),
        (['proj_out_means', 'emb.timestep'], ('proj_out_means', 'emb.timestep_embedder')),
        (['self.proj_out_1'], ('proj_out_1',)),
        (['norm1'], ('transformer_blocks.0.norm1', 'transformer_blocks.1.norm1')),
    ],
)
def test_exclusion_by_part_of_a_name(keys, prefixes):
    network = build('GMDiTTransformer2DModelV2', freeze=True, freeze_exclude=keys, torch_dtype='bfloat16')
    expected = {name for name, _ in network.named_parameters() if name.startswith(prefixes)}
    assert trainable(network) == expected
    assert expected
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if name in expected else torch.bfloat16)


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_exclusion_of_single_parameters(compute):
    """A layer computes in one precision, so its frozen weight follows its trained bias."""
    network = build(
        'GMDiTTransformer2DModelV2',
        freeze=True,
        freeze_exclude=['to_q.bias'],
        torch_dtype='bfloat16',
        freeze_exclude_autocast_dtype=compute,
    )
    layers = [f'transformer_blocks.{block}.attn1.to_q' for block in (0, 1)]
    assert trainable(network) == {f'{layer}.bias' for layer in layers}
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if name.rpartition('.')[0] in layers else torch.bfloat16)
    output = network(*inputs())
    sum(tensor.float().square().mean() for tensor in output.values()).backward()
    assert all(network.get_submodule(layer).bias.grad.isfinite().all() for layer in layers)


def test_exclusion_without_float32():
    network = build(
        'GMDiTTransformer2DModelV2',
        freeze=True,
        freeze_exclude=['proj_out'],
        torch_dtype='bfloat16',
        freeze_exclude_fp32=False,
    )
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert trainable(network)


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
@pytest.mark.parametrize('key', ['proj_out', 'attn1', 'norm1', 'emb', 'transformer_blocks', 'to_q'])
def test_mixed_precision_runs_and_trains_what_it_should(key, compute):
    network = build(
        'GMDiTTransformer2DModelV2',
        freeze=True,
        freeze_exclude=[key],
        torch_dtype='bfloat16',
        freeze_exclude_autocast_dtype=compute,
    )
    output = flat(randomised(network)(*inputs()))
    expected = flat(randomised(build('GMDiTTransformer2DModelV2'))(*inputs()))
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()
    output.square().mean().backward()
    assert {name for name, parameter in network.named_parameters() if parameter.grad is not None} == trainable(network)


def test_trainable_head_computes_in_float32():
    network = randomised(
        build('DiTTransformer2DModelMod', freeze=True, freeze_exclude=['self.proj_out_2'], torch_dtype='bfloat16')
    )
    seen = []
    network.proj_out_2.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    network(*inputs())
    assert seen == [torch.float32]


def test_key_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'proj_out_mean5'.*near it: proj_out_means"):
        build('GMDiTTransformer2DModelV2', freeze=True, freeze_exclude=['proj_out_mean5'])


def test_exclusion_needs_freeze():
    with pytest.raises(ValueError, match='has no effect without freeze=True'):
        build('DiTTransformer2DModelMod', freeze_exclude=['proj_out'])


def test_freeze_reports_what_trains():
    network = build('DiTTransformer2DModelMod')
    assert set(freeze(network, ['proj_out_2'])) == trainable(network) == {'proj_out_2.weight', 'proj_out_2.bias'}
