"""The GMFlow configs: their networks are the published ones, and the checkerboard trains through the real command."""

import gzip
import json
import math
from pathlib import Path

import pytest

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.models.architecture.gmflow.spectrum_mlp import SpectrumMLP
from lakonlab.runner.dry_run import build_on_meta, dry_run
from lakonlab.runner.launch import train
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.storage.checkpoint import find_checkpoint, read_state, read_tensors
from tests.tools.test_command_line import arguments

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'gmflow'
MANIFESTS = ROOT / 'tests' / 'data' / 'manifests'
CHECKERBOARD = CONFIGS / 'gmmlp_k64_checkerboard.py'
IMAGENET, IMAGENET_TEST = CONFIGS / 'gmdit_k8_imagenet_8gpus.py', CONFIGS / 'gmdit_k8_imagenet_test.py'
SMALL = [
    'data.train_dataloader.samples_per_gpu=16',
    'data.workers_per_gpu=0',
    'lr_config.warmup_iters=5',
    'log_config.interval=4',
    'checkpoint_config.interval=4',
]


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('path', [CHECKERBOARD, IMAGENET, IMAGENET_TEST], ids=lambda path: path.stem)
def test_networks_have_the_published_names_and_shapes(path):
    cfg = load_config(path)
    check_config(cfg)
    assert cfg.name == path.stem
    model = build_on_meta(cfg)
    manifest = json.loads(gzip.decompress((MANIFESTS / f'gmflow.{path.stem}.student.json.gz').read_bytes()))
    for role in (model.diffusion, model.diffusion_ema):
        state = role.denoising.state_dict()
        found = {key: [list(value.shape), str(value.dtype).removeprefix('torch.')] for key, value in state.items()}
        assert found == {key: value[:2] for key, value in manifest['state'].items()}
        assert all(tensor.is_meta for tensor in role.state_dict().values())


def test_published_hyperparameters_of_imagenet():
    cfg = load_config(IMAGENET)
    check_config(cfg)
    model = build_on_meta(cfg)
    (spectrum,) = (module for module in model.diffusion.modules() if isinstance(module, SpectrumMLP))
    widths = [parameter.shape[0] for name, parameter in spectrum.named_parameters() if name.endswith('bias')]
    assert widths == [64, 8, 4 * 32 * 32]
    for group in build_optimizers(model, cfg.optimizer)['diffusion'].param_groups:
        assert group['weight_decay'] == (0 if group['params'][0].ndim == 1 else 0.05)
        assert len({parameter.ndim == 1 for parameter in group['params']}) == 1


def test_imagenet_sweep_has_eighty_evaluations():
    entries = load_config(IMAGENET_TEST).evaluation
    overrides = [entry.sample_kwargs.test_cfg_override for entry in entries]
    assert len({entry.prefix for entry in entries}) == len(entries) == 80
    assert {(cfg.num_timesteps, cfg.num_substeps) for cfg in overrides} == {(8, 16), (32, 4)}
    scales = {cfg.guidance_scale for cfg in overrides}
    assert (min(scales), max(scales), len(scales)) == (0.02, 0.75, 20)


def test_checkerboard_dry_run_writes_nothing(tmp_path):
    cfg = load_config(CHECKERBOARD)
    check_config(cfg)
    text = dry_run(cfg, 'work_dirs/x', 1)
    assert '1,412,289' in text
    assert '100,000,000 samples' in text
    assert not list(tmp_path.iterdir())


def test_checkerboard_trains_and_resumes():
    """Interrupted and resumed equals uninterrupted, bit for bit; the loss falls."""
    for name, ends in {'interrupted': (6, 20), 'whole': (20,)}.items():
        for end in ends:
            options = [*SMALL, f'total_iters={end}', f'name={name}']
            train(arguments(CHECKERBOARD, cfg_options=options, seed=3, work_dir=f'work_dirs/{name}'))
    paths = {name: find_checkpoint(f'checkpoints/{name}') for name in ('interrupted', 'whole')}
    tensors = {name: read_tensors(path, 'model') for name, path in paths.items()}
    assert all(read_state(path)['iteration'] == 20 for path in paths.values())
    assert tensors['whole'].keys() == tensors['interrupted'].keys()
    for key, value in tensors['whole'].items():
        assert value.isfinite().all()
        assert (value == tensors['interrupted'][key]).all(), key
    entries = [json.loads(line) for line in Path('work_dirs/whole/scalars.json').read_text().splitlines()]
    losses = {entry['step']: entry['loss_transition'] for entry in entries if 'loss_transition' in entry}
    assert sorted(losses) == [4, 8, 12, 16, 20]
    assert all(math.isfinite(value) for value in losses.values())
    assert losses[20] < losses[4]
