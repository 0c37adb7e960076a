"""Dropout that is drawn row by row, against whole batches, plain Python and torch's own dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.models.architecture.row_dropout import RowDropout, RowKeys, drop_by_row, keep_mask, row_keys
from lakonlab.ops.random_source import RecordedSource, SeededSource
from tests import tiny_text_image as tiny
from tests.models.architecture.networks import build, flat, randomised

FAMILIES = ('Flux', 'QwenImage')
families = pytest.mark.parametrize('family', FAMILIES)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    return {family: tiny.teacher_file(family, folder) for family in FAMILIES}


def random_adapters(model):
    """A new adapter adds nothing, so that dropping its inputs would change nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in tiny.trainable(model).items():
            if 'lora_B' in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def student(weights, family, dropout=0.5, sections=None, **changes):
    config = tiny.config(family, 'GM', weights[family], diffusion__denoising__lora_dropout=dropout, **changes)
    return random_adapters(tiny.build(config, family, **(sections or {})).train())


def given(family, batch_size=4):
    """Arguments of a network, whose prompts have different lengths where they may."""
    generator = torch.Generator().manual_seed(3)
    conditions = tiny.batch(family, batch_size)['prompt_embed_kwargs']
    if family == 'Flux':
        conditions['guidance'] = torch.full((batch_size,), 2.0)
    else:
        lengths = torch.tensor([2, 3, 5, 4])[:batch_size, None]
        conditions['encoder_hidden_states_mask'] = (torch.arange(5) < lengths).long()
    x_t = torch.randn(batch_size, *tiny.LATENT_SIZE, generator=generator)
    return {'hidden_states': x_t, 'timestep': torch.rand(batch_size, generator=generator), **conditions}


def rows_of(arguments, start, count):
    return {name: value[start : start + count] for name, value in arguments.items()}


def losses(output):
    """One number per row."""
    return sum(value.square().flatten(1).mean(1) for value in output.values())


def gradients(model):
    return {name: value.grad.clone() for name, value in tiny.trainable(model).items() if value.grad is not None}


def assert_near(found, expected, tolerance=1e-6):
    """Compare the vectors of all numbers."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([values[name].flatten() for name in expected]) for values in (found, expected))
    assert other.norm() > 0
    assert (one - other).norm() <= tolerance * other.norm()


# -- masks


def split_mix_64(seed, count):
    """The words of a generator after the paper, in plain integers."""
    words = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        word = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(word ^ (word >> 31))
    return words


def test_masks_are_the_bits_of_split_mix_64():
    seeds = [5, -3, 2**62 + 1]
    found = keep_mask(torch.tensor(seeds), (3, 7), 0.25)
    for seed, row in zip(seeds, found):
        words = split_mix_64(seed * 0x9E3779B97F4A7C15 % 2**64, 6)
        fields = [(word >> 16 * part) % 2**16 for word in words for part in range(4)]
        signed = [field - 2**16 if field >= 2**15 else field for field in fields]
        assert row.flatten().tolist() == [value >= 2**14 - 2**15 for value in signed[:21]]


def test_a_place_has_the_same_mask_whatever_follows():
    seeds = torch.tensor([11, 12])
    assert torch.equal(keep_mask(seeds, (9, 5), 0.5)[:, :4], keep_mask(seeds, (4, 5), 0.5))


@pytest.mark.parametrize('probability', [0.05, 0.5, 0.9])
def test_rate_and_independence(probability):
    keys = RowKeys()
    layers = [RowDropout(probability, place, keys) for place in ('blocks.0', 'blocks.1')]
    with keys.using(torch.tensor([1, 2, 2**52])):
        outputs = torch.stack([layer(torch.ones(3, 100, 1000)) for layer in layers]).flatten(2)
    values = outputs.unique()
    assert values[0] == 0
    assert len(values) == 2
    assert values[1].item() == pytest.approx(1 / (1 - probability), rel=1e-3)
    kept = (outputs > 0).double().flatten(0, 1)
    deviation = (probability * (1 - probability) / kept.shape[1]) ** 0.5
    assert (kept.mean(1) - (1 - probability)).abs().max() < 4 * deviation
    assert (outputs.mean(2) - 1).abs().max() < 4 * deviation / (1 - probability)
    # of rows, of layers, and of neighbouring features and tokens: correlations with a deviation of N ** -0.5
    correlations = torch.corrcoef(kept) - torch.eye(6)
    assert correlations.abs().max() < 4.5 * kept.shape[1] ** -0.5
    for lag in (1, 2, 3, 4, 1000):
        for row in kept:
            pair = torch.corrcoef(torch.stack([row[lag:], row[:-lag]]))
            assert pair[0, 1].abs() < 4.5 * kept.shape[1] ** -0.5


def test_a_row_does_not_depend_on_its_neighbours():
    keys = RowKeys()
    layer = RowDropout(0.5, 'block', keys)
    x = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 1, 4, 1])
    with keys.using(rows):
        together = layer(x)
        assert torch.equal(together, layer(x))
    alone = []
    for row in range(4):
        with keys.using(rows[row : row + 1]):
            alone.append(layer(x[row : row + 1]))
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[1] == 0, together[3] == 0)  # the same key
    assert not torch.equal(together[0] == 0, together[1] == 0)


def test_gradient_passes_where_features_are_kept():
    keys = RowKeys()
    layer = RowDropout(0.25, 'block', keys)
    x = torch.randn(2, 30, dtype=torch.bfloat16, requires_grad=True)
    with keys.using(torch.tensor([0, 1])):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    factor = torch.tensor(4 / 3, dtype=torch.bfloat16)
    assert torch.equal(x.grad, (output != 0) * factor)


def test_without_keys_it_is_the_dropout_of_torch():
    layer = RowDropout(0.5, 'block', RowKeys())
    x = torch.randn(5, 7)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.5))
    assert torch.equal(layer.eval()(x), x)


def test_evaluation_drops_nothing_in_a_forward_pass_with_keys():
    keys = RowKeys()
    layer = RowDropout(0.5, 'block', keys).eval()
    x = torch.randn(2, 7)
    with keys.using(torch.tensor([0, 1])):
        assert torch.equal(layer(x), x)


def test_an_input_that_does_not_begin_with_the_batch_is_named():
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    keys = drop_by_row(network)
    with keys.using(torch.tensor([0, 1])), pytest.raises(ValueError, match=r'1: .*\(6, 3\).*batch 2 rows.*lora_drop'):
        network(torch.randn(6, 3))


def test_only_what_drops_is_replaced():
    network = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Identity())
    assert row_keys(network) is None
    keys = drop_by_row(network, lambda name: f'published.{name}')
    assert [type(module) for module in network] == [nn.Dropout, RowDropout, nn.Identity]
    assert not network[1].training
    assert network[1].place == 'published.1'
    assert drop_by_row(network) is keys
    assert drop_by_row(nn.Sequential(nn.Dropout(0.0))) is None


@pytest.mark.parametrize('probability', [-0.1, 1.0])
def test_impossible_probabilities(weights, probability):
    with pytest.raises(ValueError, match=f'lora_dropout={probability}: expected at least 0'):
        student(weights, 'Flux', probability)
    with pytest.raises(ValueError, match=f'dropout of block: found a probability of {probability}'):
        RowDropout(probability, 'block', RowKeys())


# -- networks


@families
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_batch_equals_its_parts(weights, family, checkpointing):
    model = student(weights, family, diffusion__denoising__checkpointing=checkpointing)
    network = model.diffusion.denoising
    arguments = given(family)
    source = SeededSource(0, 5, row_ids=[7, 2, 9, 4])
    whole = losses(network(**arguments, source=SeededSource(0, 5, row_ids=[7, 2, 9, 4])))
    whole.mean().backward()
    expected = gradients(model)
    assert not torch.allclose(whole, losses(network.eval()(**arguments)), rtol=1e-3)
    network.train()
    for size in (2, 1):
        model.zero_grad()
        parts = []
        for start in range(0, 4, size):
            part = losses(network(**rows_of(arguments, start, size), source=source.rows(start, size)))
            (part.sum() / 4).backward()
            parts.append(part)
        assert_near({'losses': torch.cat(parts)}, {'losses': whole})
        assert_near(gradients(model), expected)


@families
def test_a_training_step_equals_its_micro_batches(weights, family):
    prompts = {name: value for name, value in given(family).items() if name.startswith(('encoder', 'pooled'))}
    data = {**tiny.batch(family, 4), 'prompt_embed_kwargs': prompts}
    found = []
    for size, seed in ((4, 1), (2, 1), (1, 1), (4, 2)):
        model = student(weights, family, sections=dict(grad_accum_batch_size=size))
        optimizer = {'diffusion': torch.optim.SGD(tiny.trainable(model).values(), lr=0.0)}
        logs = model.train_step(data, optimizer, running_status={'iteration': 3}, source=SeededSource(seed, 3))
        found.append((logs['log_vars'], gradients(model)))
    whole, *parts, otherwise = found
    # sums in another order round by some 1e-6, depending on the machine and its number of threads; other draws show
    for logs, grads in parts:
        assert logs['loss_diffusion'] == pytest.approx(whole[0]['loss_diffusion'], rel=1e-6)
        assert_near(grads, whole[1], 1e-5)
    with pytest.raises(AssertionError):
        assert_near(otherwise[1], whole[1], 1e-2)


@families
def test_checkpointing_is_bitwise_equal(weights, family):
    found = []
    for checkpointing in (False, True):
        model = student(weights, family, diffusion__denoising__checkpointing=checkpointing)
        output = model.diffusion.denoising(**given(family), source=SeededSource(0))
        losses(output).mean().backward()
        found.append((flat(output), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_near(found[1][1], found[0][1], 0)


@families
def test_other_passes_before_a_checkpointed_backward_pass(weights, family):
    """Of the student, of the other roles, and of a copy: each block is recomputed with the masks that it had."""
    arguments = given(family)
    plain = student(weights, family, diffusion__denoising__checkpointing=False)
    loss = 0
    source = SeededSource(0)
    for start in (0, 2):
        loss = loss + losses(plain.diffusion.denoising(**rows_of(arguments, start, 2), source=source)).sum()
    loss.backward()
    model = student(weights, family)
    twin = copy.deepcopy(model)
    source, loss = SeededSource(0), 0
    for start in (0, 2):
        loss = loss + losses(model.diffusion.denoising(**rows_of(arguments, start, 2), source=source)).sum()
    other = losses(model.diffusion.denoising(**rows_of(arguments, 0, 1), source=SeededSource(4))).sum()
    losses(twin.diffusion.denoising(**arguments, source=SeededSource(5))).sum().backward()
    with torch.no_grad():
        for role in ('teacher', 'ema', 'student'):
            model.role(role).denoising(**rows_of(arguments, 0, 3))
    loss.backward()
    assert_near(gradients(model), gradients(plain), 0)
    model.zero_grad()
    other.backward()
    assert gradients(model)


def test_passes_of_a_step_have_masks_of_their_own(weights):
    network = student(weights, 'Flux').diffusion.denoising
    source = SeededSource(0)
    first, second = (flat(network(**given('Flux'), source=source)) for _ in range(2))
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(first, flat(network(**given('Flux'), source=SeededSource(0))))


def test_keys_are_drawn_by_name(weights):
    """The same key gives the same masks, whatever source it comes from."""
    network = student(weights, 'Flux').diffusion.denoising
    uniform = SeededSource(0).uniform('network_dropout', (4,), torch.float64)
    recorded = RecordedSource({'network_dropout': [uniform]})
    assert torch.equal(
        flat(network(**given('Flux'), source=recorded)), flat(network(**given('Flux'), source=SeededSource(0)))
    )


def test_the_keys_are_gone_after_a_pass(weights):
    network = student(weights, 'Flux').diffusion.denoising
    losses(network(**given('Flux'), source=SeededSource(0))).sum().backward()
    assert row_keys(network).rows is None


def test_nothing_is_drawn_without_dropout_or_in_evaluation_mode(weights):
    nothing = RecordedSource({})
    student(weights, 'Flux', dropout=0.0).diffusion.denoising(**given('Flux'), source=nothing)
    model = student(weights, 'Flux')
    model.role('ema').denoising(**given('Flux'), source=nothing)
    model.role('teacher').denoising(**given('Flux'), source=nothing)
    model.eval().diffusion.denoising(**given('Flux'), source=nothing)


@pytest.mark.parametrize('trained', [[], ['ff.net.2', 'proj_mlp'], ['single_transformer_blocks.1']])
def test_a_shared_base_drops_what_a_base_of_its_own_drops(weights, trained):
    exclude = [*tiny.TRAINED['GM'], *trained]
    changes = dict(diffusion__denoising__freeze_exclude=exclude)
    shared = student(weights, 'Flux', **changes)
    separate = student(weights, 'Flux', tie_teacher=False, tie_ema=False, **changes)
    values = dict(named_state(shared))
    with torch.no_grad():
        for name, tensor in named_state(separate):
            tensor.copy_(values[name])
    outputs = [flat(model.diffusion.denoising(**given('Flux'), source=SeededSource(0))) for model in (shared, separate)]
    assert torch.equal(*outputs)


@families
def test_names_do_not_change(weights, family):
    with_dropout, without = (student(weights, family, dropout) for dropout in (0.5, 0.0))
    assert [name for name, _ in named_state(with_dropout)] == [name for name, _ in named_state(without)]
    assert with_dropout.state_dict().keys() == without.state_dict().keys()


def test_a_copy_has_keys_of_its_own(weights):
    model = student(weights, 'Flux')
    twin = copy.deepcopy(model)
    original, copied = model.diffusion.denoising, twin.diffusion.denoising
    assert copied.dropout_keys is not original.dropout_keys
    for network in (original, copied):
        layers = [part for part in network.transformer.modules() if isinstance(part, RowDropout)]
        assert len(layers) == 7  # of two blocks of each kind two layers and one, and one that embeds the time
        assert all(layer.keys is network.dropout_keys for layer in layers)
    outputs = [flat(network(**given('Flux'), source=SeededSource(0))) for network in (original, copied)]
    assert torch.equal(*outputs)


def test_nothing_draws_from_the_global_state(weights):
    networks = {
        'LoRA': (student(weights, 'Flux').diffusion.denoising, given('Flux')),
        'DiT': (
            build('GMDiTTransformer2DModelV2', dropout=0.5, class_dropout_prob=0.5),
            dict(hidden_states=torch.zeros(3, 4, 8, 8), timestep=torch.ones(3), class_labels=torch.arange(3)),
        ),
    }
    for network, arguments in networks.values():
        state = torch.get_rng_state()
        losses(network(**arguments, source=SeededSource(0))).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_dropout_in_blocks_of_a_dit(checkpointing):
    network = randomised(build('DXDiTTransformer2DModel', dropout=0.5, checkpointing=checkpointing))
    generator = torch.Generator().manual_seed(0)
    x_t, times = torch.randn(4, 4, 8, 8, generator=generator), torch.rand(4, generator=generator)
    labels = torch.arange(4)
    found = []
    for size in (4, 2):
        network.zero_grad()
        source = SeededSource(0)
        outputs = []
        for start in range(0, 4, size):
            rows = slice(start, start + size)
            outputs.append(network(x_t[rows], times[rows], labels[rows], source=source.rows(start, size)))
            outputs[-1].square().mean().mul(size / 4).backward()
        found.append({'output': torch.cat(outputs), **{name: p.grad for name, p in network.named_parameters()}})
    assert_near(found[1], found[0])
    assert not torch.allclose(found[0]['output'], network.eval()(x_t, times, labels), rtol=1e-3)
