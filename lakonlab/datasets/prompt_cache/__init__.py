"""Caches of embedded prompts and of latents: the published layout, and a smaller and safer one; see docs/caching.md."""

from lakonlab.datasets.prompt_cache.embeds_file import read_embeds, write_embeds
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.open_cache import PromptCache, is_prompt_cache, open_prompt_cache

__all__ = ['CacheError', 'PromptCache', 'is_prompt_cache', 'open_prompt_cache', 'read_embeds', 'write_embeds']
