"""Asking the teacher once per segment changes neither what is learnt nor what it is asked."""

import pytest
import torch

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.piflow import PiFlowImitation, PiFlowImitationDataFree
from lakonlab.ops.random_source import SeededSource
from lakonlab.ops.shapes import repeat_groups
from tests.toy_nets import ToyGM, ToyVelocity

LABELS = torch.tensor([4, 4, 4, 0, 1, 2])  # negative half first
INTERVAL = {'guidance_interval': [0.2, 0.8], 'orthogonal_guidance': 0.5}


class CountingVelocity(ToyVelocity):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def forward(self, hidden_states, timestep, class_labels=None):
        self.batches.append(len(hidden_states))
        return super().forward(hidden_states, timestep, class_labels)


def run(cls, iteration=0, **train_cfg):
    student = ToyGM(3, 2, num_classes=4).randomize(1, torch.float64)
    teacher_net = CountingVelocity(2, num_classes=4).randomize(2, torch.float64)
    model = cls(
        student,
        policy_type='GMFlow',
        flow_loss={'type': 'DiffusionMSELoss'},
        num_timesteps=1,
        train_cfg={'nfe': 2, 'num_intermediate_states': 4, 'window_substeps': 2, **train_cfg},
    )
    teacher = GaussianFlow(teacher_net.requires_grad_(False), num_timesteps=1)
    loss, _ = model.forward_train(
        torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        class_labels=LABELS[3:],
        teacher=teacher,
        teacher_kwargs={'class_labels': LABELS, 'guidance_scale': 2.0, 'test_cfg': INTERVAL},
        running_status={'iteration': iteration},
        source=SeededSource(3),
    )
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()], teacher_net.batches


@pytest.mark.parametrize('cls', [PiFlowImitation, PiFlowImitationDataFree])
def test_one_call_equals_one_call_per_state(cls):
    once, each = run(cls, batch_teacher=True), run(cls, batch_teacher=False)
    torch.testing.assert_close(once[0], each[0], rtol=1e-12, atol=0)
    for a, b in zip(once[1], each[1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    segments = 1 if cls is PiFlowImitation else 2
    assert len(once[2]) == segments
    assert len(each[2]) == 4 * segments
    assert sum(once[2]) == sum(each[2]) < 2 * 3 * 4 * segments  # outside the interval the negative half is not asked


def test_states_that_follow_the_teacher_are_asked_one_by_one():
    *_, batches = run(PiFlowImitation, num_decay_iters=10, iteration=5)
    assert len(batches) == 4


def test_conditions_of_every_kind_are_repeated_within_their_half():
    conditions = {'class_labels': torch.tensor([9, 8, 1, 2]), 'nested': {'prompts': ['n1', 'n2', 'p1', 'p2']}}
    repeated = repeat_groups(conditions, group_size=2, times=2)
    assert repeated['class_labels'].tolist() == [9, 8, 9, 8, 1, 2, 1, 2]
    assert repeated['nested']['prompts'] == ['n1', 'n2', 'n1', 'n2', 'p1', 'p2', 'p1', 'p2']
