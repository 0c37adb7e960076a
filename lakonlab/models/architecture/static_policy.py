"""A network that looks at nothing: its parameters are the policies themselves.

It is the smallest student there is. Trained by imitation from one noise, it shows whether a single policy can follow a
whole trajectory of the teacher, whatever a network could make of the noise and the condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.heads import INITIAL_STD
from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.registry import MODULES


@MODULES.register_module()
class StaticPolicyNetwork(nn.Module):
    """One policy per row of the batch, or one for all rows, as plain parameters in float32.

    They are zeros until :meth:`start_from` gives them a velocity.

    Args:
        policy_type: Name in :data:`~lakonlab.models.diffusions.piflow_policies.POLICY_CLASSES`.
        state_shape: Shape (P, C, *) of the states that the P policies are for.
        num_components: Components K of a mixture, or values N of ``x_0`` of a DX policy.

    Raises:
        ValueError: The policy is unknown, or there is no component.
    """

    dtype = torch.float32

    def __init__(self, policy_type: str, state_shape: Sequence[int], num_components: int):
        super().__init__()
        if policy_type not in POLICY_CLASSES:
            raise ValueError(f'policy_type={policy_type!r}: expected one of {", ".join(POLICY_CLASSES)}')
        if num_components < 1:
            raise ValueError(f'num_components={num_components}: expected at least 1')
        shapes = POLICY_CLASSES[policy_type].output_shapes(tuple(state_shape), num_components)
        self.has_names = isinstance(shapes, dict)
        self.state_shape = tuple(state_shape)
        self.values = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(shape))
                for name, shape in (shapes if self.has_names else {'output': shapes}).items()
            }
        )

    @torch.no_grad()
    def start_from(self, velocity: Tensor, spread: float = 0.0, source: RandomSource | None = None) -> None:
        """Let every component begin at a velocity, with equal weights and the standard deviation of a new head.

        Args:
            velocity: (P, C, *), for instance the teacher's at the noise.
            spread: Standard deviation of the components around it; those of a mixture must differ to be told apart.
            source: Source of the draw ``spread``.
        """
        source = source or TorchSource()
        for name, value in self.values.items():
            if value.shape[2:] == velocity.shape[1:]:
                value.copy_(velocity.unsqueeze(1).expand_as(value))
                if spread > 0:
                    value.add_(spread * source.normal('spread', value.shape, value.dtype, value.device))
            else:
                nn.init.constant_(value, math.log(INITIAL_STD) if name == 'logstds' else 0.0)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions) -> dict[str, Tensor] | Tensor:
        """The policies, whatever they are given.

        Args:
            hidden_states: (B, C, *); B is the number of policies, or anything if there is one policy.
            timestep: (B,).
            **conditions: Ignored.

        Returns:
            What a policy of this type is made from, with B rows.

        Raises:
            ValueError: The states have another shape than the policies are for.
        """
        rows, policies = len(hidden_states), self.state_shape[0]
        if hidden_states.shape[1:] != self.state_shape[1:] or policies not in (1, rows):
            raise ValueError(
                f'states of shape {tuple(hidden_states.shape)}, but the {policies} static policies are for '
                f'{self.state_shape}'
            )
        values = {name: value.expand(rows, *value.shape[1:]) for name, value in self.values.items()}
        return values if self.has_names else values['output']
