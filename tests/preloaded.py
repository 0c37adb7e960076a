"""What the fork server imports once, so that the processes it starts need not; a module that fails is left out."""

import contextlib
import gc
import importlib

MODULES = (
    'pytest',
    'torch',
    'torch.distributed',
    'torch.distributed.checkpoint',
    'torch.distributed.checkpoint.state_dict',
    'torch.distributed.fsdp',
    'torch.distributed.tensor',
    'torch.utils.checkpoint',
    'safetensors.torch',
    'mmengine',
    'peft',
    'diffusers.loaders',
    'diffusers.models.transformers.transformer_flux',
    'diffusers.models.transformers.transformer_qwenimage',
    'lakonlab.config.load',
    'lakonlab.models',
    'lakonlab.runner.runner',
    'lakonlab.storage.checkpoint',
    'tests.processes',
)

for module in MODULES:
    # A process that needs a broken module reports the error itself; the server has to live for the others.
    with contextlib.suppress(Exception):
        importlib.import_module(module)
# Objects that are never collected are not written to either, so their memory stays shared among the processes.
gc.collect()
gc.freeze()
