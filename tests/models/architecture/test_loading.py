"""Weights files: what loads, and what is refused."""

import argparse
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lakonlab.models.architecture.diffusers.dit import keep_prediction_rows, share_embedding
from lakonlab.models.architecture.loading import PretrainedError, load_strictly, read_weights
from lakonlab.registry import MODULES
from lakonlab.storage import files
from lakonlab.storage.checkpoint import write_checkpoint
from lakonlab.storage.remote_path import as_path
from tests import tiny_text_image
from tests.models.architecture.networks import ALL, STUDENTS, build, flat, inputs, randomised


def same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def saved(network, path):
    save_file(network.state_dict(), path)
    return str(path)


@pytest.fixture
def teacher():
    return randomised(build('DiTTransformer2DModelMod'))


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'nested pth', 'training pth'])
def test_own_weights(name, kind, tmp_path):
    network = randomised(build(name))
    state = network.state_dict()
    path = tmp_path / f'weights.{kind.split()[-1]}'
    if kind == 'safetensors':
        save_file(state, path)
    elif kind == 'pth':
        torch.save(state, path)
    elif kind == 'nested pth':
        torch.save({'state_dict': state, 'meta': {'iter': 3}}, path)
    else:
        student = {f'diffusion.denoising.{key}': torch.zeros_like(value) for key, value in state.items()}
        ema = {f'diffusion_ema.denoising.{key}': value for key, value in state.items()}
        torch.save({'state_dict': {**student, **ema}}, path)
    assert same(build(name, pretrained=str(path)), network)


@pytest.mark.parametrize('spelling', ['', 'iter_20', 'latest', 'latest.pth'])
@pytest.mark.parametrize('prefix', ['diffusion.denoising.', 'diffusion_ema.denoising.'])
def test_checkpoint_of_a_run(prefix, spelling, teacher, tmp_path):
    tensors = {f'{prefix}{name}': tensor for name, tensor in teacher.state_dict().items()}
    for step, factor in ((10, 0), (20, 1)):
        scaled = {name: factor * tensor for name, tensor in tensors.items()}
        write_checkpoint(tmp_path / 'run', step, {'model': scaled}, {})
    assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'run' / spelling)), teacher)


def test_loading_casts_to_the_networks_dtype(teacher, tmp_path):
    network = build(
        'DiTTransformer2DModelMod', pretrained=saved(teacher, tmp_path / 'a.safetensors'), torch_dtype='bfloat16'
    )
    assert torch.equal(network.proj_out_2.weight, teacher.proj_out_2.weight.bfloat16())


def test_saved_position_table_is_ignored(teacher, tmp_path):
    save_file({**teacher.state_dict(), 'pos_embed.pos_embed': torch.zeros(1, 16, 32)}, tmp_path / 'a.safetensors')
    assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'a.safetensors')), teacher)


class TestRefusal:
    def refuse(self, state, path, *messages, error=PretrainedError):
        save_file(state, path)
        with pytest.raises(error) as caught:
            build('DiTTransformer2DModelMod', pretrained=str(path))
        for message in ('pretrained=', str(path), *messages):
            assert message in str(caught.value)

    def test_missing_and_unexpected(self, teacher, tmp_path):
        state = teacher.state_dict()
        state['proj_out_3.bias'] = state.pop('proj_out_1.bias')
        self.refuse(
            state, tmp_path / 'a.safetensors', '1 missing', 'proj_out_1.bias', '1 unexpected', 'proj_out_3.bias'
        )

    def test_shape(self, teacher, tmp_path):
        state = randomised(build('DiTTransformer2DModelMod', num_embeds_ada_norm=7)).state_dict()
        message = 'emb.class_embedder.embedding_table.weight: (8, 32) in the file, (11, 32) in the network'
        self.refuse(state, tmp_path / 'a.safetensors', message, 'config key `pretrained`')

    def test_depth(self, teacher, tmp_path):
        state = build('DiTTransformer2DModelMod', num_layers=3).state_dict()
        self.refuse(state, tmp_path / 'a.safetensors', 'unexpected', 'transformer_blocks.2.attn1.to_q.weight')

    def test_student_from_a_student_of_another_size(self, tmp_path):
        path = saved(build('GMDiTTransformer2DModelV2', num_gaussians=4), tmp_path / 'a.safetensors')
        with pytest.raises(PretrainedError, match=r'proj_out_means.weight: \(64, 32\) in the file, \(48, 32\)'):
            build('GMDiTTransformer2DModelV2', pretrained=path)

    def test_incomplete_head(self, tmp_path):
        state = build('GMDiTTransformer2DModelV2').state_dict()
        del state['proj_out_logweights.bias']
        save_file(state, tmp_path / 'a.safetensors')
        with pytest.raises(PretrainedError, match=r'proj_out_logweights\.bias'):
            build('GMDiTTransformer2DModelV2', pretrained=str(tmp_path / 'a.safetensors'))

    @pytest.mark.parametrize('meta', [False, True])
    def test_missing_file(self, meta, tmp_path):
        device = torch.device('meta' if meta else 'cpu')
        with pytest.raises(FileNotFoundError, match=r'pretrained=.*nowhere.* does not exist'), device:
            build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'nowhere.pth'))

    def test_kind_of_file(self, tmp_path):
        (tmp_path / 'a.npz').write_bytes(b'x')
        with pytest.raises(PretrainedError, match=r"suffix '.npz'; expected one of .safetensors"):
            build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'a.npz'))

    @pytest.mark.parametrize('name', ['a.safetensors', 'a.pth'])
    def test_damaged_file(self, name, tmp_path):
        (tmp_path / name).write_bytes(b'not weights at all')
        with pytest.raises(PretrainedError, match=name):
            build('DiTTransformer2DModelMod', pretrained=str(tmp_path / name))

    def test_pickled_objects(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return print, ('executed',)

        torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': Harmful()}, tmp_path / 'a.pth')
        with pytest.raises(PretrainedError, match='files that hold other Python objects are refused'):
            read_weights(str(tmp_path / 'a.pth'))

    def test_file_without_tensors(self, tmp_path):
        torch.save({'epoch': 3}, tmp_path / 'a.pth')
        with pytest.raises(PretrainedError, match=r"holds no tensors; its keys are \['epoch'\]"):
            read_weights(str(tmp_path / 'a.pth'))

    def test_damaged_checkpoint(self, teacher, tmp_path):
        found = write_checkpoint(tmp_path / 'run', 5, {'model': teacher.state_dict()}, {})
        (found / 'manifest.json').unlink()
        with pytest.raises(PretrainedError, match='pretrained='):
            build('DiTTransformer2DModelMod', pretrained=str(found))

    def test_remote_path(self):
        with pytest.raises(
            PretrainedError, match=r'ftp:// cannot be read; expected one of local paths, s3://, huggingface://'
        ):
            build('DiTTransformer2DModelMod', pretrained='ftp://host/weights.pth')


def test_meta_network_only_locates_the_file(tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'not read')
    with torch.device('meta'):
        build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'a.safetensors'))


class TestStudentFromTeacher:
    @pytest.mark.parametrize('name', STUDENTS)
    def test_predicts_what_the_teacher_predicts(self, name, teacher, tmp_path):
        student = build(name, pretrained=saved(teacher, tmp_path / 'a.safetensors'))
        expected, found = teacher(*inputs()), student(*inputs())
        if name == 'DXDiTTransformer2DModel':
            assert torch.allclose(found, expected[:, None].expand_as(found), atol=1e-6)
            return
        # the means differ from the teacher by one constant per component and channel
        offset = found['means'] - expected[:, None]
        constant = offset[:1, :, :, :1, :1]
        assert torch.allclose(offset, constant.expand_as(offset), atol=1e-5)
        assert 0 < constant.abs().max() < 0.3
        assert torch.allclose(found['logweights'].exp(), torch.tensor(1 / 3))
        assert torch.allclose(found['logstds'].exp(), torch.tensor(0.05))

    def test_without_noise_the_velocity_at_the_source_point_is_the_teachers(self, teacher, tmp_path, monkeypatch):
        from lakonlab.models.architecture import heads
        from lakonlab.models.diffusions.piflow_policies import GMFlowPolicy

        monkeypatch.setattr(heads, 'TEACHER_BIAS_NOISE', 0.0)
        student = build('GMDiTTransformer2DModelV2', pretrained=saved(teacher, tmp_path / 'a.safetensors'))
        images, times, labels = inputs()
        sigma = times.view(-1, 1, 1, 1)
        policy = GMFlowPolicy(student(images, times, labels), images, sigma)
        expected = teacher(images, times, labels)
        assert torch.allclose(policy.pi(images, sigma), expected, atol=1e-5)

    def test_polynomial_starts_as_a_constant(self, teacher, tmp_path):
        path = saved(teacher, tmp_path / 'a.safetensors')
        found = build('DXDiTTransformer2DModel', n_grid=None, p_order=4, pretrained=path)(*inputs())
        assert found.shape[1] == 4
        assert torch.allclose(found[:, 0], teacher(*inputs()), atol=1e-6)
        assert not found[:, 1:].any()

    def test_only_the_noise_is_random(self, teacher, tmp_path):
        path = saved(teacher, tmp_path / 'a.safetensors')
        students = []
        for _ in range(2):
            torch.manual_seed(5)
            students.append(build('GMDiTTransformer2DModelV2', pretrained=path))
        assert same(*students)


class TestOriginalDiT:
    """Files of the original DiT: an embedding per block, and a variance beside the prediction."""

    def original(self, teacher):
        state = {}
        for name, tensor in teacher.state_dict().items():
            if name.startswith('emb.'):
                for block in range(2):
                    state[f'transformer_blocks.{block}.norm1.{name}'] = tensor + block
            elif name.startswith('proj_out_2.'):
                rows = tensor.reshape(4, 4, *tensor.shape[1:])
                state[name] = torch.cat([rows, torch.full_like(rows, 9.0)], dim=1).flatten(0, 1)
            else:
                state[name] = tensor
        return state

    def test_teacher(self, teacher, tmp_path):
        save_file(self.original(teacher), tmp_path / 'a.safetensors')
        assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'a.safetensors')), teacher)

    @pytest.mark.parametrize('points', [2, 3])  # with 2 points the rows alone would not tell variance from points
    def test_student(self, points, teacher, tmp_path):
        save_file(self.original(teacher), tmp_path / 'a.safetensors')
        student = build('DXDiTTransformer2DModel', n_grid=points, pretrained=str(tmp_path / 'a.safetensors'))
        expected = teacher(*inputs())
        assert torch.allclose(student(*inputs()), expected[:, None].expand(-1, points, -1, -1, -1), atol=1e-6)

    def test_functions_leave_other_files_alone(self, teacher):
        state = teacher.state_dict()
        for remapped in (share_embedding(state), keep_prediction_rows(state, 2, 4)):
            assert remapped is not state
            assert remapped.keys() == state.keys()
            assert all(remapped[key] is state[key] for key in state)

    def test_mixture_of_one_component_becomes_a_teacher(self, tmp_path):
        mixture = randomised(build('GMDiTTransformer2DModel', num_gaussians=1, constant_logstd=-1.0))
        teacher = build('DiTTransformer2DModelMod', pretrained=saved(mixture, tmp_path / 'a.safetensors'))
        assert torch.allclose(flat(teacher(*inputs())), flat(mixture(*inputs())['means']), atol=1e-6)
        assert same(
            build(
                'GMDiTTransformer2DModel',
                num_gaussians=1,
                constant_logstd=-1.0,
                pretrained=str(tmp_path / 'a.safetensors'),
            ),
            mixture,
        )


class TestShards:
    """Sharded files, local and from a server, and folders of other libraries."""

    @pytest.fixture
    def folder(self, teacher, tmp_path):
        state, folder = teacher.state_dict(), tmp_path / 'model'
        folder.mkdir()
        names = sorted(state)
        shards = {'a-1.safetensors': names[::2], 'a-2.safetensors': names[1::2]}
        for file, own in shards.items():
            save_file({name: state[name] for name in own}, folder / file)
        index = {'weight_map': {name: file for file, own in shards.items() for name in own}}
        (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps(index))
        return folder

    @pytest.mark.parametrize('name', ['', 'diffusion_pytorch_model.safetensors.index.json'])
    def test_local(self, name, folder, teacher):
        assert same(build('DiTTransformer2DModelMod', pretrained=str(folder / name)), teacher)

    @pytest.fixture
    def url(self, folder, monkeypatch, tmp_path):
        monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
        handler = functools.partial(QuietHandler, directory=str(folder))
        server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize('prefix', ['', 'tmp:'])
    @pytest.mark.parametrize('query', ['', '?download=true'])
    def test_server(self, prefix, query, url, teacher, tmp_path):
        url = f'{prefix}{url}/diffusion_pytorch_model.safetensors.index.json{query}'
        with torch.device('meta'):
            build('DiTTransformer2DModelMod', pretrained=url)
        assert not (tmp_path / 'cache').exists()
        assert same(build('DiTTransformer2DModelMod', pretrained=url), teacher)

    @pytest.fixture
    def place(self, folder, bucket, monkeypatch, tmp_path):
        """The same files on S3, beside others that nobody asked for."""
        monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
        files.upload(folder, f'{bucket}/model')
        files.write_text(f'{bucket}/model/unrelated.bin', 'x')
        return f'{bucket}/model'

    @pytest.mark.parametrize('name', ['', '/', '/diffusion_pytorch_model.safetensors.index.json'])
    def test_s3(self, name, place, teacher, tmp_path):
        with torch.device('meta'):
            build('DiTTransformer2DModelMod', pretrained=place + name)
        assert not (tmp_path / 'cache').exists()
        assert same(build('DiTTransformer2DModelMod', pretrained=place + name), teacher)
        assert not [path for path in (tmp_path / 'cache').rglob('*') if path.name == 'unrelated.bin']

    def test_s3_checkpoint_of_a_run(self, place, teacher):
        run = as_path(place) / 'run'
        write_checkpoint(
            run, 5, {'model': {f'diffusion.denoising.{k}': v for k, v in teacher.state_dict().items()}}, {}
        )
        for spelling in (str(run), f'{run}/latest.pth', f'{run}/iter_5', f'{run}/iter_5.pth'):
            assert same(build('DiTTransformer2DModelMod', pretrained=spelling), teacher)

    def test_s3_without_weights(self, place):
        files.write_text(f'{place}/empty/readme.txt', 'x')
        with pytest.raises(PretrainedError, match=r"pretrained='s3://.*/empty' is a folder without.*found readme\.txt"):
            read_weights(f'{place}/empty')
        with pytest.raises(FileNotFoundError, match=r"pretrained='s3://.*/absent' does not exist"):
            read_weights(f'{place}/absent')

    def test_damaged_download(self, folder, url):
        (folder / 'a-2.safetensors').write_bytes(b'<html>')
        with pytest.raises(PretrainedError, match=r"pretrained='http://.*cache.*a-2\.safetensors' is not a.*delete"):
            read_weights(f'{url}/diffusion_pytorch_model.safetensors.index.json')

    def test_shard_that_the_server_lacks(self, folder, url):
        (folder / 'a-2.safetensors').unlink()
        with pytest.raises(PretrainedError, match=r'pretrained_adapter=.*http://.*/a-2\.safetensors.*does not exist'):
            read_weights(f'{url}/diffusion_pytorch_model.safetensors.index.json', 'pretrained_adapter')

    def test_missing_shard(self, folder):
        (folder / 'a-2.safetensors').unlink()
        with pytest.raises(PretrainedError, match=r'index\.json.* lists a-2\.safetensors, which is not beside it'):
            build('DiTTransformer2DModelMod', pretrained=str(folder))

    def test_shard_of_another_model(self, folder):
        save_file({'x': torch.zeros(1)}, folder / 'a-2.safetensors')
        with pytest.raises(PretrainedError, match=r'says that a-2\.safetensors holds .* and \d+ more tensors'):
            build('DiTTransformer2DModelMod', pretrained=str(folder))

    def test_index_that_leads_elsewhere(self, folder):
        text = json.dumps({'weight_map': {'x': '../../secret.safetensors'}})
        (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(text)
        with pytest.raises(PretrainedError, match='is not in its folder'):
            read_weights(str(folder))

    def test_pickled_shards(self, teacher, tmp_path):
        state = teacher.state_dict()
        for file, names in (('a.bin', list(state)[:9]), ('b.bin', list(state)[9:])):
            torch.save({name: state[name] for name in names}, tmp_path / file)
        index = {name: 'a.bin' if place < 9 else 'b.bin' for place, name in enumerate(state)}
        (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': index}))
        assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path)), teacher)

    def test_folder_of_a_whole_pipeline(self, folder):
        with pytest.raises(PretrainedError, match='is a folder without weights; its subfolders model hold some'):
            read_weights(str(folder.parent))

    def test_folder_of_something_else(self, tmp_path):
        (tmp_path / 'readme.txt').touch()
        with pytest.raises(PretrainedError, match=r'without weights: expected .*safetensors.*found readme\.txt'):
            read_weights(str(tmp_path))

    @pytest.mark.parametrize('text', ['{', '[]', '{"weight_map": 3}'])
    def test_damaged_index(self, folder, text):
        (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(text)
        with pytest.raises(PretrainedError, match='is no index of sharded weights'):
            build('DiTTransformer2DModelMod', pretrained=str(folder))

    def test_folder_prefers_safetensors(self, teacher, tmp_path):
        save_file(teacher.state_dict(), tmp_path / 'diffusion_pytorch_model.safetensors')
        (tmp_path / 'diffusion_pytorch_model.bin').write_bytes(b'never read')
        assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path)), teacher)

    def test_published_checkpoint_with_its_command_line(self, teacher, tmp_path):
        torch.save({'ema': teacher.state_dict(), 'args': argparse.Namespace(lr=1.0)}, tmp_path / 'a.pt')
        assert same(build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'a.pt')), teacher)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, *args):
        """Keep the log of the tests readable."""


def test_nothing_is_left_without_values(tmp_path):
    """What a transformer computes itself is there after loading; what a file lacks is named."""
    weights = tiny_text_image.teacher_file('QwenImage', tmp_path)
    build_teacher = functools.partial(
        MODULES.build,
        {'type': 'QwenImageTransformer2DModel', 'pretrained': weights, **tiny_text_image.SIZES['QwenImage']},
    )
    network = build_teacher()
    assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    state = read_weights(weights)
    removed = [name for name in state if name.startswith('transformer_blocks.1.img_mlp')]
    save_file({name: value for name, value in state.items() if name not in removed}, weights)
    with pytest.raises(PretrainedError, match=rf'{len(removed)} missing:\n\s+transformer_blocks\.1\.img_mlp'):
        build_teacher()


class TestStrictly:
    """The last step, on modules of torch."""

    def module(self, device='cpu'):
        module = nn.Linear(2, 3, device=device)
        module.register_buffer('table', torch.ones(2, device=device))
        return module

    def test_report_names_everything_and_changes_nothing(self):
        module = self.module()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        state = {'weight': torch.zeros(3, 4), 'table': torch.zeros(2), 'scale': torch.zeros(1)}
        with pytest.raises(PretrainedError) as caught:
            load_strictly(module, state, 'x', key='pretrained_vae')
        for part in ("pretrained_vae='x' does not fit Linear", '1 missing:\n    bias\n', '1 unexpected:\n    scale\n'):
            assert part in str(caught.value)
        assert 'weight: (3, 4) in the file, (3, 2) in the network' in str(caught.value)
        assert 'config key `pretrained_vae`' in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())

    def test_patterns(self):
        module = self.module()
        state = {'weight': torch.zeros(3, 2), 'old.a': torch.zeros(1), 'old.b': torch.zeros(1)}
        load_strictly(module, state, 'x', ignored=['old.*'], allowed_missing=['bia?', 'table'])
        assert not module.weight.any()
        with pytest.raises(PretrainedError, match=r'2 unexpected:\n    old\.a\n    old\.b'):
            load_strictly(module, state, 'x', ignored=['older.*'], allowed_missing=['bia?', 'table'])

    def test_assigned_tensors_are_those_of_the_file(self):
        module, state = (
            self.module('meta'),
            {'weight': torch.zeros(3, 2), 'bias': torch.zeros(3), 'table': torch.ones(2)},
        )
        module.bias.requires_grad_(False)
        load_strictly(module, state, 'x', assign=True)
        assert module.weight.data_ptr() == state['weight'].data_ptr()
        assert module.weight.requires_grad
        assert not module.bias.requires_grad

    @pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')
    @pytest.mark.parametrize('assign', [True, False])
    def test_what_stays_without_memory_is_named(self, assign):
        module = nn.Sequential(self.module('meta'), nn.Linear(2, 2))
        module[0].register_buffer('temporary', torch.ones(1, device='meta'), persistent=False)
        state = {f'0.{name}': torch.zeros(tensor.shape) for name, tensor in self.module().state_dict().items()}
        state |= {f'1.{name}': tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}
        with pytest.raises(PretrainedError, match=r"pretrained='x' leaves .* without values: .*0\.temporary"):
            load_strictly(module, state, 'x', assign=assign)
