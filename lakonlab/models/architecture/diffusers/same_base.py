"""Whether a student can use its teacher's frozen tensors: ``tie_teacher=True``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lakonlab.models.architecture.packed_head import PlainOutput
from lakonlab.models.architecture.roles import STUDENT

if TYPE_CHECKING:
    from lakonlab.models.architecture.diffusers.transformer import DiffusersTransformer

#: What teacher and student must have in common to share a base, besides its weights.
PROPERTIES_OF_BASE = (
    'torch_dtype',
    'timestep_scale',
    'positions',
    'text',
    'text_mask',
    'latents',
    'patch_size',
    'row_order',
)


def require_same_base(student: DiffusersTransformer, teacher: DiffusersTransformer) -> None:
    """Refuse a student that cannot share its teacher's base.

    Args:
        student: With its arguments, but without a transformer.
        teacher: Whose transformer it wants.

    Raises:
        ValueError: They differ in what a base has only once, the student is trained as a whole, or the teacher is no
            plain network that nobody else shares.
    """
    for name, own, other in (
        ('transformer', student.arguments, teacher.arguments),
        ('pretrained', student.pretrained or teacher.pretrained, teacher.pretrained),
        ('pretrained_lora', student.pretrained_lora or teacher.pretrained_lora, teacher.pretrained_lora),
        (
            'pretrained_lora_scale',
            student.pretrained_lora_scale or teacher.pretrained_lora_scale,
            teacher.pretrained_lora_scale,
        ),
        *((name, getattr(student, name), getattr(teacher, name)) for name in PROPERTIES_OF_BASE),
    ):
        if own != other:
            raise ValueError(
                f'tie_teacher=True, but {name} of the student is {own!r} and {other!r} of the teacher: one base '
                'cannot be both; make them the same, or set tie_teacher=False'
            )
    if not student.freeze:
        raise ValueError(
            'tie_teacher=True, but the student is not frozen, so there is nothing to share: set freeze=True and '
            'name what is trained in freeze_exclude, or set tie_teacher=False'
        )
    if not isinstance(teacher.head, PlainOutput) or teacher.role != STUDENT or teacher.backbone.switches:
        raise ValueError('tie_teacher=True needs a teacher without a policy head that no other student shares')
