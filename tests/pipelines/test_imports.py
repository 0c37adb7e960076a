"""Who generates images imports neither what trains nor what evaluates."""

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, sys
importlib.import_module({module!r})
print(*sorted(name for name in sys.modules if name.partition('.')[0] in {foreign} or name.startswith({rooms})))
"""
FOREIGN = ('mmengine', 'mmcv', 'tensorboard', 'wandb', 'torch_fidelity', 'sklearn', 'matplotlib', 'gradio', 'datasets')
ROOMS = tuple(f'lakonlab.{room}' for room in ('runner', 'evaluation', 'datasets', 'parallel', 'registry', 'config'))


@pytest.mark.parametrize(
    'module',
    [
        'lakonlab.pipelines.piqwen_pipeline',
        pytest.param('lakonlab.pipelines.piflux_pipeline', marks=pytest.mark.slow),
    ],
)
def test_import_of_a_pipeline(module):
    script = SCRIPT.format(module=module, foreign=FOREIGN, rooms=ROOMS)
    found = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_other_names():
    from lakonlab.pipelines import (
        piflow_loader,
        piflux_pipeline,
        pipeline_piflux,
        pipeline_piqwen,
        piqwen_pipeline,
        utils,
    )

    assert pipeline_piqwen.PiQwenImagePipeline is piqwen_pipeline.PiQwenImagePipeline
    assert pipeline_piflux.PiFluxPipeline is piflux_pipeline.PiFluxPipeline
    assert utils.LakonLabMixin is piflow_loader.PiFlowLoaderMixin
