# Sampling of a published student. A config adds its policy and its adapter.
_base_ = ['./_student.py', './_text_encoder.py', './_benchmarks.py']

adapters = 'huggingface://Lakonik/pi-FLUX.1'
model = dict(diffusion=dict(type='PiFlowImitation'), inference_only=True)
