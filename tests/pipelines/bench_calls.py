"""A small call, its samples and a peer, for tests of the cache benchmark and of what it is made of."""

from __future__ import annotations

from diffusers import FirstBlockCacheConfig

from hasten.pipelines.bench.foreign import diffusers_cache
from hasten.pipelines.bench.shots import Sample
from tests.hosts import WAN_CALL

CALL = {**WAN_CALL, "num_inference_steps": 4, "max_sequence_length": 16}
SAMPLES = [Sample("a seven", 0), Sample("a two", 1)]
FIRST_BLOCK = diffusers_cache("FirstBlockCache @ 0.9", lambda _: FirstBlockCacheConfig(threshold=0.9))
