"""A web page on which a teacher and its students draw the same digit from the same noise."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lakonlab.ui.text_to_image_app import BLOCKS, add_server_arguments, missing_gradio, serve

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'digits'
STUDENTS = {
    'gmdit_k8_digits_piid_1step': 'one step, GMFlow policy',
    'gmdit_k8_digits_piid_2step': 'two steps, GMFlow policy',
    'dxdit_n10_digits_piid_1step': 'one step, DX policy',
    'gmdit_k8_digits_datafree_piid_2step': 'two steps, trained without data',
}
NUM_CLASSES, SIZE = 10, (1, 8, 8)
MAX_STEPS = 32
SCALE = 32
#: Smallest width of a column, in pixels: two fit on a phone.
NARROW = 140


@dataclass(frozen=True)
class Drawing:
    """One sample."""

    pixels: torch.Tensor
    """(8, 8), in [0, 1]."""
    nfe: int
    """Network evaluations; a guided teacher's, with and without the class in one batch, count as one."""
    seconds: float
    """That it took."""

    @property
    def picture(self):
        """Magnified, as a PIL image."""
        from PIL import Image

        values = (self.pixels * 255).round().to(torch.uint8).numpy()
        return Image.fromarray(values).resize((values.shape[1] * SCALE, values.shape[0] * SCALE), Image.NEAREST)

    @property
    def caption(self) -> str:
        """How much work it was."""
        return f'NFE {self.nfe}, {self.seconds * 1000:.1f} ms'


class DigitModels:
    """The students that were trained, and their teacher.

    Args:
        checkpoints: Directory with a directory per run.

    Raises:
        FileNotFoundError: There is no student.
    """

    def __init__(self, checkpoints: Path):
        self.models: dict[str, nn.Module] = {}
        for config, name in STUDENTS.items():
            if (checkpoints / config).is_dir():
                self.models[name] = load_student(config, checkpoints)
        for name in self.models:  # the first of each takes longer
            for teacher in (True, False):
                self.draw(name, 0, 0, 1, teacher)
        if not self.models:
            raise FileNotFoundError(f'{checkpoints} holds no student of digits: train them with `make demo`')

    @property
    def names(self) -> list[str]:
        """Of the students."""
        return list(self.models)

    def own_steps(self, name: str) -> int:
        """For how many steps a student was trained."""
        return self.models[name].diffusion.num_function_evaluations()

    def draw(self, name: str, digit: int, seed: int, steps: int, teacher: bool) -> Drawing:
        """Draw a digit.

        Args:
            name: A student.
            digit: 0 to 9.
            seed: Of the noise.
            steps: Network evaluations of the student, or solver steps of the teacher.
            teacher: Draw with the student's teacher instead.
        """
        from lakonlab.datasets.noise import seeded_noise

        data = {
            'noise': seeded_noise(seed, SIZE)[None],
            'labels': torch.tensor([digit]),
            'negative_labels': torch.tensor([NUM_CLASSES]),
        }
        override = {'num_timesteps': steps} if teacher else {'nfe': steps}
        start = time.perf_counter()
        result = self.models[name].val_step(data, role='teacher' if teacher else 'ema', test_cfg_override=override)
        seconds = time.perf_counter() - start
        return Drawing(result['pred_imgs'][0, 0].cpu(), int(result['nfe']), seconds)


def load_student(config: str, checkpoints: Path) -> nn.Module:
    """A student with its teacher, from the checkpoints of ``make demo``.

    Args:
        config: Name of a config of digits.
        checkpoints: Directory with a directory per run.
    """
    from lakonlab.config.load import load_config
    from lakonlab.registry import MODELS, STRATEGIES
    from lakonlab.runner.sections import saves_trainable_only
    from lakonlab.storage.checkpoint import require_checkpoint

    weights = str(checkpoints / 'dit_digits_teacher' / 'latest')
    options = {f'model.{role}.denoising.pretrained': weights for role in ('teacher', 'diffusion')}
    cfg = load_config(CONFIGS / f'{config}.py', options)
    strategy = STRATEGIES.build({'type': 'single', 'trainable_only': saves_trainable_only(cfg)})
    model = strategy.wrap(MODELS.build({**cfg.model, 'train_cfg': cfg.train_cfg, 'test_cfg': cfg.test_cfg}))
    strategy.load_model_state(model, require_checkpoint(checkpoints / config))
    return model.eval()


def digits_app(models: DigitModels):
    """Build the page: a ``gradio.Blocks``, to be launched."""
    import gradio as gr

    def draw(name: str, digit: str, seed: float | None, teacher_steps: int, student_steps: int):
        if seed is None:
            raise gr.Error('The seed is empty: enter a number.', title='Seed')
        drawings = [
            models.draw(name, int(digit), int(seed), int(steps), teacher)
            for teacher, steps in ((True, teacher_steps), (False, student_steps))
        ]
        return tuple(value for drawing in drawings for value in (drawing.picture, drawing.caption))

    first = models.names[0]
    with gr.Blocks(title='pi-Flow: digits', **BLOCKS) as app:
        gr.Markdown(
            '# Teacher and student, from the same noise\n'
            'The teacher follows its own velocity for as many steps as you let it. The student answers once, or a few '
            'times, with a policy that is followed without the network.'
        )
        digit = gr.Radio([str(digit) for digit in range(NUM_CLASSES)], value='3', label='Digit', elem_id='digit')
        with gr.Row():
            seed = gr.Number(value=0, precision=0, minimum=0, label='Seed', elem_id='seed', min_width=NARROW)
            name = gr.Dropdown(models.names, value=first, label='Student', elem_id='student', min_width=240)
        with gr.Row():
            columns = []
            for who, steps, most in (('teacher', MAX_STEPS, MAX_STEPS), ('student', models.own_steps(first), 8)):
                with gr.Column(min_width=NARROW):
                    slider = gr.Slider(1, most, steps, step=1, label=f'Steps of the {who}', elem_id=f'{who}-steps')
                    image = gr.Image(show_label=False, buttons=[], format='png', elem_id=f'{who}-image')
                    caption = gr.Textbox(label='Work', interactive=False, elem_id=f'{who}-caption')
                    columns.append((slider, image, caption))
        (teacher_steps, *teacher), (student_steps, *student) = columns
        inputs = [name, digit, seed, teacher_steps, student_steps]
        name.change(models.own_steps, name, student_steps, api_visibility='private')
        gr.on(
            [app.load, *(component.change for component in inputs)],
            draw,
            inputs,
            [*teacher, *student],
            api_name='draw',
            show_progress='hidden',
            trigger_mode='always_last',
        )
    return app


def run_digits_app() -> int:
    """The whole of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--checkpoints', type=Path, default=Path('checkpoints'), help='what `make demo` has written')
    add_server_arguments(parser)
    args: Any = parser.parse_args()
    try:
        import gradio  # noqa: F401 - before anything is loaded
    except ImportError as error:
        raise missing_gradio(error) from error
    try:
        models = DigitModels(args.checkpoints)
    except FileNotFoundError as error:
        raise SystemExit(f'error: {error}') from error
    serve(digits_app(models), args)
    return 0
