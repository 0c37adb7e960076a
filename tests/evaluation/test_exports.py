import json

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.evaluation.results import run_evaluations
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS
from tests.evaluation.test_evaluate import Model, config

PROMPTS = ['a cat', 'two dogs, "barking"', 'a red cube']


def samples(repeat, side=4):
    """Every sample in a grey of its own, in two batches."""
    count = len(PROMPTS) * repeat
    images = (torch.arange(count) / 255).reshape(-1, 1, 1, 1).expand(-1, 3, side, side)
    prompts = [PROMPTS[number // repeat] for number in range(count)]
    for part in (slice(0, count // 2), slice(count // 2, count)):
        yield SampleBatch(images[part], list(range(count))[part], torch.arange(count)[part], prompts=prompts[part])


def exported(kind, repeat=4, **arguments):
    metric = METRICS.build(dict(type=kind, **arguments))
    for batch in samples(repeat):
        metric.feed(batch)
    assert metric.compute() == {}
    assert metric.protocol()['num_images'] == 3 * repeat
    return metric


def grey(path):
    return np.asarray(Image.open(path))[..., 0]


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_dpg_bench(tmp_path):
    table = tmp_path / 'dpg_bench.csv'
    table.write_text('item_id,text,tuple\nx,"a red  cube",t\nCOCO 7,a cat,t\ncat,"two dogs, ""barking""",t\n')
    exported('DPGBenchExport', out_dir=str(tmp_path / 'out'), export_size=8, metadata=str(table))
    assert names(tmp_path / 'out') == ['COCO 7.png', 'cat.png', 'x.png']
    grid = grey(tmp_path / 'out' / 'cat.png')
    assert grid.shape == (16, 16)
    assert grid[::8, ::8].tolist() == [[4, 5], [6, 7]]
    exported('DPGBenchExport', 1, out_dir=str(tmp_path / 'plain'), export_size=None, samples_per_prompt=1)
    assert names(tmp_path / 'plain') == ['0.png', '1.png', '2.png']
    assert grey(tmp_path / 'plain' / '2.png').shape == (4, 4)


def test_gen_eval(tmp_path):
    lines = [dict(tag='single_object', include=[dict(count=1)], prompt=prompt) for prompt in PROMPTS]
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    out = tmp_path / 'out'
    exported('GenEvalExport', 2, out_dir=str(out), samples_per_prompt=2, metadata=str(tmp_path / 'metadata.jsonl'))
    parts = ['grid.png', 'metadata.jsonl', 'samples/0000.png', 'samples/0001.png']
    assert names(out) == [f'{number:05d}/{part}' for number in range(3) for part in parts]
    assert json.loads((out / '00001' / 'metadata.jsonl').read_text()) == lines[1]
    assert grey(out / '00002' / 'samples' / '0001.png').shape == (1024, 1024)
    assert (grey(out / '00002' / 'samples' / '0001.png') == 5).all()
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines[::-1])))
    with pytest.raises(ValueError, match=r"prompt 0 is 'a cat', but .* has 'a red cube' there"):
        exported('GenEvalExport', 2, out_dir=str(tmp_path / 'b'), samples_per_prompt=2,
                 metadata=str(tmp_path / 'metadata.jsonl'))  # fmt: skip


def test_hpsv3_benchmark(tmp_path):
    (tmp_path / 'benchmark.json').write_text(json.dumps({'animals': PROMPTS[:2], 'things': PROMPTS[2:]}))
    out = tmp_path / 'out'
    arguments = dict(samples_per_prompt=1, export_size=None, metadata=str(tmp_path / 'benchmark.json'))
    exported('HPSv3BenchmarkExport', 1, out_dir=str(out), **arguments)
    stems = ['animals/00000_00', 'animals/00001_00', 'things/00002_00']
    assert names(out) == [f'{stem}.{suffix}' for stem in stems for suffix in ('png', 'txt')]
    assert (out / 'animals/00001_00.txt').read_text() == PROMPTS[1]
    assert (grey(out / 'things/00002_00.png') == 2).all()


def test_folders_that_are_not_empty(tmp_path):
    (tmp_path / 'mine.txt').touch()
    arguments = dict(out_dir=str(tmp_path), export_size=None)
    with pytest.raises(FileExistsError, match='is not empty'):
        exported('DPGBenchExport', **arguments, clear_existing=False)
    exported('DPGBenchExport', **arguments)
    assert names(tmp_path) == ['0.png', '1.png', '2.png']


@pytest.mark.parametrize('clear_existing', [True, False])
def test_several_evaluations(tmp_path, clear_existing):
    metric = METRICS.build(
        dict(type='DPGBenchExport', out_dir=str(tmp_path), export_size=None, clear_existing=clear_existing)
    )
    for tag in ('1000', '2000'):
        metric.prepare(tag)
        metric.reset()
        for batch in samples(4):
            metric.feed(batch)
        metric.compute()
        assert metric.protocol()['folder'] == str(tmp_path / tag)
    assert names(tmp_path) == [f'{tag}/{number}.png' for tag in ('1000', '2000') for number in range(3)]
    if clear_existing:
        metric.prepare('1000')
        assert names(tmp_path) == [f'2000/{number}.png' for number in range(3)]
    else:
        with pytest.raises(FileExistsError, match='is not empty'):
            metric.prepare('1000')


def test_what_is_in_the_way_is_found_before_anything_is_sampled(tmp_path):
    (tmp_path / 'default').mkdir()
    (tmp_path / 'default' / 'mine.txt').touch()
    export = dict(type='GenEvalExport', out_dir=str(tmp_path), clear_existing=False)
    model = Model()
    with pytest.raises(FileExistsError, match='is not empty'):
        run_evaluations(model, config(metrics=export))
    assert not model.calls


def test_a_prompt_that_is_not_repeated(tmp_path):
    export = dict(type='GenEvalExport', out_dir=str(tmp_path), export_size=None, samples_per_prompt=4)
    metric = METRICS.build(export)
    batch = SampleBatch(torch.zeros(3, 3, 4, 4), [0, 1, 2], prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"samples 0 to 3 should be of one prompt, but are of 'a cat' and .*repeat=4"):
        metric.feed(batch)
    assert not names(tmp_path)


def test_samples_that_do_not_fit(tmp_path):
    metric = METRICS.build(dict(type='GenEvalExport', out_dir=str(tmp_path / 'a'), export_size=None))
    metric.feed(SampleBatch(torch.zeros(3, 3, 4, 4), [0, 1, 2], prompts=['a cat'] * 3))
    with pytest.raises(ValueError, match='prompt 0 has 3 of 4 samples'):
        metric.compute()
    metric = METRICS.build(dict(type='GenEvalExport', out_dir=str(tmp_path / 'b')))
    with pytest.raises(ValueError, match='needs samples with prompts'):
        metric.feed(SampleBatch(torch.zeros(1, 3, 4, 4), [0]))
    with pytest.raises(ValueError, match='export_size=0'):
        METRICS.build(dict(type='GenEvalExport', out_dir='x', export_size=0))


@pytest.mark.parametrize('limit', [None, 7])
def test_adm(tmp_path, limit):
    metric = METRICS.build(dict(type='ADMExport', path=str(tmp_path / 'samples.npz'), num_images=limit))
    for batch in samples(4):
        metric.feed(batch)
    assert metric.compute() == {}
    count = limit or 12
    assert metric.protocol()['num_images'] == count
    with np.load(tmp_path / 'samples.npz') as archive:
        assert archive.files == ['arr_0', 'arr_1']
        assert (archive['arr_0'].shape, archive['arr_0'].dtype) == ((count, 4, 4, 3), np.uint8)
        assert archive['arr_0'][:, 0, 0, 0].tolist() == archive['arr_1'].tolist() == list(range(count))
    metric.reset()
    metric.feed(next(samples(4, side=4)))
    with pytest.raises(ValueError, match='samples of one size'):
        metric.feed(next(samples(4, side=5)))
    with pytest.raises(ValueError, match=r'ends in \.npz'):
        METRICS.build(dict(type='ADMExport', path='samples.npy'))
