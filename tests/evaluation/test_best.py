import pytest

from lakonlab.evaluation.best import BestValue, numbers_that_decide, restore
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


def test_the_numbers_that_decide():
    metrics = built('SamplingSpeed', 'FeatureDiversity', 'ClassAccuracy', 'FrechetDistance', 'ReferenceRMSE')
    assert numbers_that_decide(metrics, None, 'entry') == {'class_accuracy': 'higher'}
    assert numbers_that_decide(metrics, 'frechet_distance', 'entry') == {'frechet_distance': 'lower'}
    several = numbers_that_decide(metrics, ['reference_rmse', 'class_accuracy'], 'entry')
    assert list(several.items()) == [('reference_rmse', 'lower'), ('class_accuracy', 'higher')]


@pytest.mark.parametrize('wanted', ['fid', 'feature_diversity', ['reference_rmse', 'fid'], [], [['reference_rmse']]])
def test_a_number_that_cannot_decide(wanted):
    with pytest.raises(ValueError, match=r"entry\.best_metric: found .*, expected .*: 'reference_rmse'"):
        numbers_that_decide(built('FeatureDiversity', 'ReferenceRMSE'), wanted, 'entry')
    with pytest.raises(ValueError, match='no metric of this entry tells better weights'):
        numbers_that_decide(built('FeatureDiversity'), None, 'entry')


def test_a_number_decides_once():
    with pytest.raises(ValueError, match='names a number twice'):
        numbers_that_decide(built('ReferenceRMSE'), ['reference_rmse', 'reference_rmse'], 'entry')


def test_values_are_restored_by_name(caplog):
    before = [BestValue('fid', 'lower'), BestValue('kid', 'lower')]
    for value in before:
        value.update(2.0, 5)
    now = [BestValue('is', 'higher'), BestValue('kid', 'lower')]
    with caplog.at_level('INFO'):
        restore(now, [value.state_dict() for value in before])
    assert [(value.value, value.step) for value in now] == [(None, None), (2.0, 5)]
    assert 'the best fid so far is forgotten: best checkpoints are now chosen by is, kid' in caplog.text


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        ({}, ['fid', 'is']),
        (dict(use_kid=True), ['fid', 'kid', 'is']),
        (dict(use_is=False, use_pr=False), ['fid']),
        (dict(use_is=False, use_kid=True, prefix='patch'), ['patch_fid', 'patch_kid']),
    ],
)
def test_numbers_that_are_switched_off_do_not_decide(arguments, names):
    """As an object says, and, without one, its class, which the check of a config asks."""
    config = dict(type='InceptionMetrics', reference='a.npz', **arguments)
    metric = METRICS.build(config)
    assert list(metric.better) == list(type(metric).better_of(config)) == names
    for wanted in sorted({'fid', 'kid', 'is', 'patch_fid', 'patch_kid', 'patch_is'} - set(names)):
        expected = ', '.join(map(repr, names))
        with pytest.raises(
            ValueError, match=f"best_metric: found '{wanted}', expected numbers of metrics.*: {expected}$"
        ):
            numbers_that_decide([metric.better], wanted, 'entry')
