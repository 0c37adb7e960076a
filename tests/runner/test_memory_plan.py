"""What a dry run says of memory, against what small models really allocate."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODELS, MODULES
from lakonlab.runner.activation_memory import measure_inference, measure_training
from lakonlab.runner.memory_plan import (
    GIBIBYTE,
    OVERHEAD,
    Sizes,
    number_of_moments,
    optimizer_bytes,
    parse_world_sizes,
    plan,
    recommendation,
    smallest_card,
    table,
)
from lakonlab.runner.memory_sizes import latent_size_of, sizes_of
from lakonlab.runner.optimizer import build_optimizers
from tests import tiny_text_image as tiny

OPTIMIZERS = {'diffusion': dict(type='AdamW', lr=1e-3)}
DIT = dict(num_layers=6, num_attention_heads=2, attention_head_dim=32, sample_size=32, num_embeds_ada_norm=10)
NETWORKS = {
    'dit': dict(type='DiTTransformer2DModelMod', **DIT),
    'mixture dit': dict(type='GMDiTTransformer2DModelV2', num_gaussians=3, logstd_inner_dim=12, **DIT),
    'mixture dit in bfloat16': dict(
        type='GMDiTTransformer2DModelV2', num_gaussians=3, logstd_inner_dim=12, autocast_dtype='bfloat16', **DIT
    ),
    'flux': dict(
        type='GMFluxTransformer2DModel',
        num_gaussians=3,
        **{
            **tiny.SIZES['Flux'],
            'num_layers': 4,
            'num_single_layers': 5,
            'attention_head_dim': 32,
            'axes_dims_rope': (8, 12, 12),
        },
    ),
    'adapted qwen image': dict(
        type='DXQwenImageTransformer2DModel',
        n_grid=3,
        freeze=True,
        freeze_exclude=['proj_out', 'norm_out', 'lora'],
        use_lora=True,
        lora_rank=4,
        lora_target_modules=tiny.LORA_TARGETS['QwenImage'],
        **{**tiny.SIZES['QwenImage'], 'num_layers': 5},
    ),
    'qwen image of which the first block is hardly trained': dict(
        type='GMQwenImageTransformer2DModel',
        num_gaussians=3,
        freeze=True,
        freeze_exclude=['proj_out_means', 'proj_out_logweights', 'proj_out_logstds', 'norm_out', 'lora'],
        use_lora=True,
        lora_rank=4,
        lora_target_modules=['img_mlp.net.2'],
        **{**tiny.SIZES['QwenImage'], 'num_layers': 7},
    ),
}


def peak_of(events) -> int:
    """Most bytes that were allocated at once, from the allocator's own record."""
    live = peak = 0
    for event in sorted((e for e in events if e.name() == '[memory]'), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_activations_are_what_a_real_pass_allocates(name, checkpointing):
    """All blocks, real values, the allocator's record; against shapes of two and three blocks."""
    size = (4, 32, 32)
    options = {**NETWORKS[name], 'checkpointing': checkpointing}
    network = MODULES.build(options).train()
    inputs = network.example_inputs(4, size)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = network(**inputs)
        outputs = [t for t in (output.values() if isinstance(output, dict) else [output]) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
    real = peak_of(profiler.profiler.kineto_results.events())
    with torch.device('meta'):
        planned = MODULES.build(options)
    found = measure_training(planned, planned.example_inputs(4, size), checkpointing)
    assert found.peak == pytest.approx(real, rel=0.05)
    assert found.held <= found.peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        network(**inputs)
    real = peak_of(profiler.profiler.kineto_results.events())
    assert measure_inference(planned, planned.example_inputs(4, size)) == pytest.approx(real, rel=0.2)


def test_checkpointing_is_left_as_it_was():
    with torch.device('meta'):
        network = MODULES.build({**NETWORKS['flux'], 'checkpointing': False}).eval()
    measure_training(network, network.example_inputs(1, (4, 32, 32)), True)
    assert not network.checkpointing
    assert not network.training
    assert len(network.transformer.single_transformer_blocks) == 5
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize('tie_teacher', [True, False])
def test_states_are_what_a_run_holds(tie_teacher, tmp_path):
    """Bytes of weights, averages, gradients and moments after a step of training; a shared base counts once."""
    model = tiny.config('Flux', 'GM', tiny.teacher_file('Flux', tmp_path), tie_teacher=tie_teacher)
    real = tiny.build(model)
    optimizers = build_optimizers(real, OPTIMIZERS)
    real.train_step(tiny.batch('Flux'), optimizers, running_status={'iteration': 0}, source=SeededSource(0, 0))
    sections = tiny.SECTIONS
    with torch.device('meta'):
        planned = MODELS.build({**model, **sections})
    cfg = dict(model=model, optimizer=OPTIMIZERS, data=dict(train_dataloader=dict(samples_per_gpu=2)), **sections)
    sizes, _ = sizes_of(planned, cfg)

    held = {id(tensor): tensor for _, tensor in named_state(real)}
    held.update({id(buffer): buffer for buffer in real.buffers()})
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert sizes.frozen + sizes.resident + sizes.trainable + sizes.average == weights
    trained = tiny.trainable(real).values()
    assert sizes.gradients == sum(value.grad.numel() * 4 for value in trained) == sizes.trainable == sizes.average
    moments = [v for state in optimizers['diffusion'].state.values() for v in state.values() if v.dim() > 0]
    assert sizes.optimizer == sum(value.numel() * 4 for value in moments)
    teacher = sum(tensor.numel() * tensor.element_size() for _, tensor in named_state(real.teacher))
    assert sizes.resident == (0 if tie_teacher else teacher)
    assert sizes.kept > sizes.checkpointed > 0


SIZES = Sizes(
    frozen=40 * GIBIBYTE,
    resident=1 * GIBIBYTE,
    trainable=4 * GIBIBYTE,
    average=4 * GIBIBYTE,
    gradients=4 * GIBIBYTE,
    optimizer=8 * GIBIBYTE,
    kept=60 * GIBIBYTE,
    checkpointed=6 * GIBIBYTE,
    gathered=GIBIBYTE,
)


def test_sharding_by_hand():
    alone = plan(SIZES, 'ddp', 8)
    assert (alone.states, alone.gathered) == (61 * GIBIBYTE, 0)
    assert (alone.kept, alone.checkpointed) == (121 * GIBIBYTE, 67 * GIBIBYTE)
    shared = plan(SIZES, 'fsdp', 8)
    assert shared.states == GIBIBYTE + 60 * GIBIBYTE // 8
    assert shared.checkpointed == shared.states + GIBIBYTE + 6 * GIBIBYTE
    assert plan(SIZES, 'fsdp2', 32).states == shared.states  # every node of eight holds a whole copy
    assert plan(SIZES, 'fsdp2', 32, hybrid_sharding=False).states == GIBIBYTE + 60 * GIBIBYTE // 32
    assert plan(SIZES, 'fsdp', 1).states == alone.states


def test_sentences():
    plans = [plan(SIZES, strategy, size) for size in (1, 8) for strategy in ('ddp', 'fsdp', 'fsdp2')]
    assert recommendation(plans, checkpointing=True) == [
        'One process needs a card of 80 GB.',
        'On 8 processes ddp needs a card of 80 GB, fsdp and fsdp2 need a card of 24 GB.',
    ]
    assert recommendation(plans[:1], checkpointing=False) == ['One process needs a card of 141 GB.']
    assert smallest_card(24 * GIBIBYTE - OVERHEAD) == 24
    assert smallest_card(24 * GIBIBYTE - OVERHEAD + 1) == 32
    assert smallest_card(1000 * GIBIBYTE) is None
    assert any('67.0' in line for line in table(plans))


def test_unknown_activations_are_said():
    unknown = plan(Sizes(1, 1, 1, 1, 1, 1, None, None), 'ddp', 1)
    assert unknown.kept is None
    assert 'unknown' in table([unknown])[1]
    model = torch.nn.Module()
    model.diffusion = torch.nn.Module()
    model.diffusion.denoising = torch.nn.Linear(2, 2)
    sizes, notes = sizes_of(model, dict(model={}, optimizer=OPTIMIZERS, data={}))
    assert sizes.kept is None
    assert any('no example_inputs' in note for note in notes)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(type='AdamW'), 8),
        (dict(type='AdamW', amsgrad=True), 12),
        (dict(type='AdamW8bit'), 2),
        (dict(type='Lion8bit'), 1),
        (dict(type='SGD'), 0),
        (dict(type='SGD', momentum=0.9), 4),
        (dict(type='Adagrad'), 4),
    ],
)
def test_optimizers(options, expected):
    assert optimizer_bytes(options, [(1, 4)]) == expected
    assert number_of_moments(options) in (0, 1, 2, 3)


def test_world_sizes():
    assert parse_world_sizes('8, 32') == [8, 32]
    for text in ('0', 'a', '8,', '-1', '1.5'):
        with pytest.raises(ValueError, match=r'--plan-world-size.*expected positive whole numbers'):
            parse_world_sizes(text)
    with pytest.raises(ValueError, match=r"strategy='zero'"):
        plan(SIZES, 'zero', 1)
    with pytest.raises(ValueError, match=r'world_size=0'):
        plan(SIZES, 'ddp', 0)


def test_latent_size():
    data = dict(train=dict(latent_size=(4, 8, 8)))
    assert latent_size_of(dict(model={}, data=data)) == (4, 8, 8)
    assert latent_size_of(dict(model=dict(patch_size=2), data=data)) == (16, 4, 4)
    assert latent_size_of(dict(model={}, data={}, test_cfg=dict(latent_size=(1, 2, 2)))) == (1, 2, 2)
    assert latent_size_of(dict(model={}, data={})) is None


def test_full_size_in_seconds():
    """The ImageNet model at its published batch, which would take more than a hundred gigabytes."""
    from lakonlab.runner.dry_run import build_on_meta

    cfg = load_config('configs/gmflow/gmdit_k8_imagenet_8gpus.py')
    sizes, notes = sizes_of(build_on_meta(cfg, locate=False), cfg)
    number = 676_220_208
    assert sizes.gradients == sizes.trainable
    assert 0 <= sizes.average - sizes.trainable < 100  # the running means of the loss are averaged too
    assert sizes.trainable == pytest.approx(4 * number, rel=0.01)
    assert sizes.kept > 100 * GIBIBYTE > 30 * GIBIBYTE > sizes.checkpointed
    assert any('micro-batches of 512 with latents 4 x 32 x 32' in note for note in notes)


def digits_plan(**options):
    """Sizes of the digits student under options of sharding, and its notes."""
    from lakonlab.runner.dry_run import build_on_meta

    cfg = load_config('configs/digits/gmdit_k8_digits_piid_2step.py')
    cfg.fsdp_kwargs = options
    return sizes_of(build_on_meta(cfg, locate=False), cfg)


def test_what_is_not_shared_out():
    states = {}
    for name, options in {
        'all': {},
        'average whole': dict(exclude_keys=['diffusion_ema']),
        'frozen whole': dict(ignore_frozen_parameters=True),
        'student whole': dict(exclude_keys=['diffusion']),
    }.items():
        sizes, _ = digits_plan(**options)
        states[name] = plan(sizes, 'fsdp', 8).states
        assert plan(sizes, 'ddp', 8).states == sizes.states
    part = 7 * sizes.average // 8
    assert states['average whole'] - states['all'] == pytest.approx(part, abs=8)
    assert states['frozen whole'] - states['all'] == pytest.approx(part + 7 * sizes.frozen // 8, abs=8)
    trained = sizes.trainable + sizes.gradients + sizes.optimizer
    assert states['student whole'] - states['all'] == pytest.approx(7 * trained // 8, abs=8)


def test_modules_that_are_gathered():
    blocks, _ = digits_plan()
    named, _ = digits_plan(fsdp_modules=['lakonlab.models.architecture.diffusers.dit.DiTBlock'])
    assert blocks.gathered == named.gathered > 0
    for path, message in {
        'no.such.Block': 'expected the dotted path of a class',
        'torch.nn.Bilinear': 'of which the model has no instance.*DiTBlock',
    }.items():
        with pytest.raises(ConfigError, match=message):
            digits_plan(fsdp_modules=[path])
