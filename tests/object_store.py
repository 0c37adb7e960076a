"""The directory of a run in an object store, as a plain client of the server sees it."""

import hashlib
import json

import pytest

from lakonlab.storage.remote_path import as_path

BEST = 'best_loss'


@pytest.fixture
def store(s3_server, bucket):
    """The directory of a run, on every server."""
    return Store(s3_server.client(), bucket.removeprefix('s3://'))


class Store:
    """The server, seen by a plain client."""

    def __init__(self, client, bucket):
        self.client, self.bucket = client, bucket
        self.run = as_path(f's3://{bucket}/some/run')

    def keys(self):
        """What lies below the run's directory."""
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix='some/run/')
        return [entry['Key'].removeprefix('some/run/') for entry in answer.get('Contents', ())]

    def get(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=f'some/run/{key}')['Body'].read()

    def objects(self):
        """Key -> content."""
        return {key: self.get(key) for key in self.keys()}

    def put(self, key, content):
        self.client.put_object(Bucket=self.bucket, Key=f'some/run/{key}', Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.bucket, Key=f'some/run/{key}')

    def uploads(self):
        try:
            return self.client.list_multipart_uploads(Bucket=self.bucket).get('Uploads') or []
        except self.client.exceptions.NoSuchUpload:  # what rclone says when there are none
            return []

    def set(self, objects):
        """Make the run consist of these objects; the keys of others than manifests are never used again."""
        keys = set(self.keys())
        for key in keys - set(objects):
            self.delete(key)
        for key, content in objects.items():
            if key not in keys or key.endswith('manifest.json'):
                self.put(key, content)


def whole(objects):
    """Name -> checksums of the files, of each checkpoint whose files all are as its manifest says."""
    found = {}
    for key in (key for key in objects if key.endswith('/manifest.json')):
        name, manifest = key.split('/')[0], json.loads(objects[key])
        contents = {file: objects.get(f'{name}/{manifest["data"]}/{file}', b'') for file in manifest['files']}
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        if digests == {file: entry['sha256'] for file, entry in manifest['files'].items()}:
            found[name] = digests
    return found


def superfluous(objects):
    """Keys that are no manifest and that no manifest names."""
    named = {key for key in objects if key.endswith('/manifest.json')}
    for key in list(named):
        name, manifest = key.split('/')[0], json.loads(objects[key])
        named.update(f'{name}/{manifest["data"]}/{file}' for file in manifest['files'])
    return set(objects) - named
