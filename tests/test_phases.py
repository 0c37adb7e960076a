"""Time by phase."""

import threading
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.piflow import PiFlowImitation, PiFlowImitationDataFree
from lakonlab.models.diffusions.piflow_policies import GMFlowPolicy
from lakonlab.ops.random_source import SeededSource
from lakonlab.phases import OTHER, PhaseClock, active_clock, beat, in_phase, phase
from tests.toy_nets import ToyGM, ToyVelocity

CPU = torch.device('cpu')


class Device:
    """A timeline of a device that lags behind the host: a mark has a time once the device was said to get there."""

    def __init__(self, lag):
        self.now, self.lag, self.waits = 0.0, lag, 0
        self.done = -1.0

    def mark(self):
        return self.now

    def passed(self, mark):
        return mark <= max(self.done, self.now - self.lag)

    def wait(self, mark):
        self.waits += 1
        self.done = max(self.done, mark)

    def seconds(self, start, end):
        assert self.passed(start)
        assert self.passed(end)
        return end - start

    def work(self, seconds):
        self.now += seconds


@pytest.mark.parametrize('lag', [0.0, 2.5, 1000.0])
def test_time_goes_to_the_innermost_phase(lag):
    device = Device(lag)
    clock = PhaseClock(CPU, device)
    with clock.active():
        device.work(1)
        with phase('student'):
            device.work(2)
            with phase('teacher'):
                device.work(4)
                with phase('rollout'):
                    device.work(8)
                device.work(16)
            device.work(32)
            with phase('teacher'):
                device.work(64)
        device.work(128)
        assert device.waits == 0  # a step never waits for the device
        seconds = clock.seconds()
    assert seconds == {OTHER: 129, 'student': 34, 'teacher': 84, 'rollout': 8}
    assert device.waits > 0
    assert clock.shares() == pytest.approx({name: value / 255 for name, value in seconds.items()})


def test_a_window_begins_anew_and_takes_the_rest_of_an_open_phase():
    device = Device(5.0)
    clock = PhaseClock(CPU, device)
    device.work(100)  # before the run
    with clock.active(), phase('student'):
        with phase('teacher'):
            device.work(3)
        device.work(1)
        assert clock.shares() == {OTHER: 0, 'student': 0.25, 'teacher': 0.75}
        clock.restart()
        device.work(7)
        assert clock.shares() == {OTHER: 0, 'student': 1, 'teacher': 0}
        clock.restart()
        assert clock.shares() == {OTHER: 1, 'student': 0, 'teacher': 0}  # nothing has happened


def test_an_error_ends_its_phases():
    clock = PhaseClock(CPU)
    with clock.active(), phase('student'):
        with pytest.raises(ZeroDivisionError), phase('teacher'), phase('rollout'):
            1 / 0  # noqa: B018
        assert clock.current == 'student'
    assert clock.current == OTHER


def test_host_time_lies_between_what_is_measured_inside_and_outside():
    clock, marks = PhaseClock(CPU), []

    def note(seconds=0.0):
        marks.append(time.perf_counter())
        time.sleep(seconds)

    with clock.active():
        note()
        with phase('data'):
            note(0.01)
            note()
            with phase('checkpoint'):
                note(0.02)
                note()
            note()
        note()
    seconds = clock.seconds()
    assert marks[4] - marks[3] <= seconds['checkpoint'] <= marks[5] - marks[2]
    assert marks[2] - marks[1] <= seconds['data'] <= marks[6] - marks[0] - (marks[4] - marks[3])


def test_without_a_clock_nothing_is_made():
    assert phase('teacher') is phase('student')
    clock = PhaseClock(CPU)
    with clock.active():
        assert active_clock() is clock
    with phase('teacher'):
        beat()
    assert active_clock() is None
    assert clock.seconds().keys() == {OTHER}


def test_another_thread_sees_the_phase_and_the_beats_but_reports_nothing():
    clock, seen = PhaseClock(CPU), []

    def look():
        with phase('checkpoint'):  # as a thread that writes in the background
            seen.append((clock.current, clock.beats))

    with clock.active(), phase('evaluation'):
        for _ in range(2):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            before = time.monotonic()
            beat()
            assert clock.last_beat >= before
    assert [name for name, _ in seen] == ['evaluation', 'evaluation']
    assert seen[1][1] == seen[0][1] + 1
    assert clock.beats == seen[1][1] + 2  # the second beat, and the end of the phase


def test_waiting_for_items_is_a_phase_and_using_them_is_not():
    clock, seen = PhaseClock(CPU), []

    def items():
        for index in range(3):
            seen.append(clock.current)
            yield index

    with clock.active():
        for _ in in_phase('data', items()):
            seen.append(clock.current)
    assert seen == ['data', OTHER] * 3
    assert list(in_phase('data', [1, 2])) == [1, 2]


def test_a_compiled_function_with_phases_is_one_graph():
    def step(x):
        with phase('teacher'):
            y = x.sin()
        with phase('student'):
            return y * 2

    clock = PhaseClock(CPU)
    x = torch.linspace(0, 1, 5)
    with clock.active():
        result = torch.compile(step, backend='eager', fullgraph=True)(x)
    assert torch.equal(result, x.sin() * 2)
    assert clock.seconds().keys() == {OTHER}


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_recomputation_is_credited_to_its_phases(use_reentrant):
    clock, seen = PhaseClock(CPU), []

    def block(x):
        with phase('rollout'):
            y = x.sin()
            seen.append(clock.current)
        return y.exp()

    x = torch.ones(3, requires_grad=True)
    with clock.active(), phase('student'):
        loss = checkpoint(block, x, use_reentrant=use_reentrant).sum()
        loss.backward()
        assert clock.current == 'student'
    assert seen == ['rollout', 'rollout']
    torch.testing.assert_close(x.grad, x.detach().cos() * x.detach().sin().exp())


def test_a_profiler_sees_phases():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, phase('teacher'):
        torch.ones(2).sin()
    names = [event.name for event in profile.events()]
    assert 'phase: teacher' in names
    assert phase('teacher') is phase('student')


@pytest.mark.parametrize('cls', [PiFlowImitation, PiFlowImitationDataFree])
def test_training_names_teacher_and_rollouts(cls, monkeypatch):
    """The student's forward and backward pass stay with whoever marks the step."""
    clock, seen = PhaseClock(CPU), set()

    def watched(kind, name):
        def method(self, *args, **kwargs):
            seen.add((kind.__name__, name, clock.current))
            return original(self, *args, **kwargs)

        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, method)

    watched(ToyVelocity, 'base')
    watched(ToyGM, 'forward')
    for name in ('rollout', 'average_velocity'):
        watched(GMFlowPolicy, name)
    student = ToyGM(3, 2, num_classes=4).randomize(1)
    teacher = GaussianFlow(ToyVelocity(2, num_classes=4).randomize(2).requires_grad_(False), num_timesteps=1)
    train_cfg = dict(nfe=2, num_intermediate_states=2, window_substeps=4, total_substeps=16)
    model = cls(
        student,
        policy_type='GMFlow',
        flow_loss={'type': 'DiffusionMSELoss'},
        num_timesteps=1,
        train_cfg=train_cfg,
        test_cfg=dict(nfe=2, total_substeps=16),
    )
    x_0 = torch.zeros(2, 2, 4, 4)
    with clock.active(), phase('student'):
        loss, _ = model.forward_train(x_0, teacher=teacher, source=SeededSource(3))
        loss.backward()
    assert seen == {
        ('ToyVelocity', 'base', 'teacher'),
        ('ToyGM', 'forward', 'student'),
        ('GMFlowPolicy', 'rollout', 'rollout'),
        ('GMFlowPolicy', 'average_velocity', 'rollout'),
    }
    assert all(share > 0 for share in clock.shares().values())
    seen.clear()
    with clock.active(), phase('evaluation'):
        model.forward_test(torch.randn(2, 2, 4, 4))
    assert {(name, current) for _, name, current in seen} == {('forward', 'network'), ('rollout', 'evaluation')}
