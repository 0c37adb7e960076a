import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.config.load import load_config, resolved_text
from lakonlab.storage.checkpoint import write_checkpoint
from lakonlab.ui.static_policy_demo import JAY, class_demo
from lakonlab.ui.static_policy_experiment import Settings, build_model
from lakonlab.ui.static_policy_teachers import class_subject
from tests.tiny_teacher import digits_teacher

SCRIPT = Path(__file__).parents[2] / 'demo' / 'train_piflow_dit_imagenet_toymodel.py'
TEACHER = 'checkpoints/tiny/latest'
SHORT = [
    '--teacher',
    TEACHER,
    '--num-iters',
    '20',
    '--lr',
    '0.02',
    '-k',
    '4',
    '--device',
    'cpu',
    '--out',
    'new/picture.png',
]


@pytest.fixture(scope='module')
def tiny_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    digits_teacher(folder)
    return folder


@pytest.fixture(autouse=True)
def _beside_a_teacher(tiny_teacher, tmp_path, monkeypatch):
    shutil.copytree(tiny_teacher, tmp_path / 'checkpoints' / 'tiny')
    monkeypatch.chdir(tmp_path)


def rmse(output: str) -> tuple[float, float]:
    """Before and after training, as printed."""
    words = next(line for line in output.splitlines() if line.startswith('RMSE')).split()
    return float(words[words.index('teacher:') + 1]), float(words[words.index('after;') - 1])


def test_a_policy_comes_closer_and_is_drawn(capsys):
    assert class_demo('', [*SHORT, '--num-iters', '60', '--picture-interval', '40']) == 0
    output = capsys.readouterr().out
    before, after = rmse(output)
    assert after < 0.7 * before
    assert 'iteration 60: loss ' in output
    files = sorted(path.name for path in Path('new').iterdir())
    assert files == ['picture.iter0040.png', 'picture.loss.png', 'picture.png']
    for name in files:
        assert f'saved new/{name}' in output
        assert np.asarray(Image.open(f'new/{name}')).std() > 5


@pytest.mark.parametrize('policy', ['DX', 'Momentum'])
def test_other_policies(capsys, policy):
    assert class_demo('', [*SHORT, '--policy-type', policy, '--num-iters', '40', '--picture-interval', '0']) == 0
    before, after = rmse(capsys.readouterr().out)
    assert after < before


def test_guidance_is_the_teachers_own_unless_given():
    def guidance(*arguments):
        return class_subject(TEACHER, [1], 1, *arguments).guidance

    assert guidance(None, 'float32') == {
        'guidance_scale': 1.5,
        'guidance_interval': [0, 0.7],
        'orthogonal_guidance': False,
    }
    assert guidance(3.0, 'float32')['guidance_scale'] == 3.0


def test_the_script_offers_it(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [str(SCRIPT), '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    assert end.value.code == 0
    output = capsys.readouterr().out
    for flag in ('--name', '--cfg', '--seed', '-k', '--num-iters', '--lr', '--out', '--num-intermediates', '--teacher'):
        assert flag in output


def test_the_published_teacher_at_full_size():
    subject = class_subject(None, [JAY], 1, None, 'bfloat16')
    with torch.device('meta'):
        model = build_model(subject, Settings(out=Path('x.png')))
    teacher = model.teacher
    assert sum(p.numel() for p in teacher.parameters()) == pytest.approx(675e6, rel=0.1)
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert teacher.num_timesteps == model.diffusion.num_timesteps == 1000
    assert teacher.denoising.pretrained == 'huggingface://Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth'
    assert model.diffusion.denoising.values['means'].shape == (1, 32, 4, 32, 32)
    assert model.teacher_guidance() == (4.0, {})


REFUSED = {
    'no teacher': (['--teacher', 'checkpoints/none/latest'], 'tools/train.py configs/digits/dit_digits_teacher.py'),
    'a student as teacher': (['--teacher', 'checkpoints/student/latest'], 'is a PiFlowImitation with a GMDiT'),
    'an unknown class': (['--class-label', '10'], 'knows the classes 0 to 9'),
    'no names': (['--name', 'jay'], 'imagenet1000_clsidx_to_labels.txt'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_done_is_said(capsys, case):
    flags, message = REFUSED[case]
    if 'student' in flags[-1]:
        cfg = load_config(SCRIPT.parents[1] / 'configs' / 'digits' / 'gmdit_k8_digits_piid_1step.py')
        write_checkpoint(Path('checkpoints/student'), 1, {'model': {'x': torch.ones(1)}}, {}, resolved_text(cfg))
    assert class_demo('', [*SHORT, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not list(Path('new').iterdir())


def test_names_of_classes(capsys):
    Path('data/imagenet').mkdir(parents=True)
    Path('data/imagenet/imagenet1000_clsidx_to_labels.txt').write_text("{0: 'tench, Tinca tinca',\n 7: 'cock'}")
    assert class_demo('', [*SHORT, '--num-iters', '1', '--name', 'Tinca tinca']) == 0
    assert class_demo('', [*SHORT, '--name', 'tenhc']) == 1
    assert 'tench' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--num-iters', '0'], 'expected a positive number'),
        (['--cfg', '0.5'], '0.5: expected 1 (no guidance) or more'),
        (['--policy-type', 'Spline'], 'invalid choice'),
        (['--name', 'jay', '--class-label', '3'], 'not allowed with'),
        (['--class-label', '-3'], 'expected 0 or a positive number'),
        (['--device', 'abacus'], 'abacus: cannot be used'),
        (['--out', 'picture.jpg'], 'argument --out: picture.jpg: expected the path of a .png file'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        class_demo('', [*SHORT, *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(capsys):
    assert class_demo('', [*SHORT, '--num-iters', '60', '--lr', '1e30']) == 1
    assert 'made no step' in capsys.readouterr().err
