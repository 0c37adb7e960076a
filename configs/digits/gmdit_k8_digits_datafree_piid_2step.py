# The two-step student without data: it learns along its own trajectories, which start from pure noise.
_base_ = ['./gmdit_k8_digits_piid_2step.py']

name = 'gmdit_k8_digits_datafree_piid_2step'

model = dict(diffusion=dict(type='PiFlowImitationDataFree'))
