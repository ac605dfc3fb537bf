"""What this loop asks of transformers, in one file: a new minor version is checked here and nowhere else.

The floor is 5.18: there `crop` takes a number to remove, `get_mask_sizes` a query length, and caches have `get_max_length`.
"""

from __future__ import annotations

import copy
import inspect
from importlib import metadata
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from hasten.errors import RefusedError
from hasten.pipelines.causal.configs import OURS

FLOOR = (5, 18)

ALONE = frozenset({
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
    "SuppressTokensLogitsProcessor",
})  # fmt: skip
"""Processors that look at one row of logits and at nothing else."""

BY_PREFIX = frozenset({
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor", "WatermarkLogitsProcessor", "PrefixConstrainedLogitsProcessor",
})  # fmt: skip
"""Processors that look at the tokens before, too, and keep nothing between two calls."""

PLAIN = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""What `generate` hands over where a model reads token ids alone."""

LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose keys and values can be taken back."""

ATTENTION = {"sdpa": False, "eager": True}
"""Implementations that read a mask of their own for every query; True: additive, False: of truth values."""


def check_version() -> None:
    """Raise `RefusedError` where transformers is too old."""
    found = metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < FLOOR:
        raise RefusedError(
            f"Drafted decoding needs transformers {'.'.join(map(str, FLOOR))} or later, and {found} is installed: caches changed."
            " Run `pip install -U transformers`."
        )


def own_generate(model: Any) -> bool:
    """Does the model write its texts with transformers' own `generate`?"""
    return type(model).generate is GenerationMixin.generate


def ours(model: Any) -> bool:
    """Does another session stand on the model's attention?"""
    return str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(OURS)


def why_not(model: Any) -> str:
    """Why drafts cannot be verified on this model, as a clause; "" where they can."""
    config = model.config.get_text_config(decoder=True)
    if not own_generate(model):
        return "it has a generate() of its own"
    if model.config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    others = set(layer_kinds(config)) - LAYERS
    if others:
        return f"its layers of kind {', '.join(sorted(others))} cannot take back what they read"
    attention = config._attn_implementation
    if attention not in ATTENTION:
        return (
            f"its attention {attention!r} cannot read a token tree; call model.set_attn_implementation('sdpa') first"
        )
    return ""


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kind of every layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(kinds)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return ("sliding_attention" if window else "full_attention",) * int(config.num_hidden_layers)


def given_away(arguments: dict[str, Any]) -> str:
    """Why a call is transformers' own, as a clause, from its arguments alone; "" where it may be ours."""
    for name, why in _LEFT.items():
        if arguments.get(name) is not None:
            return why
    return ""


def why_left(config: Any) -> str:
    """The same from the generation config that `generate` has prepared."""
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        return f"its mode is {mode.replace('_', ' ')}"
    if config.use_cache is False:
        return "use_cache=False leaves no keys to verify against"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of every step are asked for"
    if config.token_healing:
        return "token healing rewrites the prompt"
    if config.guidance_scale not in (None, 1, 1.0):
        return "guidance runs the model inside a logits processor"
    return ""


def why_others(arguments: dict[str, Any]) -> str:
    """The same where the model reads more than tokens."""
    others = sorted(name for name, value in arguments.items() if value is not None and name not in PLAIN)
    return f"the model reads {', '.join(others)} beside token ids" if others else ""


def why_cache(arguments: dict[str, Any], ids: Any) -> str:
    """The same from what the model is called with. ids int64 [B, P]."""
    others = sorted(name for name, value in arguments.items() if value is not None and name not in PLAIN)
    if others:
        return f"the model reads {', '.join(others)} beside token ids"
    cache: Any = arguments.get("past_key_values")
    if is_static(cache):
        sliding = any(cache.is_sliding)
        return "its static cache has sliding windows, which cannot take back what they dropped" if sliding else ""
    if not grows(cache) or cache.offloading:
        return f"its cache is a {type(cache).__name__}{' that is offloaded' if grows(cache) else ''}, whose slots cannot be moved"
    if cache.get_seq_length() == 0:
        return ""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "the cache it continues has layers that forget"
    return "" if cache.get_seq_length() < ids.shape[1] else "the cache it continues holds the whole prompt"


_LEFT = {
    "assistant_model": "it has an assistant_model of its own",
    "custom_generate": "it has a custom_generate of its own",
    "synced_gpus": "synced_gpus keeps ranks in step, one token at a time",
    "negative_prompt_ids": "guidance runs the model inside a logits processor",
    "position_ids": "it has position_ids of its own",
    "inputs_embeds": "its prompt is given as embeddings",
    "prompt_lookup_num_tokens": "it asks for transformers' own prompt look-up",
}
"""Argument of `generate` -> why a call with it is left alone."""


def of_rows(processors: Any, rows: list[int]) -> LogitsProcessorList:
    """The processors for prefixes of `rows`, in any order and number: what they hold for each row of the batch is held for
    each of these."""
    return LogitsProcessorList([_of_rows(each, rows) for each in processors])


def _of_rows(processor: Any, rows: list[int]) -> Any:
    ignored = getattr(processor, "prompt_ignore_length", None)
    allowed = getattr(processor, "_prefix_allowed_tokens_fn", None)
    if not isinstance(ignored, Tensor) and allowed is None:
        return processor
    found = copy.copy(processor)
    if isinstance(ignored, Tensor):
        found.prompt_ignore_length = ignored[rows]
    if allowed is not None:
        found._prefix_allowed_tokens_fn = lambda at, text: allowed(rows[at], text)
    return found


def parameters() -> inspect.Signature:
    """Of transformers' `generate`."""
    return inspect.signature(GenerationMixin.generate)


def fixed_ends(criteria: Any) -> tuple[int | None, tuple[int, ...], list[Any]]:
    """Stopping criteria as (greatest length or None, ids that end a row, the others)."""
    length, ends, others = None, list[int](), []
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            length = each.max_length if length is None else min(length, each.max_length)
        elif type(each) is EosTokenCriteria:
            ends += each.eos_token_id.flatten().tolist()
        else:
            others.append(each)
    return length, tuple(ends), others


def unknown(criteria: Any) -> list[str]:
    """Names of stopping criteria that may look at several rows, or remember how often they were asked."""
    known = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria)
    return sorted({type(each).__name__ for each in criteria if type(each) not in known})


def stop_strings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with stop strings as a criterion: `generate` drops the tokenizer on its way to a callable."""
    config, tokenizer = arguments.get("generation_config"), arguments.get("tokenizer")
    strings = arguments.get("stop_strings") or getattr(config, "stop_strings", None)
    if not strings or tokenizer is None:
        return arguments
    found = {name: value for name, value in arguments.items() if name != "stop_strings"}
    if config is not None and config.stop_strings:
        found["generation_config"] = copy.deepcopy(config)
        found["generation_config"].stop_strings = None
    own = StopStringCriteria(tokenizer, strings)
    return found | {"stopping_criteria": StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), own])}


def grows(cache: Any) -> bool:
    """Is it the cache that `generate` makes by itself?"""
    return type(cache) is DynamicCache


def is_static(cache: Any) -> bool:
    return type(cache) is StaticCache


def growing() -> DynamicCache:
    """A cache whose layers all keep everything: those of sliding layers, too, whose windows are in the mask."""
    return DynamicCache()


def last_logits(model: Any) -> dict[str, Any]:
    """How a model is asked for logits behind its last token alone."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def forward(model: Any, config: Any, cache: Any) -> Any:
    """The model's forward, compiled where `generate` would compile it: on a device, with a static cache."""
    if model._valid_auto_compile_criteria({"past_key_values": cache}, config):
        return model.get_compiled_call(config.compile_config)
    return model
