"""Bytes per prompt and speed of caches: our layout against the published one, at the shapes of FLUX.1 and Qwen-Image.

python benchmarks/prompt_cache.py              about a minute
python benchmarks/prompt_cache.py --calibrate  how the size of the published layout depends on what is assumed

The weights of the encoders are not here, so the values are drawn. What decides how far 8-bit numbers with one scale can
be compressed is how unlike the channels are, and how alike the tokens: channels get scales that are log-normally
distributed, a few of them 30 times larger, as encoders of this kind have them; the states of FLUX's padding, which are
not masked, are one state plus noise. That noise, and the lengths of the captions, are set so that the published layout
takes about what is known of it: 1.43 MB for FLUX (1.1 TB of 768,128 prompts), 165 kB for Qwen-Image (380 GB of
2,304,128). `--calibrate` shows what other assumptions give.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import cpu_seconds
from lakonlab.datasets.prompt_cache import open_prompt_cache
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_cache.record import quantise
from lakonlab.datasets.prompt_cache.sharded import number_name
from lakonlab.datasets.prompt_converting import convert_prompt_cache

FLUX_TOKENS, FLUX_WIDTH, FLUX_POOLED = 512, 4096, 768
QWEN_TOKENS, QWEN_WIDTH = 512, 3584
FAMILIES = ('FLUX.1', 'Qwen-Image')
SPREAD = 0.5
OUTLIERS, OUTLIER_FACTOR = 4, 30.0
PADDING_NOISE = 0.03
#: Tokens of captions: log-normal, with this median and spread.
MEDIAN_TOKENS, TOKENS_SPREAD = 50, 0.5


def channel_scales(width: int, spread: float, generator: torch.Generator) -> Tensor:
    """How large the values of each channel are."""
    scales = torch.exp(spread * torch.randn(width, generator=generator))
    scales[:OUTLIERS] *= OUTLIER_FACTOR
    return scales


def caption_length(generator: torch.Generator, most: int) -> int:
    """Number of tokens of a caption."""
    length = MEDIAN_TOKENS * torch.exp(TOKENS_SPREAD * torch.randn((), generator=generator))
    return int(length.clamp(6, most))


def flux_embeds(scales: Tensor, padding: Tensor, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """T5's states, all of which FLUX attends to, and CLIP's pooled embedding."""
    states = padding + noise * torch.randn(FLUX_TOKENS, FLUX_WIDTH, generator=generator)
    length = caption_length(generator, FLUX_TOKENS)
    states[:length] = torch.randn(length, FLUX_WIDTH, generator=generator)
    pooled = torch.randn(FLUX_POOLED, generator=generator).bfloat16()
    return {'encoder_hidden_states': (states * scales).bfloat16(), 'pooled_projections': pooled}


def qwen_embeds(scales: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Qwen2.5-VL's states, padded with zeros that the mask excludes, as published."""
    states, mask = torch.zeros(QWEN_TOKENS, QWEN_WIDTH), torch.zeros(QWEN_TOKENS, dtype=torch.int64)
    length = caption_length(generator, QWEN_TOKENS)
    states[:length], mask[:length] = torch.randn(length, QWEN_WIDTH, generator=generator) * scales, 1
    return {'encoder_hidden_states': states.bfloat16(), 'encoder_hidden_states_mask': mask}


def embeds_maker(
    family: str, spread: float = SPREAD, noise: float = PADDING_NOISE, seed: int = 0
) -> Callable[[], dict[str, Tensor]]:
    """Draws the embeddings of one prompt after the other."""
    generator = torch.Generator().manual_seed(seed)
    if family == 'FLUX.1':
        scales = channel_scales(FLUX_WIDTH, spread, generator)
        padding = torch.randn(FLUX_WIDTH, generator=generator)
        return lambda: flux_embeds(scales, padding, noise, generator)
    scales = channel_scales(QWEN_WIDTH, spread, generator)
    return lambda: qwen_embeds(scales, generator)


def published_file(number: int, embeds: dict[str, Tensor], precision: str) -> bytes:
    """A record exactly as the published tool writes it."""
    record = {'prompt': f'a picture of {number} cats on a table, in the style of a woodcut, with a long caption'}
    record.update(prompt_embed_kwargs=quantise(embeds, precision), latent_size=(16, 128, 128))
    return zstandard.ZstdCompressor(level=3).compress(pickle.dumps(record))


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(family: str, precision: str, count: int, repeats: int) -> None:
    """Print one line of the table."""
    make = embeds_maker(family)
    with tempfile.TemporaryDirectory() as folder:
        published, ours = Path(folder, 'published'), Path(folder, 'ours')
        published.mkdir()
        for number in range(count):
            (published / f'{number_name(number)}.zst').write_bytes(published_file(number, make(), precision))
        source = PublishedPromptCache(str(published))
        convert_prompt_cache(source, str(ours), count)
        cache = open_prompt_cache(ours)
        names = list(source.names)
        seconds = cpu_seconds(
            {
                'published': lambda: [source.record(name) for name in names],
                'ours': lambda: [cache.record(name) for name in names],
            },
            repeats,
        )
        before, after = size_of(published) / count, size_of(ours) / count
    speeds = [f'{1000 * seconds[name] / count:9.1f}' for name in ('published', 'ours')]
    print(f'{family:<11} {precision:<9} {before:12,.0f} {after:12,.0f} {after / before:8.3f} {speeds[0]} {speeds[1]}')


def calibrate() -> None:
    """Print the size of a published record, and of ours, for several assumptions."""
    print('family      spread   noise  bytes published         ours')
    cases = [('FLUX.1', SPREAD, noise) for noise in (1.0, 0.3, 0.1, 0.03, 0.01)]
    cases += [('FLUX.1', spread, PADDING_NOISE) for spread in (0.25, 1.0, 2.0)]
    cases += [('Qwen-Image', spread, PADDING_NOISE) for spread in (0.25, 0.5, 1.0, 2.0)]
    for family, spread, noise in cases:
        make = embeds_maker(family, spread, noise)
        with tempfile.TemporaryDirectory() as folder:
            published, ours = Path(folder, 'published'), Path(folder, 'ours')
            published.mkdir()
            for number in range(8):
                (published / f'{number_name(number)}.zst').write_bytes(published_file(number, make(), 'fp8'))
            convert_prompt_cache(PublishedPromptCache(str(published)), str(ours), 8)
            print(f'{family:<11} {spread:6} {noise:7} {size_of(published) / 8:16,.0f} {size_of(ours) / 8:12,.0f}')


def main() -> None:
    """Measure on one thread."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--count', type=int, default=32, help='prompts of each kind (default: 32)')
    parser.add_argument('--repeats', type=int, default=3, help='times that all of them are read (default: 3)')
    parser.add_argument('--calibrate', action='store_true', help='print sizes for several assumptions, and end')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.calibrate:
        calibrate()
        return
    print('                           bytes per prompt                     ms to read a prompt')
    print('family      precision    published         ours    ratio published      ours')
    for family in FAMILIES:
        for precision in ('fp8', 'bf16'):
            measure(family, precision, args.count, args.repeats)


if __name__ == '__main__':
    main()
