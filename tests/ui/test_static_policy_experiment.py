import pytest
import torch

from lakonlab.ops.random_source import SeededSource
from lakonlab.ui.static_policy_experiment import Experiment, PinnedSource, Settings, build_model
from lakonlab.ui.static_policy_teachers import class_subject
from tests.tiny_teacher import digits_teacher


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
    return class_subject(str(digits_teacher(tmp_path_factory.mktemp('teacher'))), [3, 7], 2, None, 'float32')


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        return Settings(**{'out': tmp_path / 'x.png', 'num_components': 4, 'num_iters': 10, **changes})

    return make


def experiment_after(subject, settings, iterations):
    experiment = Experiment(subject, settings)
    return experiment, [experiment.step(i)[0].item() for i in range(iterations)]


@pytest.mark.parametrize('policy', ['GMFlow', 'DX'])
def test_followed_as_a_whole_or_in_parts(subject, settings, policy):
    experiment, _ = experiment_after(subject, settings(policy_type=policy), 2)
    end = experiment.follow(experiment.policy()).states[-1]
    labels = {'class_labels': experiment.batch['labels']}
    assert torch.allclose(end, experiment.diffusion(noise=experiment.noise, **labels), atol=1e-5)


def test_the_solved_teacher_is_its_own_euler_solution(subject, settings):
    experiment = Experiment(subject, settings())
    data = {**subject.conditions, 'noise': experiment.noise}
    expected = experiment.model.val_step(data, role='teacher', test_cfg_override={'num_timesteps': 128})['pred_imgs']
    solved = experiment.follow(experiment.teacher)
    assert torch.allclose((solved.states[-1] / 2 + 0.5).clamp(0, 1), expected, atol=1e-5)
    # what the teacher expects at the noise is its solution in one step
    one_step = experiment.model.val_step(data, role='teacher', test_cfg_override={'num_timesteps': 1})['pred_imgs']
    assert torch.allclose((solved.denoised[0] / 2 + 0.5).clamp(0, 1), one_step, atol=1e-5)


def test_a_dx_policy_begins_as_one_step_of_the_teacher(subject, settings):
    experiment = Experiment(subject, settings(policy_type='DX'))
    ends = experiment.follow(experiment.policy()).states[-1], experiment.follow(experiment.teacher).denoised[0]
    assert torch.allclose(*ends, atol=1e-5)


def test_only_the_policies_learn_and_all_from_the_same_noise(subject, settings):
    experiment = Experiment(subject, settings(lr=0.02))
    before = {name: tensor.clone() for name, tensor in experiment.model.state_dict().items()}
    distance = experiment.follow(experiment.policy()).distance(experiment.follow(experiment.teacher))
    losses = [experiment.step(i)[0].item() for i in range(30)]
    after = experiment.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f'diffusion.denoising.values.{name}' for name in ('means', 'logweights', 'logstds')}
    assert sum(losses[-5:]) < sum(losses[:5])
    now = experiment.follow(experiment.policy()).distance(experiment.follow(experiment.teacher))
    assert now[0] == distance[0] == 0
    assert now[-1] < distance[-1]


def test_a_seed_is_an_experiment_whatever_its_length(subject, settings):
    runs = {}
    for name, changes in {'a': {}, 'b': {'num_iters': 20}, 'c': {'seed': 1}}.items():
        torch.rand(1)  # what was drawn before does not matter
        experiment, losses = experiment_after(subject, settings(**changes), 3)
        runs[name] = (losses, experiment.noise.tolist(), experiment.diffusion.denoising.values['means'].tolist())
    assert runs['a'] == runs['b']
    assert all(a != c for a, c in zip(runs['a'], runs['c']))


def test_learning_rates(subject, settings):
    experiment, _ = experiment_after(subject, settings(lr_schedule='cosine', num_iters=4, lr=0.1), 3)
    assert experiment.optimizer.param_groups[0]['lr'] == pytest.approx(0.05)
    assert [experiment.learning_rate(i) for i in (0, 4)] == pytest.approx([0.1, 0])
    assert Experiment(subject, settings(lr=0.1)).learning_rate(7) == 0.1


@pytest.mark.parametrize(
    ('changes', 'window'), [({}, 0), ({'policy_type': 'DX'}, 3), ({'policy_type': 'DX', 'window_substeps': 0}, 0)]
)
def test_the_window_of_the_averaged_velocity(subject, settings, changes, window):
    assert build_model(subject, settings(**changes)).diffusion.train_section().window_substeps == window


def test_pinned_draws():
    noise = torch.arange(6.0).reshape(2, 3)
    source, others = (PinnedSource({'noise': noise}, SeededSource(0)), SeededSource(0))
    assert torch.equal(source.normal('noise', (2, 3)), noise)
    assert torch.equal(source.normal('noise', (3, 2), torch.float64), noise.double().reshape(3, 2))
    assert torch.equal(source.uniform('dropout', (2, 3)), others.uniform('dropout', (2, 3)))
