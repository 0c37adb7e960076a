"""What the web demos of published pipelines do: build the pipelines, then serve a page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lakonlab.ui.pipeline_options import (
    PublishedPipeline,
    add_pipeline_arguments,
    build_pipeline,
    reported,
    steps_of,
)
from lakonlab.ui.text_to_image_app import add_server_arguments, missing_gradio, serve, text_to_image_app


def generator_of(pipes: Mapping[int, Any]):
    """What makes an image for the page.

    Args:
        pipes: Number of network evaluations from which on -> pipeline.
    """
    import torch

    def generate(prompt: str, seed: int, width: int, height: int, steps: int):
        pipe = pipes[max((count for count in pipes if count <= steps), default=min(pipes))]
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, width=width, height=height, num_inference_steps=steps, generator=generator).images[0]

    return generate


def run_app(published: tuple[PublishedPipeline, ...], title: str, steps: tuple[int, int, int, int]) -> int:
    """The whole of a demo script.

    Args:
        published: The pipelines, which share a base; each is used from its number of evaluations on. A command line
            that names another adapter has it for all numbers.
        title: Of the page.
        steps: See :func:`~lakonlab.ui.text_to_image_app.text_to_image_app`.
    """
    first = published[0]
    parser = argparse.ArgumentParser(description=title)
    add_pipeline_arguments(parser, first)
    add_server_arguments(parser)
    args = parser.parse_args()
    try:
        import gradio  # noqa: F401 - before anything is loaded
    except ImportError as error:
        raise missing_gradio(error) from error
    return reported(parser, lambda: _serve(published, title, steps, args))


def build_pipelines(args: argparse.Namespace, published: Sequence[PublishedPipeline]) -> dict[int, Any]:
    """The pipelines of a page, which share a base.

    Args:
        args: See :func:`~lakonlab.ui.pipeline_options.add_pipeline_arguments`.
        published: See :func:`run_app`.

    Returns:
        Number of network evaluations from which on it is used -> pipeline.
    """
    first = published[0]
    pipes = {first.steps: build_pipeline(args, first)}
    if args.adapter == first.adapter and args.subfolder is None:
        # their own components, but with the transformer that the adapter was loaded into
        parts = {**pipes[first.steps].components, 'transformer': pipes[first.steps].transformer.piflow.base}
        pipes.update({other.steps: build_pipeline(args, other, parts) for other in published[1:]})
    return pipes


def slider_of(
    steps: tuple[int, int, int, int], pipes: Mapping[int, Any], published: Sequence[PublishedPipeline]
) -> tuple[int, int, int, int]:
    """A slider for numbers of evaluations that begins with the one that the first adapter was trained for.

    Args:
        steps: That of the page, see :func:`~lakonlab.ui.text_to_image_app.text_to_image_app`.
        pipes: See :func:`build_pipelines`.
        published: What the page was made for.
    """
    least, most, first, stride = steps
    trained = steps_of(pipes[published[0].steps], published[0])
    if trained == published[0].steps:
        return least, most, first, stride
    least, most = min(least, trained), max(most, trained)
    return least, most, trained, 1 if (trained - least) % stride or (most - least) % stride else stride


def _serve(published: Sequence[PublishedPipeline], title: str, steps: tuple[int, int, int, int], args) -> int:
    pipes = build_pipelines(args, published)
    size = dict(width=published[0].width, height=published[0].height)
    page = text_to_image_app(generator_of(pipes), title, steps=slider_of(steps, pipes, published), **size)
    serve(page, args)
    return 0
