"""Bases of pipelines, and their families."""

import pytest

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from tests import tiny_components


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    return {
        PiFluxPipeline: tiny_components.flux_folder(root / 'flux'),
        PiQwenImagePipeline: tiny_components.qwen_image_folder(root / 'qwen'),
    }


@pytest.fixture(params=[PiFluxPipeline, PiQwenImagePipeline], ids=['flux', 'qwen'])
def kind(request):
    return request.param
