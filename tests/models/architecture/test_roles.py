"""Teacher, student and average as roles of one network, against three networks of their own."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.models.architecture.roles import named_state, parameter_names
from lakonlab.ops.random_source import SeededSource
from lakonlab.parallel.single import SingleProcess
from lakonlab.runner.hooks.ema import ExponentialMovingAverageHook
from lakonlab.runner.optimizer import build_optimizers
from tests import tiny_text_image as tiny

KINDS = [('Flux', 'GM'), ('Flux', 'DX'), ('QwenImage', 'GM'), ('QwenImage', 'DX')]
kinds = pytest.mark.parametrize(('family', 'policy'), KINDS, ids=['-'.join(kind) for kind in KINDS])


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    return {family: tiny.teacher_file(family, folder) for family in tiny.SIZES}


def optimizers(model):
    return build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-2, weight_decay=0.0)})


def step(model, optimizer, data, iteration=0):
    return model.train_step(data, optimizer, running_status={'iteration': iteration}, source=SeededSource(0, iteration))


@torch.no_grad()
def copy_roles(target, origin):
    """Give a model of separate networks the values of one with roles; a base may be wrapped by an adapter or not."""
    values = dict(named_state(origin))
    for name, tensor in named_state(target):
        tensor.copy_(values[name])


def forward_all(model, data):
    generator = torch.Generator().manual_seed(3)
    times = torch.tensor([0.25, 0.5])  # a thousand times this, and the guidance below, are exact in bfloat16
    x_t = torch.randn(2, *tiny.LATENT_SIZE, generator=generator)
    conditions = {**data['prompt_embed_kwargs']}
    if 'pooled_projections' in conditions:
        conditions['guidance'] = torch.full((2,), 2.0)
    outputs = {}
    for role in ('teacher', 'student', 'ema'):
        with torch.no_grad():
            output = model.role(role).denoising(x_t, times, **conditions)
        outputs[role] = torch.cat([v.flatten() for v in output.values()]) if isinstance(output, dict) else output
    return outputs


#: What is trained beside adapters: nothing, a block with adapters in it, and layers with adapters of their own.
OTHERS_TRAINED = {
    'nothing': [],
    'a block': ['single_transformer_blocks.1'],
    'adapted layers': ['ff.net.2', 'proj_mlp'],
    'a part of the norm': ['norm_out.linear'],
}


@kinds
def test_roles_equal_separate_networks(weights, family, policy):
    """Outputs, losses, gradients and averages; the base of the separate networks exists three times."""
    compare_with_separate_networks(family, policy, weights[family])


@pytest.mark.parametrize('others', OTHERS_TRAINED)
@pytest.mark.parametrize('policy', ['GM', 'DX'])
def test_roles_equal_separate_networks_whatever_is_trained(weights, policy, others):
    trained = tiny.config('Flux', policy, weights['Flux'])['diffusion']['denoising']['freeze_exclude']
    keys = [*trained, *OTHERS_TRAINED[others]]
    shared = compare_with_separate_networks('Flux', policy, weights['Flux'], diffusion__denoising__freeze_exclude=keys)
    assert not any('lora' in name for name, _ in named_state(shared.teacher))
    names = {name.partition('.')[2] for name in tiny.trainable(shared)}
    averaged = dict(named_state(shared.diffusion_ema))
    student = dict(named_state(shared.diffusion))
    assert {name for name in averaged if averaged[name] is not student[name]} >= names


def compare_with_separate_networks(family, policy, file, **changes):
    """Train a model whose roles share a base beside one of three networks; returns the former."""
    data = tiny.batch(family)
    shared = tiny.build(tiny.config(family, policy, file, **changes), family)
    separate = tiny.build(tiny.config(family, policy, file, tie_teacher=False, tie_ema=False, **changes), family)
    copy_roles(separate, shared)
    hooks, optimizer = [], []
    for model in (shared, separate):
        hook = ExponentialMovingAverageHook(start_iter=1, momentum_policy='fixed', momentum_cfg={'momentum': 0.5})
        runner = type('Run', (), {'model': model, 'iter': 0})()
        hook.before_train(runner)
        hooks.append((hook, runner))
        optimizer.append(optimizers(model))
    for iteration in range(3):
        logs = []
        for model, own, (hook, runner) in zip((shared, separate), optimizer, hooks):
            torch.manual_seed(0)
            logs.append(step(model, own, data, iteration)['log_vars'])
            runner.iter = iteration
            hook.after_train_iter(runner, iteration)
        assert logs[0] == logs[1]
        gradients = [
            {name: value.grad for name, value in tiny.trainable(model).items()} for model in (shared, separate)
        ]
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name
    outputs = [forward_all(model, data) for model in (shared, separate)]
    for role, output in outputs[0].items():
        assert torch.equal(output, outputs[1][role]), role
    assert not torch.equal(outputs[0]['student'], outputs[0]['ema'])
    return shared


@kinds
def test_the_base_exists_once(weights, family, policy):
    model = tiny.build(tiny.config(family, policy, weights[family]), family)
    base = sum(tensor.numel() for name, tensor in named_state(model.teacher))
    trained = sum(value.numel() for value in tiny.trainable(model).values())
    storages = {tensor.untyped_storage().data_ptr(): tensor for _, tensor in named_state(model)}
    assert sum(tensor.numel() for tensor in storages.values()) == base + 2 * trained
    assert sum(parameter.numel() for parameter in model.parameters()) == base + 2 * trained


@kinds
def test_gradients_reach_the_student_and_nobody_else(weights, family, policy):
    model = tiny.build(tiny.config(family, policy, weights[family]), family)
    step(model, optimizers(model), tiny.batch(family))
    names = parameter_names(model)
    expected = ('diffusion.denoising.norm_out.', 'diffusion.denoising.proj_out')
    for parameter, name in names.items():
        is_trained = name.startswith(expected) or ('.lora_' in name and name.startswith('diffusion.'))
        assert parameter.requires_grad == is_trained, name
        assert (parameter.grad is not None) == is_trained, name
    assert any(name.startswith('diffusion_ema.') for name in names.values())


def test_the_teacher_does_not_move(weights):
    data = tiny.batch('Flux')
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux']))
    before = forward_all(model, data)
    optimizer = optimizers(model)
    for iteration in range(100):
        step(model, optimizer, data, iteration)
    after = forward_all(model, data)
    assert torch.equal(before['teacher'], after['teacher'])
    assert not torch.equal(before['student'], after['student'])


@kinds
def test_an_untrained_adapter_changes_nothing(weights, family, policy):
    data = tiny.batch(family)
    with_lora = tiny.build(tiny.config(family, policy, weights[family]), family)
    without = tiny.build(
        tiny.config(
            family,
            policy,
            weights[family],
            diffusion__denoising__use_lora=False,
            diffusion__denoising__freeze_exclude=['norm_out', 'self.proj_out' if policy == 'DX' else 'proj_out'],
        ),
        family,
    )
    states = [dict(named_state(model)) for model in (with_lora, without)]
    with torch.no_grad():
        for name, tensor in states[1].items():
            tensor.copy_(
                states[0][
                    name
                    if name in states[0]
                    else name.replace('.weight', '.base_layer.weight')
                    if name.replace('.weight', '.base_layer.weight') in states[0]
                    else name.replace('.bias', '.base_layer.bias')
                ]
            )
    outputs = [forward_all(model, data) for model in (with_lora, without)]
    for role in outputs[0]:
        assert torch.equal(outputs[0][role], outputs[1][role]), role


@kinds
def test_recomputed_blocks_are_the_students(weights, family, policy):
    """Gradient checkpointing recomputes blocks in the backward pass, after the teacher has played."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny.build(
            tiny.config(family, policy, weights[family], diffusion__denoising__checkpointing=checkpointing), family
        )
        assert model.diffusion.denoising.transformer.gradient_checkpointing == checkpointing
        step(model, optimizers(model), tiny.batch(family))
        gradients.append([value.grad for value in tiny.trainable(model).values()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


@kinds
def test_mean_components_that_equal_the_teacher_give_its_velocity(weights, family, policy):
    """At the source point a fresh student is its teacher, but for the noise that sets the components apart."""
    data = tiny.batch(family)
    model = tiny.build(tiny.config(family, policy, weights[family]), family)
    state = dict(named_state(model.diffusion.denoising))
    if policy == 'GM':
        bias = dict(named_state(model.teacher.denoising))['proj_out.bias']
        state['proj_out_means.bias'].data.copy_(bias.repeat(3))
    x_t = torch.randn(2, *tiny.LATENT_SIZE, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.4, 1.0], dtype=torch.float64)
    conditions = dict(data['prompt_embed_kwargs'])
    if family == 'Flux':
        conditions['guidance'] = torch.full((2,), 3.5)
    with torch.no_grad():
        student, teacher = model.diffusion, model.teacher
        policy_of_student = student.build_policy(student.pred(x_t, sigma, **conditions), x_t, sigma)
        u = teacher.pred(x_t, sigma, **conditions)
        found = policy_of_student.pi(x_t, sigma)
    assert (found - u).abs().max() < 1e-6 * u.abs().max()


@pytest.mark.parametrize('base', ['float32', 'bfloat16'])
@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_precisions(weights, base, compute):
    changes = {
        'diffusion__denoising__torch_dtype': base,
        'diffusion__denoising__freeze_exclude_autocast_dtype': compute,
        'teacher__denoising__torch_dtype': base,
    }
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], **changes))
    for name, tensor in named_state(model):
        own = '.lora_' in name or 'proj_out_' in name or (name.startswith('diffusion') and 'norm_out' in name)
        assert tensor.dtype == (torch.float32 if own else getattr(torch, base)), name
    data = tiny.batch('Flux')
    found = forward_all(model, data)
    expected = forward_all(tiny.build(tiny.config('Flux', 'GM', weights['Flux'])), data)
    tolerance = 1e-6 if (base, compute) == ('float32', 'float32') else 0.03
    for role, output in found.items():
        assert output.dtype == torch.float32
        assert (output - expected[role]).norm() < tolerance * expected[role].norm(), role
    assert step(model, optimizers(model), data)['skipped'] == ()


def test_own_parts_in_the_precision_of_the_base(weights):
    changes = {f'{part}__denoising__torch_dtype': 'bfloat16' for part in ('diffusion', 'teacher')}
    model = tiny.build(
        tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__freeze_exclude_fp32=False, **changes)
    )
    assert {tensor.dtype for _, tensor in named_state(model)} == {torch.bfloat16}
    assert step(model, optimizers(model), tiny.batch('Flux'))['skipped'] == ()


@pytest.mark.parametrize('alpha', [None, 8.0])
def test_scale_of_the_adapter(weights, alpha):
    """What the adapters add is proportional to ``lora_alpha / lora_rank``; the rank here is 4."""
    data = tiny.batch('Flux')
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__lora_alpha=alpha))
    merged = copy.deepcopy(model)
    scale = 1.0 if alpha is None else alpha / 4
    with torch.no_grad():
        for network, factor in ((model, 1.0), (merged, scale)):
            for name, value in tiny.trainable(network).items():
                if '.lora_B.' in name:
                    value.fill_(0.01 * factor)
        for layer in merged.diffusion.denoising.backbone.adapted:
            layer.scaling['default'] = 1.0
    outputs = [forward_all(network, data)['student'] for network in (model, merged)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max()


@kinds
def test_full_fine_tuning_without_sharing(weights, family, policy):
    """Everything is trained, nothing is shared, and the average is a whole copy."""
    changes = {f'diffusion__denoising__{key}': value for key, value in (('freeze', False), ('use_lora', False))}
    model = tiny.build(
        tiny.config(
            family,
            policy,
            weights[family],
            tie_teacher=False,
            diffusion__denoising__freeze_exclude=[],
            diffusion__denoising__lora_target_modules=[],
            **changes,
        ),
        family,
    )
    data = tiny.batch(family)
    before = forward_all(model, data)
    step(model, optimizers(model), data)
    after = forward_all(model, data)
    assert torch.equal(before['teacher'], after['teacher'])
    assert torch.equal(before['ema'], after['ema'])
    assert not torch.equal(before['student'], after['student'])
    student, average = (dict(named_state(model.role(role))) for role in ('student', 'ema'))
    assert all(value.requires_grad for value in student.values() if isinstance(value, torch.nn.Parameter))
    assert not {id(value) for value in student.values()} & {id(value) for value in average.values()}


@pytest.mark.parametrize('tie_teacher', [True, False])
@pytest.mark.parametrize('tie_ema', [True, False])
def test_what_is_saved_has_the_same_names_however_it_is_shared(weights, tie_teacher, tie_ema):
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], tie_teacher=tie_teacher, tie_ema=tie_ema))
    strategy = SingleProcess(device='cpu')
    state = strategy.model_state(model)
    student = {name.removeprefix('diffusion.') for name in state if name.startswith('diffusion.')}
    average = {name.removeprefix('diffusion_ema.') for name in state if name.startswith('diffusion_ema.')}
    assert student == average
    assert len(state) == len(student) + len(average)
    assert 'denoising.proj_out_means.weight' in student
    assert 'denoising.single_transformer_blocks.0.proj_mlp.lora_A.default.weight' in student
    assert not any('base_layer' in name for name in student)


@pytest.mark.parametrize('key', ['transformer_blocks', 'norm_q', 'to_out'])
@pytest.mark.parametrize('tie_teacher', [True, False])
def test_any_part_may_be_trained(weights, key, tie_teacher):
    """Lists of blocks, norms inside of attention, layers in a list: with and without a base that is shared."""
    model = tiny.build(
        tiny.config(
            'Flux',
            'DX',
            weights['Flux'],
            tie_teacher=tie_teacher,
            diffusion__denoising__freeze_exclude=['self.proj_out', 'norm_out', key],
            diffusion__denoising__use_lora=False,
        )
    )
    data = tiny.batch('Flux')
    before = forward_all(model, data)
    for iteration in range(2):
        step(model, optimizers(model), data, iteration)
    after = forward_all(model, data)
    assert torch.equal(before['teacher'], after['teacher'])
    assert torch.equal(before['ema'], after['ema'])
    assert not torch.equal(before['student'], after['student'])
    trained = tiny.trainable(model)
    assert any(key in name for name in trained)
    assert all(key in name or 'proj_out.' in name or 'norm_out.' in name for name in trained)


def test_other_trained_parts_are_the_students_own(weights):
    """A block, and a single bias, beside adapters."""
    model = tiny.build(
        tiny.config(
            'Flux',
            'GM',
            weights['Flux'],
            diffusion__denoising__freeze_exclude=[
                *tiny.TRAINED['GM'],
                'single_transformer_blocks.1',
                'x_embedder.bias',
            ],
        )
    )
    data = tiny.batch('Flux')
    before = forward_all(model, data)
    optimizer = optimizers(model)
    for iteration in range(2):
        step(model, optimizer, data, iteration)
    after = forward_all(model, data)
    assert torch.equal(before['teacher'], after['teacher'])
    assert torch.equal(before['ema'], after['ema'])
    assert not torch.equal(before['student'], after['student'])
    trained = tiny.trainable(model)
    assert 'diffusion.denoising.x_embedder.bias' in trained
    assert 'diffusion.denoising.x_embedder.weight' not in trained
    assert 'diffusion.denoising.single_transformer_blocks.1.attn.to_q.weight' in trained
    assert all(value.grad is not None for value in trained.values())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'diffusion__denoising__pretrained': 'other.safetensors'}, r'tie_teacher=True.*pretrained'),
        ({'diffusion__denoising__num_layers': 1}, r'tie_teacher=True.*transformer'),
        ({'diffusion__denoising__torch_dtype': 'bfloat16'}, r'tie_teacher=True.*torch_dtype'),
        (
            {'diffusion__denoising__freeze': False, 'diffusion__denoising__freeze_exclude': []},
            r'tie_teacher=True.*not frozen',
        ),
        (
            {'diffusion__denoising__lora_target_modules': ['proj_mlq']},
            r"lora_target_modules names 'proj_mlq'.*proj_mlp",
        ),
        ({'diffusion__denoising__freeze_exclude': ['proj_out_maens']}, r"freeze_exclude names 'proj_out_maens'"),
        ({'diffusion__denoising__timestep_scale': 1000.0}, r'tie_teacher=True.*timestep_scale'),
        (
            {'diffusion__denoising__freeze_exclude': ['proj_out_means', 'norm_out']},
            r"use_lora=True, but freeze_exclude=.*add 'lora'",
        ),
        (
            {'tie_teacher': False, 'diffusion__denoising__freeze_exclude': ['proj_out_means', 'norm_out']},
            r"use_lora=True, but freeze_exclude=.*add 'lora'",
        ),
        ({'diffusion__denoising__logweights_channels': 1}, r'logweights_channels=1: expected 4'),
    ],
)
def test_contradictions(weights, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.build(tiny.config('Flux', 'GM', weights['Flux'], **changes))


def test_a_copy_is_independent(weights):
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux']))
    twin = copy.deepcopy(model)
    data = tiny.batch('Flux')
    before = forward_all(twin, data)
    step(model, optimizers(model), data)
    after = forward_all(twin, data)
    assert all(torch.equal(before[role], after[role]) for role in before)


@pytest.mark.parametrize('copied', [False, True])
def test_teacher_and_average_never_drop_anything(weights, copied):
    """A base with dropout: the student's passes drop, while it is trained; the others' never do."""
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__lora_dropout=0.5))
    base = model.diffusion.denoising.transformer
    (dropout,) = (part for part in base.transformer_blocks[0].ff.net if isinstance(part, torch.nn.Dropout))
    dropout.p = 0.5
    data = tiny.batch('Flux')
    if copied:
        forward_all(model.train(), data)
        model = copy.deepcopy(model)
        base = model.diffusion.denoising.transformer
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        outputs.append(forward_all(model.train(), data))
    first, second = outputs
    assert torch.equal(first['teacher'], second['teacher'])
    assert torch.equal(first['ema'], second['ema'])
    assert not torch.equal(first['student'], second['student'])
    assert base.training
    assert torch.equal(forward_all(model.eval(), data)['student'], first['ema'])


@pytest.fixture
def style(tmp_path):
    """LoRA for a layer inside and for the output layer."""
    generator = torch.Generator().manual_seed(5)
    sizes = {'transformer_blocks.0.attn.to_q': (32, 32), 'proj_out': (32, 16)}
    state = {}
    for layer, (fan_in, fan_out) in sizes.items():
        state[f'{layer}.lora_A.weight'] = torch.randn(2, fan_in, generator=generator)
        state[f'{layer}.lora_B.weight'] = torch.randn(fan_out, 2, generator=generator)
    save_file(state, tmp_path / 'style.safetensors')
    return str(tmp_path / 'style.safetensors')


@pytest.mark.parametrize('left_out', ['nothing', 'missing', 'None'])
@pytest.mark.parametrize('policy', ['GM', 'DX'])
def test_a_tied_model_for_inference_only(weights, policy, left_out, style):
    """It has no teacher, but the base of one, style included, and takes what a training saves."""
    config = tiny.config('Flux', policy, weights['Flux'], teacher__denoising__pretrained_lora=style)
    if left_out == 'nothing':
        config['diffusion']['denoising']['pretrained_lora'] = style
    elif left_out == 'missing':
        del config['diffusion']['denoising']['pretrained']
    else:
        config['diffusion']['denoising'].update(pretrained=None, pretrained_lora=None)
    model = tiny.build(config)
    data = tiny.batch('Flux')
    step(model, optimizers(model), data)
    alone = tiny.build({**config, 'inference_only': True})
    state = dict(named_state(alone.diffusion))
    with torch.no_grad():
        for name, value in tiny.trainable(model).items():
            state[name.removeprefix('diffusion.')].copy_(value)
    x_t, times = torch.randn(2, *tiny.LATENT_SIZE), torch.tensor([0.25, 0.5])
    conditions = {**data['prompt_embed_kwargs'], 'guidance': torch.full((2,), 2.0)}
    outputs = []
    for part in (model.eval(), alone.eval()):
        with torch.no_grad():
            output = part.role('student').denoising(x_t, times, **conditions)
        outputs.append(torch.cat([v.flatten() for v in output.values()]) if isinstance(output, dict) else output)
    assert torch.equal(*outputs)


def test_a_single_bias_on_a_base_in_bfloat16(weights):
    config = tiny.config('Flux', 'GM', weights['Flux'])
    for part in ('diffusion', 'teacher'):
        config[part]['denoising']['torch_dtype'] = 'bfloat16'
    config['diffusion']['denoising']['freeze_exclude'].append('x_embedder.bias')
    model = tiny.build(config)
    step(model, optimizers(model), tiny.batch('Flux'))
    trained = tiny.trainable(model)
    bias = trained['diffusion.denoising.x_embedder.bias']
    assert bias.dtype == torch.float32
    assert bias.grad.abs().sum() > 0
    assert 'diffusion.denoising.x_embedder.weight' not in trained


def test_a_style_reaches_the_head_of_a_student_of_its_own_base(weights, style):
    """The head begins as the output layer of the teacher, which has the style, whether the base is shared or not."""
    states = []
    for tie_teacher in (True, False):
        changes = {f'{part}__denoising__pretrained_lora': style for part in ('teacher', 'diffusion')}
        model = tiny.build(tiny.config('Flux', 'DX', weights['Flux'], tie_teacher=tie_teacher, **changes))
        states.append(dict(named_state(model.diffusion.denoising)))
    plain = dict(named_state(tiny.build(tiny.config('Flux', 'DX', weights['Flux'])).diffusion.denoising))
    assert torch.equal(states[0]['proj_out.weight'], states[1]['proj_out.weight'])
    assert not torch.equal(states[0]['proj_out.weight'], plain['proj_out.weight'])


def test_no_module_lies_unused_inside_of_a_switch(weights):
    """Parts of a norm that is the student's anyway need no place of their own."""
    exclude = ['proj_out_means', 'proj_out_logweights', 'proj_out_logstds', 'norm_out.linear', 'lora']
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__freeze_exclude=exclude))
    assert set(model.diffusion.denoising.backbone.switches) == {'proj_out', 'norm_out'}
    known = {id(tensor) for _, tensor in named_state(model)}
    assert {id(parameter) for parameter in model.parameters()} <= known
