"""Samples that were written are measured again without being made again, if they are the same samples."""

import json
from pathlib import Path

import pytest

from lakonlab.evaluation.evaluate import evaluate
from lakonlab.evaluation.images import WrittenImages
from lakonlab.evaluation.results import results_table, run_evaluations, write_results
from lakonlab.evaluation.viewer import read_page
from tests.evaluation.test_evaluate import DIGIT_FEATURES, Model, config
from tests.evaluation.thread_ranks import run_threads
from tests.runner.test_kept_results import write_reference

ORIGIN = dict(model_sha256='abc', seed=0)
DISTANCE = dict(type='FrechetDistance', extractor=DIGIT_FEATURES, reference=dict(type='Digits', split='val'))


class Noisy(Model):
    """Paints every sample with noise of its own."""

    def val_step(self, data, **arguments):
        outputs = super().val_step(data, **arguments)
        return {**outputs, 'pred_imgs': (outputs['pred_imgs'] * 0.4 + 0.2 * data['noise']).clamp(0, 1)}


def run(folder, model=None, ranks=None, origin=ORIGIN, reuse=True, **entry):
    entry = dict(dict(viz_dir=str(folder), viz_num=None, metrics=[DISTANCE]), **entry)
    model, extra = model or Noisy(), {} if ranks is None else dict(ranks=ranks, is_divided=True)
    (results,) = run_evaluations(model, config(**entry), origin=origin, reuse=reuse, **extra)
    return results, sum(len(ids) for _, _, ids in model.calls)


def test_images_are_measured_as_samples_of_8_bits(tmp_path):
    written, made = run(tmp_path, reuse=False, quantize='uint8')
    assert made == 25
    assert written['reused'] is None
    again, made = run(tmp_path)
    assert made == 0
    assert again['reused'] == dict(read=25, made=0)
    assert again['metrics'] == written['metrics']
    assert again['protocol'] == written['protocol']
    assert again['protocol']['FrechetDistance']['quantize'] == 'uint8'
    exact, _ = run(tmp_path / 'other', reuse=False)
    assert exact['metrics']['frechet_distance'] == pytest.approx(written['metrics']['frechet_distance'], rel=0.02)
    assert exact['metrics'] != written['metrics']


def test_what_is_missing_or_damaged_is_made_again(tmp_path, caplog):
    expected, _ = run(tmp_path, reuse=False, quantize='uint8')
    (tmp_path / 'default' / '000000012.png').write_bytes(b'damaged')
    (tmp_path / 'default' / '000000023.png').unlink()
    again, made = run(tmp_path)
    assert made == 15  # their batches, of 10 and of 5
    assert again['metrics'] == expected['metrics']
    assert again['reused'] == dict(read=10, made=15)
    assert 'are made again' in caplog.text
    assert f'val_p: 10 samples were read from {tmp_path / "default"}, 15 made' in caplog.text
    assert run(tmp_path)[1] == 0


@pytest.mark.parametrize(
    ('changes', 'key'),
    [
        (dict(origin=dict(model_sha256='other', seed=0)), 'model_sha256'),
        (dict(sample_kwargs=dict(test_cfg_override=dict(num_timesteps=2))), 'sample_kwargs'),
    ],
)
def test_images_of_other_samples_are_not_used(tmp_path, changes, key, caplog):
    run(tmp_path, reuse=False)
    again, made = run(tmp_path, **changes)
    assert (made, again['reused']) == (25, dict(read=0, made=25))
    assert f'are of other samples: samples.json differs in {key}\n' in caplog.text
    assert run(tmp_path, **changes)[1] == 0


def test_images_of_training_are_not_used(tmp_path, caplog):
    run(tmp_path, reuse=False, origin=None)
    assert run(tmp_path)[1] == 25
    assert 'has no samples.json' in caplog.text


@pytest.mark.parametrize('content', ['{', '[1]', 'null'])
def test_why_images_are_made_again(tmp_path, caplog, content):
    assert run(tmp_path / 'absent')[1] == 25
    assert f'val_p: all samples are made: there are no images in {tmp_path / "absent"}' in caplog.text
    run(tmp_path, reuse=False)
    (tmp_path / 'default' / 'samples.json').write_text(content)
    assert run(tmp_path)[1] == 25
    assert f'the images in {tmp_path / "default"} are of other samples' in caplog.text


def test_processes_that_share_a_network_use_it_together(tmp_path):
    run(tmp_path, reuse=False)
    (tmp_path / 'default' / '000000002.png').unlink()
    outcomes = run_threads(lambda ranks: run(tmp_path, ranks=ranks), 2)
    assert [made for _, made in outcomes] == [10, 10]  # the first of two rounds
    assert [results['reused'] for results, _ in outcomes] == [dict(read=5, made=20)] * 2


def test_files_cannot_be_measured_with_more_bits(tmp_path):
    with pytest.raises(ValueError, match="set quantize='uint8'"):
        evaluate(Model(), None, [], written=WrittenImages(tmp_path, ORIGIN))


def test_the_page_shows_what_was_measured(tmp_path):
    results, _ = run(tmp_path / 'viz', reuse=False, viz_num=7)
    page = read_page(results['page'])
    assert Path(results['page']) == tmp_path / 'viz' / 'default.html'
    assert [(item.id, item.caption) for item in page.items] == [(number, str(number % 10)) for number in range(7)]
    assert all((tmp_path / 'viz' / item.sources[0]).is_file() for item in page.items)
    assert page.columns[0].numbers == results['metrics']
    assert page.columns[0].facts['protocol'] == json.loads(json.dumps(results['protocol']))


def test_numbers_that_json_does_not_have(tmp_path):
    result = dict(name='val', num_samples=2, metrics=dict(fid=float('nan'), kid=float('-inf'), recall=0.5))
    content = write_results(tmp_path / 'results.json', [result], name='run')

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    read = json.loads((tmp_path / 'results.json').read_text(), parse_constant=refuse)
    assert read == content
    assert read['evaluations'][0]['metrics'] == dict(fid='nan', kid='-inf', recall=0.5)
    assert '| nan' in (tmp_path / 'results.md').read_text().replace('  ', ' ')


def test_table():
    evaluations = [
        dict(name='val_a|b', nfe=4, num_samples=100, quantize='uint8', metrics=dict(fid=1.23456789, recall=0.5)),
        dict(name='val', nfe=None, num_samples=20, metrics=dict(speed=1e9)),
    ]
    lines = results_table(dict(name='run', checkpoint='c/iter_1', evaluations=evaluations)).splitlines()
    assert lines[:3] == ['# run', '', 'checkpoint: c/iter_1']
    cells = [[cell.strip() for cell in line.replace('\\|', '/').split('|')[1:-1]] for line in lines[-4:]]
    assert cells[0] == ['evaluation', 'NFE', 'samples', 'quantize', 'fid', 'recall', 'speed']
    assert all(cell.startswith(':') != cell.endswith(':') for cell in cells[1])
    assert cells[2] == ['val_a/b', '4', '100', 'uint8', '1.23457', '0.5', '']
    assert cells[3] == ['val', '', '20', '', '', '', '1e+09']
    assert len({len(line) for line in lines[-4:]}) == 1


def test_the_table_tells_which_numbers_are_not_of_all_samples(tmp_path):
    write_reference(tmp_path / 'r.safetensors')
    metric = dict(
        type='InceptionMetrics', reference=str(tmp_path / 'r.safetensors'), extractor=DIGIT_FEATURES, use_pr=False
    )
    made = []
    for wanted, more in ((None, []), (20, [dict(type='ColorStats')]), (1000, [])):
        results, _ = run(tmp_path, reuse=False, metrics=[dict(metric, num_images=wanted), *more])
        made.append(dict(results, name=f'wanted {wanted}'))
    made.append(run(tmp_path, metrics=[metric])[0])
    header, _, *rows = [line for line in results_table(dict(evaluations=made)).splitlines() if line.startswith('|')]
    names = [cell.strip() for cell in header.split('|')[1:-1]]
    rows = [dict(zip(names, (cell.strip() for cell in line.split('|')[1:-1]), strict=True)) for line in rows]
    assert [row['fid'].partition(' ')[2] for row in rows] == ['', '(1)', '(2)', '']
    assert [row['is_std'].partition(' ')[2] for row in rows] == ['', '(1)', '(2)', '']
    assert '(' not in rows[1]['brightness'] != ''
    assert [row['quantize'] for row in rows] == ['float', 'float', 'float', 'uint8']
    notes = results_table(dict(evaluations=made)).splitlines()[-3:]
    assert notes[0] == '(1) of 20 samples'
    assert notes[2].startswith('(2) of 25 samples only, where num_images=1000: not comparable')
