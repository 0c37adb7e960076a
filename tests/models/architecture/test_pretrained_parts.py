"""Autoencoders and text encoders against the pipelines of diffusers that they come from."""

import diffusers
import pytest
import torch

from lakonlab.models.architecture.diffusers.pretrained import repository
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.ops.random_source import RecordedSource, SeededSource
from lakonlab.registry import MODULES
from lakonlab.storage import files
from tests import tiny_components

PROMPTS = ['a small house', 'two red apples on a table and the sea at night']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('pipelines')
    return {
        'flux': str(tiny_components.flux_folder(root / 'flux')),
        'qwen': str(tiny_components.qwen_image_folder(root / 'qwen')),
    }


@pytest.fixture(scope='module')
def parts(folders):
    def build(kind, **options):
        folder = folders['qwen' if 'Qwen' in kind else 'flux']
        subfolder = {'subfolder': 'vae'} if 'VAE' in kind else {}
        return MODULES.build({'type': kind, 'model_name_or_path': folder, **subfolder, **options})

    return build


class TestTextEncoders:
    @pytest.mark.parametrize('length', [16, 512])
    def test_flux(self, parts, folders, length):
        encoder = parts('PretrainedFluxTextEncoder', max_sequence_length=length, torch_dtype='float32')
        pipeline = diffusers.FluxPipeline.from_pretrained(folders['flux'], transformer=None, vae=None)
        tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=length)
        found = encoder(prompt=PROMPTS)
        # the same operations; where weights lie in memory may change the last bit
        torch.testing.assert_close(found['encoder_hidden_states'], tokens)
        torch.testing.assert_close(found['pooled_projections'], pooled)
        assert tokens.shape == (2, length, 32)

    @pytest.mark.parametrize('padded', [None, 64])
    def test_qwen_image(self, parts, folders, padded):
        encoder = parts(
            'PretrainedQwenImageTextEncoder', max_sequence_length=32, pad_seq_len=padded, torch_dtype='float32'
        )
        pipeline = diffusers.QwenImagePipeline.from_pretrained(folders['qwen'], transformer=None, vae=None)
        tokens, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=32)
        found = encoder(prompt=PROMPTS)
        length = tokens.shape[1]
        assert found['encoder_hidden_states'].shape == (2, padded or length, 64)
        torch.testing.assert_close(found['encoder_hidden_states'][:, :length], tokens)
        assert torch.equal(found['encoder_hidden_states_mask'][:, :length], mask)
        assert not found['encoder_hidden_states'][:, length:].any()
        assert not found['encoder_hidden_states_mask'][:, length:].any()

    def test_a_single_prompt_has_a_mask_too(self, parts):
        found = parts('PretrainedQwenImageTextEncoder', torch_dtype='float32')(PROMPTS[0])
        assert bool(found['encoder_hidden_states_mask'].all())
        assert found['encoder_hidden_states_mask'].dtype == torch.int64

    @pytest.mark.parametrize('kind', ['PretrainedFluxTextEncoder', 'PretrainedQwenImageTextEncoder'])
    def test_a_prompt_does_not_depend_on_its_neighbours(self, parts, kind):
        encoder = parts(kind, max_sequence_length=32, torch_dtype='float32')
        together, alone = encoder(PROMPTS), encoder(PROMPTS[:1])
        for name, value in alone.items():
            if value.is_floating_point():
                own = together[name][:1, : value.shape[1]]
                assert (own - value).abs().max() < 1e-5 * value.abs().max()

    def test_frozen_and_always_in_evaluation_mode(self, parts):
        encoder = parts('PretrainedFluxTextEncoder', torch_dtype='bfloat16').train()
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
        assert len(list(encoder.children())) == 2

    def test_errors(self, parts, folders):
        with pytest.raises(ValueError, match=r'pad_seq_len=8 is less than max_sequence_length=16'):
            parts('PretrainedQwenImageTextEncoder', max_sequence_length=16, pad_seq_len=8)
        with pytest.raises(PretrainedError, match=r"model_name_or_path='/absent' is no folder"):
            MODULES.build({'type': 'PretrainedFluxTextEncoder', 'model_name_or_path': '/absent'})
        with pytest.raises(PretrainedError, match=r'cannot be loaded'):
            MODULES.build({'type': 'PretrainedFluxTextEncoder', 'model_name_or_path': folders['qwen']})


class TestAutoencoders:
    def pictures(self, size=32):
        return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_scaling_of_flux(self, parts, folders):
        vae = parts('PretrainedVAE')
        model = diffusers.AutoencoderKL.from_pretrained(folders['flux'], subfolder='vae')
        pictures = self.pictures()
        with torch.no_grad():
            expected = (model.encode(pictures).latent_dist.mode() - 0.1159) * 0.3611
            latents = vae.encode(pictures, sample_mode='argmax')
            torch.testing.assert_close(latents, expected)
            torch.testing.assert_close(vae.decode(latents), model.decode(expected / 0.3611 + 0.1159).sample)

    def test_statistics_of_qwen_image(self, parts, folders):
        vae = parts('PretrainedVAEQwenImage')
        model = diffusers.AutoencoderKLQwenImage.from_pretrained(folders['qwen'], subfolder='vae')
        pictures = self.pictures()
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in ([0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]))
        with torch.no_grad():
            expected = (model.encode(pictures.unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
            latents = vae.encode(pictures, sample_mode='argmax')
            torch.testing.assert_close(latents, expected)
            decoded = model.decode((expected * std + mean).unsqueeze(2)).sample.squeeze(2)
            torch.testing.assert_close(vae.decode(latents), decoded)
        assert latents.shape == (3, 4, 4, 4)

    @pytest.mark.parametrize('kind', ['PretrainedVAE', 'PretrainedVAEQwenImage'])
    def test_sampling(self, parts, kind):
        """The posterior's noise comes from the source, row by row."""
        vae, pictures = parts(kind), self.pictures()
        mode = vae.encode(pictures, sample_mode='argmax')
        zeros = torch.zeros(mode.shape if kind == 'PretrainedVAE' else (3, 4, 1, 4, 4))
        torch.testing.assert_close(vae.encode(pictures, source=RecordedSource({'vae_noise': [zeros]})), mode)
        together = vae.encode(pictures, source=SeededSource(0, 0))
        last = vae.encode(pictures[2:], source=SeededSource(0, 0, first_row=2))
        torch.testing.assert_close(together[2:], last, rtol=1e-4, atol=1e-5)
        assert not torch.equal(together, mode)

    @pytest.mark.parametrize('kind', ['PretrainedVAE', 'PretrainedVAEQwenImage'])
    @pytest.mark.parametrize('slicing', [False, True])
    def test_parts_of_a_batch_equal_the_whole(self, parts, kind, slicing):
        pictures = self.pictures()
        whole, split = parts(kind), parts(kind, max_bs=2, use_slicing=slicing)
        latents = whole.encode(pictures, sample_mode='argmax')
        torch.testing.assert_close(split.encode(pictures, sample_mode='argmax'), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(split.decode(latents), whole.decode(latents), rtol=1e-4, atol=1e-5)

    def test_halves(self, parts):
        encoder, decoder = parts('PretrainedVAEEncoder'), parts('PretrainedVAEDecoder')
        latents = encoder.encode(self.pictures(), sample_mode='argmax')
        whole = parts('PretrainedVAE')
        torch.testing.assert_close(decoder.decode(latents), whole.decode(latents))
        count = [sum(p.numel() for p in part.parameters()) for part in (encoder, decoder, whole)]
        assert count[0] + count[1] == count[2]
        with pytest.raises(ValueError, match=r'no decoder: set del_decoder=False'):
            encoder.decode(latents)
        with pytest.raises(ValueError, match=r'no encoder: set del_encoder=False'):
            decoder.encode(self.pictures())

    def test_on_s3(self, parts, folders, bucket, monkeypatch, tmp_path):
        """Of a whole pipeline, no more than what is needed is downloaded."""
        monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
        files.upload(folders['flux'], f'{bucket}/flux')
        vae = parts('PretrainedVAE', model_name_or_path=f'{bucket}/flux')
        assert torch.equal(
            vae.encode(self.pictures(), 'argmax'), parts('PretrainedVAE').encode(self.pictures(), 'argmax')
        )
        encoder = parts('PretrainedFluxTextEncoder', model_name_or_path=f'{bucket}/flux/')
        expected = parts('PretrainedFluxTextEncoder')(PROMPTS)
        assert all(torch.equal(value, expected[name]) for name, value in encoder(PROMPTS).items())
        (tree, other) = (tmp_path / 'cache' / 'downloads' / 'trees').glob('*/flux')
        assert {path.name for path in tree.iterdir()} != {path.name for path in other.iterdir()}
        assert not list((tmp_path / 'cache').rglob('transformer'))

    def test_older_name_of_the_folder(self, folders):
        vae = MODULES.build({'type': 'PretrainedVAE', 'from_pretrained': folders['flux'], 'subfolder': 'vae'})
        assert vae.encode(self.pictures()).shape == (3, 4, 4, 4)
        with pytest.raises(ValueError, match='older name'):
            MODULES.build({'type': 'PretrainedVAE', 'from_pretrained': 'a/b', 'model_name_or_path': 'a/b'})

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'subfolder': 'absent'}, PretrainedError, r"subfolder='absent' cannot be loaded"),
            ({'model_name_or_path': None}, PretrainedError, r'model_name_or_path is missing'),
            ({'model_name_or_path': 'http://h/a'}, PretrainedError, r'model_name_or_path: .*http:// cannot be listed'),
            ({'model_name_or_path': 's3://b//a'}, PretrainedError, r'expected s3://bucket/key'),
            ({'model_name_or_path': 'a/b@c', 'revision': 'd'}, PretrainedError, r"revision='d' name two revisions"),
            ({'model_name_or_path': 'nowhere'}, PretrainedError, r"model_name_or_path='nowhere' is no folder"),
            ({'max_bs': 0}, ValueError, r'max_bs=0: expected at least 1'),
            ({'torch_dtype': 'float'}, ValueError, r'torch_dtype'),
        ],
    )
    def test_errors(self, parts, options, error, message):
        if options.get('torch_dtype') == 'float':
            options = {'torch_dtype': 'floaty'}
        with pytest.raises(error, match=message):
            parts('PretrainedVAE', **options)
        with pytest.raises(ValueError, match=r"sample_mode='mean': expected one of sample, argmax"):
            parts('PretrainedVAE').encode(self.pictures(), sample_mode='mean')


def test_where_parts_are():
    assert repository('org/model') == 'org/model'
    assert repository('huggingface://org/model@v1/') == 'org/model@v1'
    assert repository('HuggingFace://org/model') == 'org/model'
    assert repository('s3://bucket/model/') == 's3://bucket/model'
    with pytest.raises(PretrainedError, match='no repository of the hub'):
        repository('huggingface://org/model/inner')
    with pytest.raises(PretrainedError, match='https:// cannot be listed'):
        repository('https://host/model')


@pytest.mark.parametrize(
    'kind',
    ['PretrainedVAE', 'PretrainedVAEQwenImage', 'PretrainedFluxTextEncoder', 'PretrainedQwenImageTextEncoder'],
)
def test_planning_reads_nothing(parts, kind, monkeypatch):
    """On the meta device a local folder gives the real parameters without memory; the hub is never asked."""
    real = {name: value.shape for name, value in parts(kind).named_parameters()}
    with torch.device('meta'):
        planned = parts(kind)
        remote = MODULES.build({'type': kind, 'model_name_or_path': 'nobody/nothing'})
    assert {name: value.shape for name, value in planned.named_parameters()} == real
    assert all(value.is_meta for value in planned.parameters())
    assert not list(remote.parameters())
