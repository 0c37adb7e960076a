"""The open family of policies. A new one is a file here and a line in the table."""

from lakonlab.models.diffusions.piflow_policies.base import Policy, euler_rollout
from lakonlab.models.diffusions.piflow_policies.dx import DXPolicy
from lakonlab.models.diffusions.piflow_policies.gmflow import GMFlowPolicy
from lakonlab.models.diffusions.piflow_policies.momentum import MomentumPolicy

POLICY_CLASSES: dict[str, type[Policy]] = {
    'GMFlow': GMFlowPolicy,
    'DX': DXPolicy,
    'Momentum': MomentumPolicy,
}

__all__ = ['POLICY_CLASSES', 'DXPolicy', 'GMFlowPolicy', 'MomentumPolicy', 'Policy', 'euler_rollout']
