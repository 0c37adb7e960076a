"""The Triton kernels against the torch backend.

Triton's interpreter runs them without a GPU. It has to be chosen before triton is imported, so this file, run as a
program, computes all cases in a process of its own and saves them. On a GPU, tests/cuda runs them.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lakonlab.ops.mixture_rollout import mixture_rollout, substep_coefficients, triton_backend

pytest.importorskip('triton')

CASES = {  # batch, components, channels, pixels, substeps of each sample
    'padding-ragged': (3, 5, 3, (5, 7), (4, 1, 3)),
    'padding-more-channels': (2, 3, 6, (3, 12), (2, 3)),
    'one-component': (2, 1, 3, (2, 3), (3, 3)),
    'one-channel': (2, 4, 1, (5,), (1, 3)),
    'one-of-each': (1, 1, 1, (1,), (2,)),
    'one-substep': (2, 3, 2, (5,), (1, 1)),
    'no-substep': (2, 2, 2, (3,), (0, 2)),
    'dropped-components': (2, 4, 2, (9,), (3, 2)),
    'shared-axis-of-components': (1, 32, 4, (5, 5), (3,)),
    'shared-axis-of-channels': (1, 8, 16, (5, 5), (3,)),
}
SINGLE = ['padding-ragged', 'dropped-components', 'shared-axis-of-components', 'shared-axis-of-channels']
NAMES = ['offset', 'd_means', 'd_logweights', 'd_x_src', 'd_offset', 'd_coefficients']


def rollout_and_gradients(name: str, backend: str, dtype: torch.dtype, device: str = 'cpu') -> dict[str, torch.Tensor]:
    batch, components, channels, shape, lengths = CASES[name]
    generator = torch.Generator().manual_seed(list(CASES).index(name))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    means, x_src = normal(batch, components, channels, *shape), normal(batch, channels, *shape)
    logweights = normal(batch, components, 1, *shape)
    if name == 'dropped-components':
        logweights[0, [0, 2]] = -torch.inf
        logweights[1, 3] = -torch.inf
    offset, cotangent = 0.1 * normal(batch, channels, *shape), normal(batch, channels, *shape)
    sigma_src = torch.linspace(1.0, 0.6, batch, dtype=torch.float64)
    sigmas = sigma_src[:, None] * torch.linspace(1, 0.05, max(lengths) + 1, dtype=torch.float64)
    variance = torch.linspace(0.02, 0.1, batch, dtype=torch.float64)
    coefficients = substep_coefficients(sigmas, sigma_src, variance, eps=1e-6)
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (means, logweights, x_src, offset, coefficients)]
    result = mixture_rollout(*inputs, torch.tensor(lengths), backend)
    gradients = torch.autograd.grad(result, inputs, cotangent.to(device, dtype))
    return dict(zip(NAMES, [tensor.detach().cpu() for tensor in (result, *gradients)]))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.fixture(scope='module')
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp('triton') / 'results.safetensors'
    root = str(Path(triton_backend.__file__).parents[3])
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': root, 'OMP_NUM_THREADS': '1'}
    process = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return load_file(path)


def assert_double_precision(results, name):
    for key, expected in rollout_and_gradients(name, 'torch', torch.float64).items():
        assert relative_error(results[key], expected) < (1e-12 if key == 'offset' else 1e-11), key


def assert_as_precise_as_torch(results, name):
    exact = rollout_and_gradients(name, 'torch', torch.float64)
    plain = rollout_and_gradients(name, 'torch', torch.float32)
    for key in NAMES[:-1]:
        errors = [(values[key] - exact[key]).square().mean().sqrt().item() for values in (results, plain)]
        assert errors[0] <= 2 * errors[1], key
    # A few sums over all pixels: whichever backend has the smaller error there is chance.
    assert relative_error(results['d_coefficients'], exact['d_coefficients']) < 2e-5


@pytest.mark.parametrize('name', CASES)
def test_rollout_and_gradients_in_double_precision(interpreted, name):
    assert_double_precision({key: interpreted[f'{name}.float64.{key}'] for key in NAMES}, name)


@pytest.mark.parametrize('name', SINGLE)
def test_single_precision_is_as_precise_as_torch(interpreted, name):
    assert_as_precise_as_torch({key: interpreted[f'{name}.float32.{key}'] for key in NAMES}, name)


@pytest.mark.parametrize(('components', 'channels'), [(32, 4), (8, 16), (8, 64)])
@pytest.mark.parametrize('kernel', ['forward_kernel', 'backward_kernel'])
def test_compiles_for_a_gpu_without_spilling_registers(kernel, components, channels, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lakonlab.ops.mixture_rollout import triton_kernels

    try:
        inspect = triton.knobs.nvidia.cuobjdump.path
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f'NVIDIA tools are missing: {error}')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    function = getattr(triton_kernels, kernel)
    constants, warps = triton_backend.program_shape(components, channels, num_pixels=4096, element_size=4)
    signature = {
        name: 'constexpr' if name in constants else 'i32' if name.startswith('num_') else '*fp32'
        for name in function.arg_names
    }
    source = ASTSource(function, signature | {'lengths': '*i32'}, constants)
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': warps})

    assert 'tf32' not in compiled.asm['ptx']
    binary = tmp_path / 'kernel.cubin'
    binary.write_bytes(compiled.asm['cubin'])
    usage = subprocess.run([inspect, '-res-usage', str(binary)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r'STACK:(\d+)', usage) == ['0'], usage


def test_other_devices_are_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"rollout_backend='triton'.*cpu.*for GPUs.*use 'auto'"):
        rollout_and_gradients('one-of-each', 'triton', torch.float64)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert 'pip install triton' in triton_backend.unavailable(torch.device('cuda'))


def test_an_old_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    monkeypatch.setattr(torch.version, 'hip', None)
    assert '7.5' in triton_backend.unavailable(torch.device('cuda'))


def test_a_failure_to_start_is_a_reason(monkeypatch, caplog):
    from triton.runtime import driver

    class NoCompiler:
        def get_current_target(self):
            raise RuntimeError('Failed to find C compiler')

    fresh = functools.cache(triton_backend._driver_failure.__wrapped__)
    monkeypatch.setattr(triton_backend, '_driver_failure', fresh)
    monkeypatch.setattr(driver, '_active', NoCompiler())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    reasons = [triton_backend.unavailable(torch.device('cuda')) for _ in range(2)]
    assert reasons == ['Failed to find C compiler'] * 2
    assert caplog.text.count('Failed to find C compiler') == 1


def main(path: str) -> None:
    jobs = [(name, torch.float64) for name in CASES] + [(name, torch.float32) for name in SINGLE]
    save_file(
        {
            f'{name}.{str(dtype).removeprefix("torch.")}.{key}': tensor.contiguous()
            for name, dtype in jobs
            for key, tensor in rollout_and_gradients(name, 'triton', dtype).items()
        },
        path,
    )


if __name__ == '__main__':
    main(sys.argv[1])
