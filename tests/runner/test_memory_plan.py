"""What a dry run says of memory, against what small models really allocate."""

import copy
import dataclasses

import pytest
import torch

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODELS, MODULES
from lakonlab.runner.activation_memory import measure_inference, measure_training
from lakonlab.runner.allocation_record import recording
from lakonlab.runner.dry_run import build_on_meta, memory_plans
from lakonlab.runner.memory_plan import (
    GIBIBYTE,
    OVERHEAD,
    SHARDING,
    Activations,
    Sharding,
    Sizes,
    number_of_moments,
    optimizer_bytes,
    parse_world_sizes,
    plan,
    recommendation,
    remarks,
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
        lora_dropout=0.1,
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
    with recording() as record:
        output = network(**inputs)
        outputs = [t for t in (output.values() if isinstance(output, dict) else [output]) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
    with torch.device('meta'):
        planned = MODULES.build(options)
    found = measure_training(planned, planned.example_inputs(4, size), checkpointing)
    assert found.peak == pytest.approx(record.peak(), rel=0.05)
    assert found.held <= found.peak
    with recording() as record, torch.no_grad():
        network(**inputs)
    assert measure_inference(planned, planned.example_inputs(4, size)) == pytest.approx(record.peak(), rel=0.01)


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
    assert sizes.kept.peak > sizes.checkpointed.peak > 0


SIZES = Sizes(
    frozen=40 * GIBIBYTE,
    resident=1 * GIBIBYTE,
    trainable=4 * GIBIBYTE,
    average=4 * GIBIBYTE,
    gradients=4 * GIBIBYTE,
    optimizer=8 * GIBIBYTE,
    kept=Activations(held=58 * GIBIBYTE, peak=60 * GIBIBYTE, asking=59 * GIBIBYTE),
    checkpointed=Activations(held=2 * GIBIBYTE, peak=6 * GIBIBYTE, asking=3 * GIBIBYTE),
    sharding={
        strategy: Sharding(optimizer=8 * GIBIBYTE, gathered=GIBIBYTE, unit_gradients=GIBIBYTE // 8)
        for strategy in SHARDING
    },
    saved=8 * GIBIBYTE,
)
SEVERAL = dataclasses.replace(SIZES, passes=4)


def test_one_process_by_hand():
    alone = plan(SIZES, 'single', 1)
    assert (alone.states, alone.gathered, alone.gradients_between) == (61 * GIBIBYTE, 0, 0)
    assert alone.kept == (57 + 60) * GIBIBYTE  # gradients grow while activations shrink
    assert alone.checkpointed == (57 + 4 + 4) * GIBIBYTE  # all gradients, and what the last block works with
    assert plan(SEVERAL, 'single', 1).kept == (61 + 60) * GIBIBYTE  # those of the pass before are there
    assert alone.host == (8 + 8) * GIBIBYTE
    asking = dataclasses.replace(SIZES, checkpointed=Activations(2 * GIBIBYTE, 6 * GIBIBYTE, 20 * GIBIBYTE))
    assert plan(asking, 'single', 1).checkpointed == (57 + 20) * GIBIBYTE


def test_sharding_by_hand():
    alone = plan(SIZES, 'ddp', 8)
    assert (alone.states, alone.gathered) == (61 * GIBIBYTE, 0)
    assert (alone.kept, alone.checkpointed) == (121 * GIBIBYTE, 67 * GIBIBYTE)  # buckets are always there
    assert alone.host == 16 * GIBIBYTE
    shared = plan(SIZES, 'fsdp', 8)
    assert (shared.parts, shared.states) == (8, GIBIBYTE + 60 * GIBIBYTE // 8)
    without_gradients = shared.states - GIBIBYTE // 2
    assert shared.kept == without_gradients + (60 + 1) * GIBIBYTE + GIBIBYTE // 8
    assert shared.checkpointed == without_gradients + (6 + 1) * GIBIBYTE + GIBIBYTE // 8
    assert shared.host == 2 * GIBIBYTE
    assert plan(SIZES, 'fsdp2', 32).states == shared.states  # every node of eight holds a whole copy
    assert plan(SIZES, 'fsdp2', 32, hybrid_sharding=False).states == GIBIBYTE + 60 * GIBIBYTE // 32
    assert plan(SIZES, 'fsdp2', 32, shard_size=4).states == GIBIBYTE + 60 * GIBIBYTE // 4
    assert plan(SIZES, 'fsdp2', 32, processes_per_node=4).parts == 4
    assert plan(SIZES, 'fsdp', 1) == dataclasses.replace(plan(SIZES, 'single', 1), strategy='fsdp')
    with pytest.raises(ConfigError, match=r'fsdp_kwargs\.shard_size=3'):
        plan(SIZES, 'fsdp2', 32, shard_size=3)


@pytest.mark.parametrize('strategy', ['fsdp', 'fsdp2'])
def test_gradients_between_passes_are_whole_unless_exchanged(strategy):
    once, several = plan(SIZES, strategy, 8), plan(SEVERAL, strategy, 8)
    assert once.gradients_between == 0
    assert several.gradients_between == 4 * GIBIBYTE
    assert several.checkpointed - once.checkpointed == 4 * GIBIBYTE
    assert several.states == once.states  # after the step they are divided
    exchanging = {name: dataclasses.replace(entry, keeps_gradients=False) for name, entry in SIZES.sharding.items()}
    synced = plan(dataclasses.replace(SEVERAL, sharding=exchanging), strategy, 8)
    assert synced.gradients_between == GIBIBYTE // 2
    assert any('4.00 GB of gradients between the 4 passes' in line for line in remarks([several], 4))
    assert not any('gradients' in line for line in remarks([plan(SEVERAL, 'ddp', 8)], 4))


def test_sentences():
    plans = [plan(SIZES, 'single', 1), *(plan(SIZES, strategy, 8) for strategy in ('ddp', 'fsdp', 'fsdp2'))]
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
    cfg = load_config('configs/gmflow/gmdit_k8_imagenet_8gpus.py')
    sizes, notes = sizes_of(build_on_meta(cfg, locate=False), cfg)
    number = 676_220_208
    assert sizes.gradients == sizes.trainable
    assert 0 <= sizes.average - sizes.trainable < 100  # the running means of the loss are averaged too
    assert sizes.trainable == pytest.approx(4 * number, rel=0.01)
    assert sizes.kept.peak > 100 * GIBIBYTE > 30 * GIBIBYTE > sizes.checkpointed.peak
    assert any('micro-batches of 512 with latents 4 x 32 x 32' in note for note in notes)


def planned_config(path: str, **options):
    """Sizes of a config under options of sharding, and its notes."""
    cfg = load_config(path)
    cfg.fsdp_kwargs = options
    return sizes_of(build_on_meta(cfg, locate=False), cfg)


def digits_plan(**options):
    """Sizes of the digits student under options of sharding, and its notes."""
    return planned_config('configs/digits/gmdit_k8_digits_piid_2step.py', **options)


def test_what_is_not_shared_out():
    states, hosts = {}, {}
    for name, options in {
        'all': {},
        'teacher too': dict(wrap_frozen_modules=True),
        'student whole': dict(exclude_keys=['diffusion']),
    }.items():
        sizes, _ = digits_plan(**options)
        states[name], hosts[name] = plan(sizes, 'fsdp', 8).states, plan(sizes, 'fsdp', 8).host
        assert plan(sizes, 'ddp', 8).states == sizes.states
    teacher = digits_plan(wrap_frozen_modules=True)[0].frozen
    assert teacher > 0
    assert states['all'] - states['teacher too'] == pytest.approx(7 * teacher // 8, abs=8)
    trained = sizes.trainable + sizes.gradients + sizes.optimizer + sizes.average  # the average is kept alike
    assert states['student whole'] - states['all'] == pytest.approx(7 * trained // 8, abs=80)  # buffers are whole
    saved = sizes.trainable + sizes.average + sizes.optimizer
    assert hosts['student whole'] - hosts['all'] == pytest.approx(7 * saved // 8, abs=80)


def flux_plan(tie_teacher=True, text_encoder=False, **options):
    """Sizes of a small adapted student under options of sharding, and its notes."""
    model = tiny.config('Flux', 'GM', None, tie_teacher=tie_teacher)
    if text_encoder:
        model['text_encoder'] = dict(
            type='PretrainedFluxTextEncoder', model_name_or_path='black-forest-labs/FLUX.1-dev', torch_dtype='bfloat16'
        )
    with torch.device('meta'):
        planned = MODELS.build({**copy.deepcopy(model), **tiny.SECTIONS})
    data = dict(train_dataloader=dict(samples_per_gpu=2))
    cfg = dict(model=model, optimizer=OPTIMIZERS, data=data, fsdp_kwargs=options, **tiny.SECTIONS)
    return sizes_of(planned, cfg)


def test_frozen_parameters_of_a_divided_network():
    divided, _ = flux_plan()
    whole, _ = flux_plan(ignore_frozen_parameters=True)
    excluded, _ = flux_plan(exclude_keys=['diffusion'])
    assert whole.frozen == 0 < divided.frozen
    assert whole.resident - divided.resident == divided.frozen
    assert whole.undivided == divided.undivided == 0
    assert excluded.undivided == excluded.states - excluded.resident
    for strategy in SHARDING:
        of_divided, of_whole = divided.sharding[strategy], whole.sharding[strategy]
        assert of_divided.gathered > of_whole.gathered > 0
        assert of_divided.teacher_gathered == of_divided.gathered  # a role of the same base
        assert of_divided.unit_gradients == of_whole.unit_gradients < divided.gradients
    # FSDP1 makes a unit of every adapter, FSDP2 gathers them with their block
    assert divided.sharding['fsdp'].gathered < divided.sharding['fsdp2'].gathered
    assert divided.sharding['fsdp'].unit_gradients < divided.sharding['fsdp2'].unit_gradients


def test_teacher_of_its_own():
    whole, _ = flux_plan(tie_teacher=False)
    divided, _ = flux_plan(tie_teacher=False, wrap_frozen_modules=True)
    shared, _ = flux_plan(wrap_frozen_modules=True)
    assert divided.resident == shared.resident == 0 < whole.resident
    assert divided.frozen == whole.frozen + whole.resident > shared.frozen
    assert whole.sharding['fsdp2'].teacher_gathered == 0 < divided.sharding['fsdp2'].teacher_gathered


def test_modules_that_are_gathered():
    def gathered(**options):
        return [entry.gathered for entry in digits_plan(**options)[0].sharding.values()]

    blocks = gathered()
    assert 0 < blocks[0] <= blocks[1]  # fsdp2 fetches one more ahead
    assert blocks == gathered(fsdp_modules=['lakonlab.models.architecture.diffusers.dit.DiTBlock'])
    assert blocks == gathered(fsdp_modules=['*Block'])
    assert blocks > gathered(fsdp_modules=['lakonlab.models.architecture.diffusers.dit.DiTBlock', 'torch.nn.Linear'])
    of_teacher = [digits_plan(wrap_frozen_modules=wrap)[0].sharding['fsdp2'].teacher_gathered for wrap in (False, True)]
    assert of_teacher[0] == 0 < of_teacher[1]  # it is whole, unless it is wrapped
    for path in ('no.such.Block', 'torch.nn.Bilinear'):
        with pytest.raises(ConfigError, match=r'which is no class of a module of the model.*DiTBlock'):
            digits_plan(fsdp_modules=[path])


def test_lower_precision():
    cfg = load_config('configs/digits/gmdit_k8_digits_piid_2step.py')
    cfg.train_cfg.grad_accum_batch_size = 16
    cfg.model.diffusion.denoising.autocast_dtype = 'bfloat16'
    whole, _ = sizes_of(build_on_meta(cfg, locate=False), cfg)
    cfg.fsdp_kwargs = dict(param_dtype='bfloat16')
    halved, _ = sizes_of(build_on_meta(cfg, locate=False), cfg)
    for strategy in SHARDING:
        assert halved.sharding[strategy].gathered == whole.sharding[strategy].gathered / 2
        assert halved.sharding[strategy].unit_gradients == whole.sharding[strategy].unit_gradients
    # FSDP1 would add up gradients in bfloat16
    assert [entry.keeps_gradients for entry in halved.sharding.values()] == [False, True]
    between = {strategy: plan(halved, strategy, 8).gradients_between for strategy in SHARDING}
    assert between['fsdp2'] == halved.gradients
    assert between['fsdp'] == pytest.approx(halved.gradients / 8, abs=8)
    cfg.fsdp_kwargs = dict(sync_every_pass=True)
    synced, _ = sizes_of(build_on_meta(cfg, locate=False), cfg)
    assert not any(entry.keeps_gradients for entry in synced.sharding.values())


def test_modules_of_what_is_on_the_hub():
    """A text encoder is not built for a plan, so what it consists of is not known."""
    patterns = ['transformers.models.t5.modeling_t5.T5Block', '*TransformerBlock']
    number = 2 * 4_885_371_136  # parameters of T5 and CLIP in bfloat16
    whole, _ = flux_plan(text_encoder=True)
    assert whole.resident == number
    divided, notes = flux_plan(text_encoder=True, fsdp_modules=patterns, wrap_frozen_modules=True)
    assert any('fsdp_modules may name modules of text_encoder' in note for note in notes)
    assert divided.frozen == whole.frozen + number
    assert divided.resident == 0
    with pytest.raises(ConfigError, match='T5Block'):
        flux_plan(text_encoder=True, fsdp_modules=patterns)


def test_moments_that_cannot_be_shared_out():
    cfg = load_config('configs/digits/gmdit_k8_digits_piid_2step.py')
    cfg.optimizer.diffusion.type = 'AdamW8bit'
    sizes, notes = sizes_of(build_on_meta(cfg, locate=False), cfg)
    assert sizes.optimizer == 2 * sizes.trainable / 4
    assert sizes.sharding['fsdp2'].optimizer == sizes.optimizer
    assert sizes.sharding['fsdp'].optimizer == 2 * sizes.trainable
    assert [note for note in notes if 'AdamW8bit' in note] == [
        'fsdp cannot share out AdamW8bit: planned with moments of full precision'
    ]


def test_passes_of_a_step():
    cfg = load_config('configs/digits/gmdit_k8_digits_datafree_piid_2step.py')
    cfg.train_cfg.grad_accum_batch_size = 16
    sizes, _ = sizes_of(build_on_meta(cfg, locate=False), cfg)
    assert sizes.passes == 64 // 16 * 2  # micro-batches, and segments of each


def test_impossible_plans_are_said():
    notes = []
    cfg = dict(fsdp_kwargs=dict(shard_size=4))
    plans = memory_plans(SEVERAL, cfg, [1, 6, 8], notes)
    assert [(entry.strategy, entry.world_size, entry.parts) for entry in plans] == [
        ('single', 1, 1),
        ('ddp', 6, 1),
        ('ddp', 8, 1),
        ('fsdp', 8, 4),
        ('fsdp2', 8, 4),
    ]
    assert len(notes) == 2
    assert 'fsdp is impossible on 6 processes: fsdp_kwargs.shard_size=4' in notes[0]
