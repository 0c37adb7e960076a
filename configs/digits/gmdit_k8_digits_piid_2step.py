# The same student with two network evaluations per sample.
_base_ = ['./gmdit_k8_digits_piid_1step.py']

name = 'gmdit_k8_digits_piid_2step'

train_cfg = dict(nfe=2, window_substeps=4)  # a short window of averaged velocity quiets the loss near low noise
test_cfg = dict(nfe=2)
