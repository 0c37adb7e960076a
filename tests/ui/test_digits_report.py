import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lakonlab.ui.charts import line_chart
from lakonlab.ui.digits_report import (
    DX_ONE_STEP,
    ONE_STEP,
    TEACHER,
    TWO_STEP,
    check_targets,
    collect,
    read_curve,
    table,
    write_report,
)

NUMBERS = {  # config -> evaluation -> (distance, RMSE)
    TEACHER: {
        'val_euler1': (17.0, 0.36),
        'val_euler4': (1.3, 0.11),
        'val_euler32': (0.7, 0.0),
        'train_real': (0.15, None),
    },
    ONE_STEP: {'val_student': (0.8, 0.115)},
    TWO_STEP: {'val_student': (0.72, 0.074)},
}


def fabricate(suffix='', scale=1.0):
    """Results of finished runs, in the present directory."""
    names = {}
    for config, evaluations in NUMBERS.items():
        run = names[config] = config + suffix
        entries = []
        for name, (distance, rmse) in evaluations.items():
            images = f'viz/{run}/{name}/final'
            Path(images).mkdir(parents=True)
            for number in range(20):
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(f'{images}/{number:09d}.png')
            Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(f'{images}/grid.png')
            metrics = dict(frechet_distance=distance * scale, class_accuracy=0.9955, feature_diversity=2.0)
            if rmse is not None:
                metrics['reference_rmse'] = rmse * scale
            extractor = dict(name='DigitClassifier', weights_sha256='ab' * 32)
            protocol = dict(FrechetDistance=dict(num_images=1000, extractor=extractor, reference=dict(num_images=355)))
            facts = dict(protocol=protocol, images=images, made=dict(torch='2'))
            entries.append(dict(name=name, nfe=1, metrics=metrics, **facts))
        folder = Path('work_dirs', run)
        folder.mkdir(parents=True)
        folder.joinpath('results.json').write_text(json.dumps(dict(name=run, evaluations=entries)))
        log = [json.dumps(dict(step=step, loss_diffusion=1 / step, lr=1)) for step in (50, 100, 150)]
        folder.joinpath('scalars.json').write_text('\n'.join([*log, '{"step": 200, "loss_dif']))
    return names


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return collect(2021, fabricate(), {'teacher train': 99.2}, {'teacher train': 'python tools/train.py <config>'})


class Reader(html.parser.HTMLParser):
    """Checks that tags close and collects what they refer to."""

    void = {'meta', 'img', 'line', 'polyline'}

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.references += [value for key, value in attributes if key in ('src', 'href', 'xlink:href')]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.void:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_self_contained(results, tmp_path):
    path = write_report([results], tmp_path / 'out')
    text = path.read_text(encoding='utf-8')
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.references
    assert all(reference.startswith('data:image/png;base64,') for reference in reader.references)
    assert not re.search(r'https?:|url\(|<script|@import|<link', text)
    shown = ' '.join(reader.text)
    for expected in ('0.800', '17.000', '99.55%', '0.0740', 'python tools/train.py <config>', 'one-step student'):
        assert expected in shown
    assert text.count('<svg') == 2
    assert Image.open(tmp_path / 'out' / 'digits.png').size[1] == 5 * 35 + 3


def test_markdown(results, tmp_path):
    write_report([results], tmp_path / 'out')
    text = (tmp_path / 'out' / 'report.md').read_text(encoding='utf-8')
    assert '![samples from the same noise](digits.png)' in text
    assert re.search(r'\| one-step student \(GMFlow policy\) \| 1 \| 0\.800 \| 99\.55% \| 2\.000 \| 0\.1150 \|', text)
    assert '| teacher train | 99 |' in text
    assert str(tmp_path) not in text


def test_numbers_come_from_the_files(results):
    rows = {row[0]: row for row in table([results])}
    assert rows['teacher, 4 Euler steps'][2] == '1.300'
    assert 'teacher, 8 Euler steps' not in rows  # was not measured
    assert rows['real digits (training images)'][5] == ''


def test_several_seeds_show_mean_and_spread(results):
    other = collect(2022, fabricate('_seed2022', 1.5), {}, {})
    rows = {row[0]: row for row in table([results, other])}
    assert rows['one-step student (GMFlow policy)'][2] == '1.000 ± 0.283'
    targets = check_targets([results, other])
    assert not next(target for target in targets if 'RMSE' in target.text).met  # the second seed misses it


def test_targets(results):
    targets = check_targets([results])
    assert all(target.met for target in targets)
    assert len(targets) == 6
    assert not any(DX_ONE_STEP in target.text or 'DX' in target.text for target in targets)
    entry = results.evaluation(TWO_STEP, 'val_student')
    entry['metrics'].update(reference_rmse=0.081, class_accuracy=0.98)
    missed = [target for target in check_targets([results]) if not target.met]
    assert len(missed) == 2
    assert 'NOT MET' in str(missed[0])
    assert '0.081 <= 0.08' in str(missed[0])


def test_curve_of_an_interrupted_run(tmp_path):
    log = tmp_path / 'scalars.json'
    lines = [dict(step=50, loss_diffusion=3.0), dict(step=100, loss_diffusion=2.0), dict(step=100, loss_diffusion=1.0)]
    log.write_text('\n'.join(json.dumps(line) for line in [*lines, dict(step=100, val_x=7)]) + '\n{"st')
    assert read_curve(log) == [(50, 3.0), (100, 1.0)]
    assert read_curve(tmp_path / 'missing.json') == []


def test_missing_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'results\.json'):
        collect(0, {TEACHER: 'absent'}, {}, {})


def test_chart_escapes_and_skips_what_cannot_be_drawn():
    chart = line_chart('a < b', {'x & y': [(0, 1.0), (1, 0.0), (2, float('nan')), (3, 0.5)]})
    assert 'a &lt; b' in chart
    assert 'x &amp; y' in chart
    assert 'nan' not in chart
    assert len(re.search('points="([^"]*)"', chart).group(1).split()) == 2
    assert 'no data' in line_chart('empty', {'x': []})
