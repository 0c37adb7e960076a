"""What contradicts an adapter in how it is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lakonlab.pipelines.recipe import PUBLISHED, Recipe
from lakonlab.pipelines.student import Student

TOLERANCE = 1e-6


def contradictions(
    student: Student, config: Mapping[str, Any], num_steps: int, asked: Mapping[str, float | None]
) -> Iterator[str]:
    """Say what a scheduler and a call have otherwise than the adapter, one sentence each.

    Args:
        student: With its policy and its recipe; where the adapter has none, that of the published ones counts, whose
            policies say their shift themselves.
        config: Of the :class:`~lakonlab.models.diffusions.schedulers.flow_map_sde.FlowMapSDEScheduler`.
        num_steps: Network evaluations.
        asked: Arguments of the call that are settings of a recipe; None for those that were not given.
    """
    policy, is_dx = student.policy_kwargs, student.policy_type == 'DX'
    shift = 'dynamic' if config['use_dynamic_shifting'] else config['shift']
    trained = f'{student.where!r} was trained for'
    recipe, what = student.recipe, trained
    if recipe is None:
        recipe = PUBLISHED if student.layout == 'tokens' else Recipe()
        what = f'{student.where!r} carries no recipe; published adapters were trained for'
    policy_shift = policy.get('shift', 1.0) if is_dx else None
    from_recipe = None if is_dx and student.recipe is None else recipe.shift
    if from_recipe is not None and not _same(shift, from_recipe):
        yield f'{what} shift={from_recipe}, but the scheduler has {shift}'
    if policy_shift is not None and policy_shift != from_recipe and not _same(shift, policy_shift):
        yield f'the policy of {student.where!r} has shift={policy_shift}, but the scheduler has {shift}'
    last = config['final_step_size_scale']
    if recipe.final_step_size_scale is not None and not _same(last, recipe.final_step_size_scale):
        yield f'{what} final_step_size_scale={recipe.final_step_size_scale}, but it is sampled with {last}'
    if recipe.nfe is not None and num_steps < recipe.nfe:
        yield f'{what} {recipe.nfe} steps, but num_inference_steps={num_steps}'
    for name, value in asked.items():
        own = getattr(recipe, name)
        if name == 'temperature' and num_steps != recipe.nfe:
            continue  # the recipe's is for its own number of steps
        if None not in (own, value) and not _same(value, own):
            yield f'{what} {name}={own}, but it is called with {value}'
    if is_dx and policy.get('mode', 'grid') == 'grid':
        longest = 1 / (num_steps - 1 + last) if num_steps > 1 else 1.0
        segment = policy.get('segment_size', 1.0)
        if longest > segment + TOLERANCE:
            yield (
                f'{trained} segments of {segment:.4g} in schedule time, but {num_steps} steps have {longest:.4g}: '
                'take more'
            )


def _same(one: float | str, other: float) -> bool:
    return not isinstance(one, str) and abs(one - other) <= TOLERANCE
