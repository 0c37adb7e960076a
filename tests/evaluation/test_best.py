import pytest

from lakonlab.evaluation.best import BestValue, number_that_decides
from lakonlab.registry import METRICS

NAN = float('nan')


def built(*names):
    features = dict(extractor=dict(type='DigitClassifier'))
    reference = dict(reference=dict(type='Digits', split='val'))
    arguments = dict(FrechetDistance={**features, **reference}, ClassAccuracy=features, FeatureDiversity=features)
    return [METRICS.build(dict(arguments.get(name, {}), type=name)).better for name in names]


@pytest.mark.parametrize(
    ('better', 'values', 'improves'),
    [
        ('lower', [NAN, 3.0, 3.0, 4.0, 2.0, NAN, 2.5], [0, 1, 0, 0, 1, 0, 0]),
        ('higher', [0.5, NAN, 0.25, 0.75, 0.75, float('inf')], [1, 0, 0, 1, 0, 1]),
    ],
)
def test_what_is_better(better, values, improves):
    best = BestValue('number', better)
    assert [best.update(value, step) for step, value in enumerate(values)] == [bool(value) for value in improves]
    last = max(step for step, improved in enumerate(improves) if improved)
    assert (best.value, best.step) == (values[last], last)


def test_the_number_that_decides():
    metrics = built('SamplingSpeed', 'FeatureDiversity', 'ClassAccuracy', 'FrechetDistance', 'ReferenceRMSE')
    assert number_that_decides(metrics, None, 'entry') == ('class_accuracy', 'higher')
    assert number_that_decides(metrics, 'frechet_distance', 'entry') == ('frechet_distance', 'lower')
    assert number_that_decides(metrics, 'reference_rmse', 'entry') == ('reference_rmse', 'lower')
    assert number_that_decides(metrics, ['reference_rmse', 'fid'], 'entry') == ('reference_rmse', 'lower')


@pytest.mark.parametrize('wanted', ['fid', 'feature_diversity', ['fid', 'reference_rmse'], []])
def test_a_number_that_cannot_decide(wanted):
    with pytest.raises(ValueError, match=r"entry\.best_metric: found .*, expected .*: 'reference_rmse'"):
        number_that_decides(built('FeatureDiversity', 'ReferenceRMSE'), wanted, 'entry')
    with pytest.raises(ValueError, match='no metric of this entry tells better weights'):
        number_that_decides(built('FeatureDiversity'), None, 'entry')
