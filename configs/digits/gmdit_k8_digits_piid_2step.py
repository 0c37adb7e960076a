# The same student with two network evaluations per sample.
_base_ = ['./gmdit_k8_digits_piid_1step.py']

name = 'gmdit_k8_digits_piid_2step'

train_cfg = dict(nfe=2)
test_cfg = dict(nfe=2)
