"""Files and folders of a hub, through its library, from a server on loopback."""

import pytest

from lakonlab.storage import files
from lakonlab.storage.errors import MissingFileError, StorageError
from lakonlab.storage.fetch import FetchError, fetch
from tests.web_server import REPOSITORY, content_on_hub


@pytest.mark.parametrize('revision', ['', '@v0.1'])
def test_hub_file(revision, hub, monkeypatch):
    url = f'huggingface://org/model{revision}/transformer/w.safetensors'
    assert fetch(url).read_bytes() == content_on_hub('transformer/w.safetensors')
    downloads = [request for request in hub.requests if '/resolve/' in request]
    assert downloads == [f'/org/model/resolve/{revision[1:] or "main"}/transformer/w.safetensors']
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert fetch(url).read_bytes() == content_on_hub('transformer/w.safetensors')


@pytest.mark.parametrize('name', ['transformer', 'transformer/', 'student_v0.1'])
def test_hub_folder(name, hub):
    folder = fetch(f'huggingface://org/model/{name}')
    expected = {file.rpartition('/')[2] for file in REPOSITORY if file.startswith(name.rstrip('/') + '/')}
    assert {path.name for path in folder.iterdir()} == expected
    downloads = [request for request in hub.requests if '/resolve/' in request]
    assert len(downloads) == len(expected)  # nothing beside the folder


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('model/transformer', 'expected huggingface://organisation/repository'),
        ('org/model/absent.safetensors', 'EntryNotFound.*Check the name'),
        ('org/model/absent', "org/model has no folder 'absent'"),
        ('org/other/transformer', 'RepositoryNotFound.*accept its licence'),
        ('org/other/w.safetensors', 'RepositoryNotFound.*accept its licence'),
    ],
)
def test_hub_errors_name_the_url(path, message, hub):
    with pytest.raises(FetchError, match=f'huggingface://{path}.*{message}'):
        fetch(f'huggingface://{path}')


@pytest.mark.parametrize('name', ['w.safetensors', 'transformer'])
def test_hub_without_a_network(name, hub, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(FetchError, match=rf'huggingface://org/model/{name}.*without a network, download it elsewhere'):
        fetch(f'huggingface://org/model/{name}')


def test_hub_damaged_download(hub):
    hub.is_damaged = True
    with pytest.raises(FetchError, match=r'hub/.*is damaged \(its SHA-256 is .*delete that file'):
        fetch('huggingface://org/model/w.safetensors')


def test_hub_listing(hub):
    root = 'huggingface://org/model@v0.1'
    assert files.list_names(root) == ['student_v0.1', 'transformer', 'w.safetensors']
    assert [info.name for info in files.list_files(f'{root}/student_v0.1')] == ['config.json', 'w.safetensors']
    assert [info.name for info in files.list_files(root)] == REPOSITORY
    assert files.list_names(f'{root}/absent') == []
    assert files.is_directory(root)
    assert files.is_directory(f'{root}/transformer')
    assert not files.is_directory(f'{root}/w.safetensors')
    assert files.is_file(f'{root}/transformer/w.safetensors')
    assert not files.exists(f'{root}/absent.bin')


def test_hub_reading(hub):
    path = 'huggingface://org/model/transformer/w.safetensors'
    content = content_on_hub('transformer/w.safetensors')
    assert files.read_bytes(path, 5, 20) == content[5:25]
    assert files.size_of(path) == len(content)
    with files.open_read(path) as stream:
        assert stream.read() == content


def test_a_missing_file_is_said_to_be_missing(hub):
    path = 'huggingface://org/model@v0.1/absent.safetensors'
    for read in (files.read_bytes, files.open_read, files.size_of):
        with pytest.raises(MissingFileError, match=r'absent\.safetensors'):
            read(path)
    with pytest.raises(StorageError) as caught:  # there may be such a file in a repository that is not shown
        files.read_bytes('huggingface://org/other/w.safetensors')
    assert not isinstance(caught.value, MissingFileError)
