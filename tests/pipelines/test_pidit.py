"""The pipeline of class-conditional students, of what the export tool writes of them."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

from lakonlab.config.load import load_config
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.models.architecture.roles import named_state
from lakonlab.pipelines.adapter_files import AdapterError
from lakonlab.pipelines.pidit_pipeline import PiDiTPipeline
from lakonlab.registry import MODELS
from lakonlab.runner.export_adapter import export_adapter
from lakonlab.storage.checkpoint import write_checkpoint
from tests.pipelines.trained import in_folder

STUDENTS = {
    'GM': ('configs/digits/gmdit_k8_digits_piid_2step.py', {}),
    'DX': ('configs/digits/dxdit_n10_digits_piid_1step.py', {}),
    # what only the sampler of a run knows: the unit of time, its direction, the shift, the last segment
    'GM of other times': (
        'configs/digits/gmdit_k8_digits_piid_2step.py',
        dict(
            model=dict(
                diffusion=dict(num_timesteps=1000, flip_model_timesteps=True, timestep_sampler=dict(shift=2.0)),
            ),
            test_cfg=dict(nfe=3, final_step_size_scale=0.5, temperature=0.4),
        ),
    ),
}
LABELS = (3, 0, 9)


def exported(name, folder):
    """A student that nobody has trained, as model and as export."""
    config, changes = STUDENTS[name]
    cfg = load_config(config)
    cfg.merge_from_dict(changes)
    cfg.model.teacher = None
    cfg.model.diffusion.denoising.pretrained = None
    cfg.work_dir = str(folder / 'work')
    torch.manual_seed(0)
    plain = cfg.to_dict()
    model = MODELS.build({**plain['model'], 'test_cfg': plain['test_cfg'], 'train_cfg': plain['train_cfg']}).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape))
    state = {name: tensor.detach() for name, tensor in named_state(model) if name.startswith('diffusion_ema.')}
    checkpoint = write_checkpoint(folder / 'checkpoints', 7, {'model': state}, {})
    return model, export_adapter(cfg, folder / 'export', checkpoint=str(checkpoint))


@pytest.fixture(params=STUDENTS)
def student(request, tmp_path):
    model, folder = exported(request.param, tmp_path)
    pipe = PiDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return model, folder, pipe


def generators():
    return [torch.Generator().manual_seed(number) for number in range(len(LABELS))]


def test_samples_of_the_trainer(student):
    model, _, pipe = student
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = model.val_step(dict(labels=torch.tensor(LABELS), noise=noise))['pred_imgs']
    found = pipe(LABELS, latents=noise, output_type='pt').images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, pipe((4, 4, 4), latents=noise, output_type='pt').images, atol=1e-3)


def test_snippet_of_the_card(student, tmp_path):
    _, folder, pipe = student
    card = (folder / 'README.md').read_text()
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    assert code.count('\n') == 6
    found = {}
    with in_folder(tmp_path):
        exec(code, found)
    image = pipe(3, generator=torch.Generator().manual_seed(0)).images[0]
    assert found['image'].size == (8, 8)
    assert list(found['image'].getdata()) == list(image.getdata())
    assert (tmp_path / 'image.png').stat().st_size > 0


def test_images_do_not_depend_on_their_batch(student):
    pipe = student[2]
    together = pipe(LABELS, generator=generators(), output_type='latent').images
    for label, generator, image in zip(LABELS, generators(), together):
        alone = pipe(label, generator=generator, output_type='latent', return_dict=False)[0]
        torch.testing.assert_close(alone[0], image, rtol=0, atol=1e-5)


def test_saved_and_read_again(student, tmp_path):
    pipe = student[2]
    pipe.save_pretrained(tmp_path / 'saved')
    again = PiDiTPipeline.from_pretrained(tmp_path / 'saved')
    again.set_progress_bar_config(disable=True)
    one, other = (each(LABELS, generator=generators(), output_type='latent').images for each in (pipe, again))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="no argument 'variant'"):
        pipe.save_pretrained(tmp_path / 'saved', variant='fp16')


def test_settings(tmp_path):
    _, folder = exported('GM', tmp_path)
    pipe = PiDiTPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dtype == torch.bfloat16
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def call(**settings):
        return pipe(3, latents=noise, output_type='latent', **settings).images

    own = call()
    assert torch.equal(own, call(num_inference_steps=2, total_substeps=128, temperature=1.0))
    assert not torch.equal(own, call(num_inference_steps=4))
    assert not torch.equal(call(temperature=0.2), own)
    assert call().dtype == torch.float32
    for settings, message in (
        (dict(num_inference_steps=0), 'num_inference_steps=0: expected'),
        (dict(temperature=None), 'temperature=None: expected'),
        (dict(generator=generators()), '3 generators for 1 labels'),
    ):
        with pytest.raises(ValueError, match=message):
            call(**settings)
    with pytest.raises(ValueError, match=r'class_labels=\[10\]'):
        pipe(10)
    with pytest.raises(ValueError, match=r'latents of shape \(1, 1, 8, 8\): expected \(2, 1, 8, 8\)'):
        pipe((1, 2), latents=noise)


def test_autoencoder(tmp_path):
    """Its snippet loads it."""
    _, folder = exported('GM', tmp_path)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=1, layers_per_block=1).eval()
    pipe = PiDiTPipeline.from_pretrained(folder, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(3, generator=generators()[:1], output_type='latent').images
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    found = pipe(3, generator=generators()[:1], output_type='pt').images
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1))


def test_without_a_recipe(tmp_path):
    _, folder = exported('GM', tmp_path)
    file = folder / 'diffusion_pytorch_model.safetensors'
    with safe_open(file, 'pt') as content:
        state, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118
    recipe = json.loads(metadata.pop('piflow_recipe'))
    assert recipe['num_timesteps'] == 1
    assert recipe['flip_model_timesteps'] is False
    save_file(state, file, metadata)
    pipe = PiDiTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match='num_inference_steps: the file of this student does not say'):
        pipe(3)
    assert pipe(3, num_inference_steps=1).images[0].size == (8, 8)


def test_what_is_no_such_student(tmp_path):
    _, folder = exported('GM', tmp_path)
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, '_class_name': 'GMFluxTransformer'}))
    with pytest.raises(AdapterError, match=r"is no class-conditional student: .* holds a 'GMFluxTransformer'"):
        PiDiTPipeline.from_pretrained(folder)
    file.write_text(json.dumps({**config, 'num_layers': config['num_layers'] + 1}))
    with pytest.raises(PretrainedError, match='14 missing'):
        PiDiTPipeline.from_pretrained(folder)
    with pytest.raises(AdapterError, match='there is no folder'):
        PiDiTPipeline.from_pretrained(tmp_path / 'nothing')
