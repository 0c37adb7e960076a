"""A web page that turns prompts into images."""

from __future__ import annotations

import argparse
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

LARGEST_SEED = 2**31 - 1
RANDOM_SEED = -1
SIZES = dict(minimum=64, maximum=2048, step=16)
#: Nothing is reported to anyone; every hour, images that are a day old are removed from the cache.
BLOCKS = dict(analytics_enabled=False, delete_cache=(3600, 86400))
SHOW_IMAGE = "() => { document.getElementById('image').scrollIntoView({ block: 'nearest' }); }"


def missing_gradio(error: ImportError) -> SystemExit:
    """What to say where gradio is not installed."""
    return SystemExit(f"error: this needs gradio ({error}): pip install 'lakonlab[demo]'")


def settled_seed(seed: float | None) -> int:
    """The seed that is used for one that was entered: a random one for -1 or nothing.

    Args:
        seed: Entered.

    Raises:
        ValueError: It is out of range.
    """
    if seed is None or int(seed) == RANDOM_SEED:
        return random.randint(0, LARGEST_SEED)
    if not 0 <= int(seed) <= LARGEST_SEED:
        raise ValueError(f'the seed is {int(seed)}: expected -1 for a random one, or 0 up to {LARGEST_SEED}')
    return int(seed)


def text_to_image_app(
    generate: Callable[..., Any], title: str, *, width: int, height: int, steps: tuple[int, int, int, int]
):
    """Build the page.

    Args:
        generate: ``generate(prompt=..., seed=..., width=..., height=..., steps=...)``, an image.
        title: Of the page.
        width: At first, in pixels.
        height: At first, in pixels.
        steps: Smallest, largest and first number of network evaluations, and the step of the slider.

    Returns:
        A ``gradio.Blocks``, to be launched.
    """
    import gradio as gr

    least, most, first, stride = steps

    def check(prompt: str, seed: float | None) -> str:
        if not (prompt or '').strip():
            raise gr.Error('The prompt is empty: describe the image that you want.', title='Prompt')
        try:
            return str(settled_seed(seed))
        except ValueError as error:
            raise gr.Error(str(error), title='Seed') from error

    def run(prompt: str, seed: str, width: int, height: int, steps: int):
        try:
            made = generate(prompt=prompt, seed=int(seed), width=int(width), height=int(height), steps=int(steps))
        except (RuntimeError, ValueError) as error:
            raise gr.Error(str(error), title='Generation') from error
        return made, seed

    with gr.Blocks(title=title, **BLOCKS) as app:
        gr.Markdown(f'# {title}')
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label='Prompt', lines=2, elem_id='prompt')
                with gr.Row():
                    width_box = gr.Slider(label='Width', value=width, elem_id='width', **SIZES)
                    height_box = gr.Slider(label='Height', value=height, elem_id='height', **SIZES)
                swap = gr.Button('Swap width and height', elem_id='swap')
                steps_box = gr.Slider(
                    label='Network evaluations', minimum=least, maximum=most, step=stride, value=first, elem_id='steps'
                )
                seed_box = gr.Number(label='Seed, -1 for a random one', value=42, precision=0, elem_id='seed')
                with gr.Row():
                    random_button = gr.Button('Random seed', elem_id='random-seed')
                    reuse_button = gr.Button('Reuse last seed', elem_id='reuse-seed')
                button = gr.Button('Generate', variant='primary', elem_id='generate')
            with gr.Column():
                image = gr.Image(label='Image', format='png', elem_id='image')
                last_seed = gr.Textbox(label='Seed of this image', interactive=False, elem_id='last-seed')
                seed_to_use = gr.Textbox(label='seed', visible=False)
        swap.click(lambda a, b: (b, a), [width_box, height_box], [width_box, height_box], api_visibility='private')
        random_button.click(lambda: RANDOM_SEED, None, seed_box, api_visibility='private')
        reuse_button.click(
            lambda last, now: int(last) if last else now, [last_seed, seed_box], seed_box, api_visibility='private'
        )
        checked = gr.on(
            [button.click, prompt.submit],
            check,
            [prompt, seed_box],
            seed_to_use,
            api_visibility='private',
            show_progress='hidden',
        )
        checked.success(None, js=SHOW_IMAGE, api_visibility='private')  # on a phone it is below the controls
        checked.success(
            run,
            [prompt, seed_to_use, width_box, height_box, steps_box],
            [image, last_seed],
            api_name='text_to_img',
            concurrency_limit=1,
            concurrency_id='device',
        )
    return app


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--share``, ``--host`` and ``--port``."""
    parser.add_argument('--share', action='store_true', help='make a public link for up to a week')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at; 0.0.0.0 for all')
    parser.add_argument('--port', type=int, help='port to listen at; by default the first free one from 7860')


def serve(app: Any, args: argparse.Namespace) -> None:
    """Serve a page until SIGINT or SIGTERM; see :func:`add_server_arguments`.

    Raises:
        SystemExit: The port is taken.
    """
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app.queue().launch(server_name=args.host, server_port=args.port, share=args.share, prevent_thread_lock=True)
        ended.wait()
    except OSError as error:
        raise SystemExit(f'error: {error}') from error
    finally:
        app.close()
        for number, handler in before.items():
            signal.signal(number, handler)
