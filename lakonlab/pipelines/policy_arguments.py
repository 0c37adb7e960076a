"""Arguments of a policy, checked when an adapter is loaded rather than at its first step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.models.diffusions.piflow_policies.dx import MODES

#: What a policy is given at each step.
AT_A_STEP = ('self', 'denoising_output', 'x_t_src', 'sigma_t_src')

#: Arguments with few values.
CHOICES = {'mode': MODES}


def wrong_argument(kind: str, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with arguments of a policy; None if nothing is.

    Args:
        kind: Name in :data:`~lakonlab.models.diffusions.piflow_policies.POLICY_CLASSES`.
        arguments: Further arguments of the policy.
    """
    parameters = inspect.signature(POLICY_CLASSES[kind].__init__).parameters
    known = {name: parameter.default for name, parameter in parameters.items() if name not in AT_A_STEP}
    for name, value in arguments.items():
        if name not in known:
            return f'the {kind} policy has no argument {name!r}; it has {", ".join(known)}'
        default = known[name]
        if isinstance(default, float):
            if not is_number(value) or not 0 < value < math.inf:
                return f'{name}={value!r} of the {kind} policy: expected a positive number'
        elif not isinstance(value, type(default)):
            return f'{name}={value!r} of the {kind} policy: expected {type(default).__name__}'
        elif name in CHOICES and value not in CHOICES[name]:
            return f'{name}={value!r} of the {kind} policy: expected one of {", ".join(CHOICES[name])}'
    return None


def is_close(one: float, other: float) -> bool:
    """Whether two settings are the same, however many digits of them were written down."""
    return math.isclose(one, other, rel_tol=1e-4)


def is_number(value: Any) -> bool:
    """Whether a value is a number, which True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
