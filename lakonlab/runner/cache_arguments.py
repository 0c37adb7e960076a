"""Command-line arguments of the tools that make caches; imports nothing that is slow, so that ``--help`` is instant."""

from __future__ import annotations

from argparse import ArgumentParser

from lakonlab.datasets.precisions import PRECISIONS

FORMATS = ('ours', 'published')


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the config and what may replace its text encoder."""
    parser.add_argument('config', help='config of the run that will use what is made')
    parser.add_argument('--text-encoder', metavar='CONFIG', help='config whose model.text_encoder is used')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='change the config: data.train.cache_dir=prompts'
    )


def add_format_arguments(parser: ArgumentParser, default_shard_size: int) -> None:
    """Add the layout of a cache."""
    parser.add_argument(
        '--format', choices=FORMATS, default='ours', help='ours: shards with an index; published: a file per record'
    )
    parser.add_argument(
        '--shard-size',
        type=int,
        default=default_shard_size,
        metavar='N',
        help=f'rows of a shard of ours; what an interruption costs (default: {default_shard_size})',
    )
    parser.add_argument('--check', action='store_true', help='read what is there, name what is damaged, make nothing')


def add_precision_argument(parser: ArgumentParser, default: str) -> None:
    """Add the precision of embeddings."""
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default=default,
        help=f'fp8: 8 bits and a scale for each prompt, as published; bf16; float32 (default: {default})',
    )
