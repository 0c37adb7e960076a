"""Every option of the strategies that divide weights: what it divides, and that training stays the same."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lakonlab.config.errors import ConfigError
from lakonlab.models.architecture.roles import own_state, unwrapped
from lakonlab.parallel.ddp import DataParallel
from lakonlab.parallel.fsdp import Unit
from lakonlab.parallel.state import local_part
from lakonlab.parallel.units import number_of_parts
from lakonlab.ranks import Ranks
from lakonlab.registry import MODULES, STRATEGIES
from tests import tiny_components
from tests.parallel.small_runs import SmallRun, build, worst_difference

SHARDED = pytest.mark.parametrize('strategy', ['fsdp', 'fsdp2'])
TOLERANCE = 2e-6
DIT_BLOCK = 'lakonlab.models.architecture.diffusers.dit.DiTBlock'
FLUX_BLOCK = 'diffusers.models.transformers.transformer_flux.FluxTransformerBlock'


def units_of(model):
    """Qualified names of the modules that are gathered at a time."""
    units = [name for name, module in model.named_modules() if isinstance(module, (Unit, FSDPModule))]
    return {'.'.join(part for part in name.split('.') if part != '_fsdp_wrapped_module') for name in units}


def describe(ranks, kind, strategy, num_steps=0, **run):
    """What is divided of a small run, and what it logs."""
    small_run = SmallRun(ranks, kind, strategy, **run)
    logs = [small_run.step() for _ in range(num_steps)]
    model = small_run.model
    return dict(
        logs=logs,
        samples=small_run.sample() if num_steps else None,
        units=units_of(model),
        held={name: held_by(child) for name, child in model.named_children()},
        data_parallel={name for name, child in model.named_children() if isinstance(child, DataParallel)},
    )


def held_by(module):
    """Qualified name -> number of elements that this process holds."""
    return {name: local_part(tensor).numel() for name, tensor in own_state(module)}


def failure(ranks, kind, strategy, num_steps=0, **run):
    """The message of the error that a small run ends with."""
    try:
        describe(ranks, kind, strategy, num_steps, **run)
    except (ValueError, RuntimeError) as error:
        return f'{type(error).__name__}: {error}'
    return 'none'


def divided(runs, kind, strategy, num_steps=3, train_cfg=None, **options):
    """What is divided in two processes; checks that they train like one, and hold everything between them."""
    run = dict(num_steps=num_steps, weights=runs.weights(kind))
    (alone,) = runs.call(1, describe, kind, 'single', **run)
    both = runs.call(2, describe, kind, strategy, options=options, train_cfg=train_cfg, **run)
    assert worst_difference(both[0]['logs'], alone['logs']) < TOLERANCE
    for role, samples in alone['samples'].items():
        assert torch.allclose(torch.cat([one['samples'][role] for one in both]), samples, rtol=0, atol=5e-6), role
    shares = {}
    for child, whole in alone['held'].items():
        ours, theirs = (one['held'][child] for one in both)
        assert ours.keys() == theirs.keys() == whole.keys()
        for name, size in whole.items():
            assert ours[name] + theirs[name] == size or ours[name] == theirs[name] == size, (child, name)
        if whole:
            shares[child] = sum(ours.values()) / sum(whole.values())
    return both[0], shares


def about_half(share):
    """Whether two processes share something equally."""
    return 0.4 < share < 0.6


@SHARDED
class TestUnits:
    def units(self, runs, kind, strategy, *patterns):
        options = dict(fsdp_modules=patterns)
        found = runs.call(2, describe, kind, strategy, options=options, weights=runs.weights(kind))
        student = 'diffusion.denoising'
        return {name.removeprefix(student) for name in found[0]['units'] if name.startswith(student)}

    def test_blocks_by_default(self, runs, strategy):
        blocks = {f'.transformer_blocks.{i}' for i in range(3)}
        assert self.units(runs, 'digits-GM', strategy) == {'', *blocks}

    @pytest.mark.parametrize('pattern', [DIT_BLOCK, 'DiTB*', 'transformer_blocks.*', 'lakonlab.*.DiTBlock'])
    def test_one_kind(self, runs, strategy, pattern):
        assert self.units(runs, 'digits-GM', strategy, pattern) == self.units(runs, 'digits-GM', strategy)

    def test_names(self, runs, strategy):
        found = self.units(runs, 'digits-GM', strategy, 'transformer_blocks.[02]', 'pos_embed')
        assert found == {'', '.transformer_blocks.0', '.transformer_blocks.2', '.pos_embed'}

    def test_blocks_of_a_shared_transformer(self, runs, strategy):
        """FSDP1 makes a unit of every trained module as well: a unit has one dtype, and averages are cut alike."""
        found = self.units(runs, 'Flux-GM', strategy, FLUX_BLOCK, 'single_transformer_blocks.1')
        chosen = {'', '.transformer_blocks.0', '.transformer_blocks.1', '.single_transformer_blocks.1'}
        apart = {
            f'.{name}'
            for name, module in build(
                'Flux-GM', runs.weights('Flux-GM')
            ).diffusion.denoising.transformer.named_modules()
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad or name.split('.')[-1] == 'ema' or '.ema.' in name
        }
        assert any('ema' in name for name in apart)
        expected = chosen | apart if strategy == 'fsdp' else chosen
        assert found == {f'.transformer{name}' for name in expected}

    def test_nothing_matches(self, runs, strategy):
        options = dict(fsdp_modules=[DIT_BLOCK, 'DitBlock'])
        (message, _) = runs.call(2, failure, 'digits-GM', strategy, options=options)
        assert message.startswith("ConfigError: fsdp_kwargs.fsdp_modules: found 'DitBlock'")
        assert DIT_BLOCK in message


@SHARDED
class TestWhatIsDivided:
    def test_by_default(self, runs, strategy):
        found, shares = divided(runs, 'digits-GM', strategy)
        assert about_half(shares['diffusion'])
        assert about_half(shares['diffusion_ema'])
        assert shares['teacher'] == 1
        assert not found['data_parallel']

    def test_frozen_children_too(self, runs, strategy):
        _, shares = divided(runs, 'digits-GM', strategy, wrap_frozen_modules=True)
        assert all(about_half(share) for share in shares.values())
        assert shares.keys() == {'diffusion', 'diffusion_ema', 'teacher'}

    def test_excluded_student(self, runs, strategy):
        """It and its average are whole and it is data-parallel, beside a teacher that is divided."""
        options = dict(exclude_keys=['diffusion'], wrap_frozen_modules=True)
        accumulated = dict(grad_accum_batch_size=1)
        found, shares = divided(runs, 'digits-data-free', strategy, train_cfg=accumulated, **options)
        assert shares['diffusion'] == shares['diffusion_ema'] == 1
        assert about_half(shares['teacher'])
        assert found['data_parallel'] == {'diffusion'}

    @pytest.mark.parametrize('key', ['teacher', 'vae'])
    def test_excluded_frozen_child(self, runs, strategy, key):
        _, shares = divided(runs, 'digits-GM', strategy, exclude_keys=[key], wrap_frozen_modules=True)
        assert about_half(shares['diffusion'])
        assert shares['teacher'] == 1 if key == 'teacher' else about_half(shares['teacher'])

    @pytest.mark.parametrize(
        ('keys', 'message'),
        [
            (['difusion'], "exclude_keys: found 'difusion', expected parts of the model: teacher, diffusion"),
            (['diffusion_ema'], "names 'diffusion_ema' without 'diffusion'"),
        ],
    )
    def test_excluded_wrongly(self, runs, strategy, keys, message):
        (found, _) = runs.call(2, failure, 'digits-GM', strategy, options=dict(exclude_keys=keys))
        assert found.startswith('ConfigError: fsdp_kwargs.')
        assert message in found

    def test_frozen_base(self, runs, strategy):
        _, shares = divided(runs, 'Flux-GM', strategy)
        assert about_half(shares['diffusion'])

    def test_frozen_parameters_left_whole(self, runs, strategy):
        found, shares = divided(runs, 'Flux-GM', strategy, ignore_frozen_parameters=True)
        assert 0.9 < shares['diffusion'] < 1
        weights = build('Flux-GM', runs.weights('Flux-GM')).diffusion
        whole = dict(own_state(weights))
        trained = {name for name, tensor in whole.items() if tensor.requires_grad or '.ema.' in name}
        held = found['held']['diffusion']
        assert all(held[name] == whole[name].numel() for name in whole.keys() - trained)
        assert about_half(sum(held[name] for name in trained) / sum(whole[name].numel() for name in trained))


class WithText(nn.Module):
    """Something trained beside a text encoder."""

    def __init__(self, config):
        super().__init__()
        self.diffusion = nn.ModuleDict({'denoising': nn.Linear(2, 2)})
        self.text_encoder = MODULES.build(config)


def encode_prompts(ranks, strategy, config):
    """Embeddings before and after dividing, the share of this process, and the units."""
    prompts = ['a photo of a brown bear', 'the sea at night'][ranks.rank :]  # not as many in every process
    torch.manual_seed(0)
    model = WithText(config)
    before, whole = model.text_encoder(prompt=prompts), sum(held_by(model.text_encoder).values())
    engine = STRATEGIES.build(dict(type=strategy, ranks=ranks, device='cpu', wrap_frozen_modules=True))
    model = engine.wrap(model)
    after = [model.text_encoder(prompt=prompts) for _ in range(2)]
    share = sum(held_by(model.text_encoder).values()) / whole
    return before, after, share, {name for name in units_of(model) if name.startswith('text_encoder')}


@SHARDED
@pytest.mark.parametrize('family', ['Flux', 'QwenImage'])
def test_text_encoders(runs, tmp_path, strategy, family):
    if family == 'Flux':
        config = dict(type='PretrainedFluxTextEncoder', model_name_or_path=str(tiny_components.flux_folder(tmp_path)))
        networks = {'text_encoder.text_encoder', 'text_encoder.text_encoder_2'}
    else:
        folder = tiny_components.qwen_image_folder(tmp_path)
        config = dict(type='PretrainedQwenImageTextEncoder', model_name_or_path=str(folder))
        networks = {'text_encoder.text_encoder'}
    config.update(torch_dtype='float32', max_sequence_length=16)
    for before, after, share, units in runs.call(2, encode_prompts, strategy, config):
        assert about_half(share)
        assert networks <= units
        for found in after:
            assert found.keys() == before.keys()
            for name, value in before.items():
                assert torch.equal(found[name], value), name


class WithTables(nn.Module):
    """A trained layer beside tables of numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer('scale', torch.full((4,), 1 / 3))
        self.register_buffer('order', torch.arange(4))

    def forward(self, x):
        """Scale and permute."""
        return self.layer(x) * self.scale[self.order]


def buffers_after(ranks, strategy, **options):
    """The buffers of a divided network, and what it gives."""
    model = nn.Module()
    model.diffusion = nn.ModuleDict({'denoising': WithTables()})
    engine = STRATEGIES.build(dict(type=strategy, ranks=ranks, device='cpu', **options))
    network = engine.wrap(model).diffusion['denoising']
    result = network(torch.ones(1, 4))
    tables = unwrapped(network)
    return tables.scale.dtype, tables.order.dtype, tables.layer.weight.dtype, bool(result.isfinite().all())


@SHARDED
def test_precision_of_buffers(runs, strategy):
    for found in runs.call(2, buffers_after, strategy, buffer_dtype='bfloat16'):
        assert found == (torch.bfloat16, torch.int64, torch.float32, True)
    for found in runs.call(2, buffers_after, strategy):
        assert found == (torch.float32, torch.int64, torch.float32, True)


@SHARDED
def test_precision_of_weights(runs, strategy):
    """Gathered in bfloat16, where the network computes in it; a network that computes in float32 is refused."""
    low = dict(param_dtype='bfloat16')
    (message, _) = runs.call(2, failure, 'digits-GM', strategy, options=low)
    assert "param_dtype='bfloat16', but diffusion.denoising computes in float32: set its autocast_dtype" in message
    half = dict(num_steps=3, networks=dict(autocast_dtype='bfloat16'))
    logs = runs.train(2, 'digits-GM', strategy, options=low, **half)[0]['logs']
    expected = runs.train(2, 'digits-GM', 'ddp', **half)[0]['logs']
    assert 0 < worst_difference(logs, expected) < 0.05


@pytest.mark.parametrize('key', ['param_dtype', 'reduce_dtype', 'buffer_dtype'])
def test_unknown_precision(key):
    with pytest.raises(ValueError, match=f"fsdp_kwargs.{key}='float31' is not a floating point dtype"):
        STRATEGIES.build(dict(type='fsdp2', device='cpu', **{key: 'float31'}))


@SHARDED
def test_gradients_are_summed_in_a_lower_precision(runs, strategy):
    """It costs about three digits, so it is not what happens by default."""
    logs = runs.train(2, 'digits-GM', strategy, num_steps=3, options=dict(reduce_dtype='bfloat16'))[0]['logs']
    assert 1e-5 < worst_difference(logs, runs.reference('digits-GM', num_steps=3)['logs']) < 0.05


@pytest.mark.parametrize(
    ('world_size', 'local', 'hybrid', 'shard_size', 'expected'),
    [
        (32, 8, True, None, 8),
        (32, 8, False, None, 32),
        (32, 8, True, 16, 16),
        (32, 8, False, 4, 4),
        (8, 8, True, None, 8),
        (6, 4, True, None, 2),  # nodes of unequal size
        (1, 1, True, None, 1),
    ],
)
def test_number_of_parts(world_size, local, hybrid, shard_size, expected):
    assert number_of_parts(world_size, local, hybrid, shard_size) == expected


@SHARDED
@pytest.mark.parametrize('shard_size', [3, 8, -1])
def test_wrong_number_of_parts(strategy, shard_size):
    with pytest.raises(ConfigError, match=rf'shard_size={shard_size}: expected a divisor of the 4 processes'):
        STRATEGIES.build(dict(type=strategy, ranks=Ranks(0, 4, 0, 4), device='cpu', shard_size=shard_size))


@SHARDED
@pytest.mark.parametrize('optimizer', ['Adafactor', 'Muon'])
def test_optimizers_of_whole_parameters(strategy, optimizer):
    section = dict(type=optimizer, lr=1e-3)
    with pytest.raises(ValueError, match=rf"optimizer\['diffusion'\].*{optimizer}.*whole parameters.*'ddp'"):
        STRATEGIES.build(dict(type=strategy, device='cpu')).check_optimizer('diffusion', section)
    STRATEGIES.build(dict(type='ddp', device='cpu')).check_optimizer('diffusion', section)


class WithSpare(nn.Module):
    """A network with a layer that takes part in every other pass only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)
        self.passes = 0

    def forward(self, x):
        """Use the spare layer in the second, fourth, ... pass."""
        self.passes += 1
        return self.used(x) if self.passes % 2 else self.spare(self.used(x))


def train_with_spare(ranks, strategy, **options):
    """Weights after four steps, or the message of the error they ended with."""
    model = nn.Module()
    model.diffusion = WithSpare()
    engine = STRATEGIES.build(dict(type=strategy, ranks=ranks, device='cpu', **options))
    model = engine.wrap(model)
    optimizer = torch.optim.SGD(model.diffusion.parameters(), lr=0.1)
    rows = torch.eye(2)[ranks.rank :: ranks.world_size]
    try:
        for _ in range(4):
            optimizer.zero_grad()
            with engine.accumulating(True):
                model.diffusion(rows).square().mean().backward()
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return {name: tensor.detach().clone() for name, tensor in own_state(model)}


@pytest.mark.parametrize(
    ('strategy', 'options'),
    [('ddp', {}), *((strategy, dict(exclude_keys=['diffusion'])) for strategy in ('fsdp', 'fsdp2'))],
)
def test_unused_parameters(runs, strategy, options):
    (message, _) = runs.call(2, train_with_spare, strategy, **options)
    assert 'find_unused_parameters=True' in message
    (alone,) = runs.call(1, train_with_spare, 'single')
    for found in runs.call(2, train_with_spare, strategy, find_unused_parameters=True, **options):
        assert found.keys() == alone.keys()
        assert all(torch.allclose(tensor, alone[name], rtol=0, atol=1e-6) for name, tensor in found.items())
