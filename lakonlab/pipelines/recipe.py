"""What an adapter says about how it is to be sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

#: Entry of an adapter's safetensors metadata that holds its recipe, as JSON.
RECIPE_KEY = 'piflow_recipe'
COUNTS = ('nfe', 'total_substeps')
SWITCHES = ('flip_model_timesteps',)
SMALLEST = {'shift': 1e-6, 'num_timesteps': 1e-6}


@dataclass(frozen=True)
class Recipe:
    """Settings that a student was trained for; None where they are not known."""

    nfe: int | None = None
    """Number of segments, one network evaluation each."""
    shift: float | None = None
    """Shift of the schedule."""
    final_step_size_scale: float | None = None
    """Length of the last segment relative to the others, in schedule time."""
    total_substeps: int | None = None
    """Substeps of the policy per unit of schedule time."""
    temperature: float | None = None
    """Temperature of the policy on all but the last segment."""
    guidance_scale: float | None = None
    """Embedded guidance scale, for bases that have one."""
    num_timesteps: float | None = None
    """Time of pure noise as the network is told it; None for bases whose pipeline says it, else 1000."""
    flip_model_timesteps: bool | None = None
    """Whether the network is told the time from noise to data; None for no."""

    def known(self) -> dict[str, Any]:
        """The settings that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        """The settings that are known, as text."""
        return json.dumps(self.known())

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data; what later versions may have added is left out.

        Raises:
            ValueError: It is no recipe, or a value is not one of its setting.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f'its recipe is {values!r}, expected settings with names')
        known = {field.name for field in fields(cls)}
        settings = {name: value for name, value in values.items() if name in known and value is not None}
        for name, value in settings.items():
            if name in SWITCHES:
                if not isinstance(value, bool):
                    raise ValueError(f'{name}={value!r} of its recipe: expected true or false')
                continue
            kind, least = (int, 1) if name in COUNTS else ((int, float), SMALLEST.get(name, 0))
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
                expected = 'an integer of at least 1' if name in COUNTS else f'a number of at least {least}'
                raise ValueError(f'{name}={value!r} of its recipe: expected {expected}')
        return cls(**settings)


#: Of all published adapters, whose files carry none.
PUBLISHED = Recipe(shift=3.2, final_step_size_scale=0.5)
