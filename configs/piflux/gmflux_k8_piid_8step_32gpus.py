# Eight-step student of FLUX.1-dev with a mixture policy.
_base_ = ['./gmflux_k8_piid_4step_32gpus.py']

name = 'gmflux_k8_piid_8step_32gpus'

train_cfg = dict(nfe=8)
test_cfg = dict(nfe=8, temperature=0.7)
