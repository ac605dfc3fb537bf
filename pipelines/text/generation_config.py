"""transformers' `GenerationConfig` as arguments of ours, and what a model's own generation_config.json says.

Three say something about a generation, in this order: the call's arguments, its `generation_config=`, the model. What the
earlier ones say counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.pipelines.text.arguments import ALIASES, canonical

SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
"""What belongs together: whoever says that tokens are not drawn says so of all of these."""

NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "num_beam_groups": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0, "min_p": 0.0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_length": 0, "use_cache": True, "early_stopping": False,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "output_logits": False,
    "renormalize_logits": False, "remove_invalid_values": False, "disable_compile": True, "cache_implementation": "dynamic",
}  # fmt: skip
"""Fields that we have not, at the values at which they change nothing."""

ABOUT = ("transformers_version", "bos_token_id", "_commit_hash", "_from_model_config", "_original_object_hash")
"""Fields that say nothing about a generation here: the prompt has its first token already."""

INSTEAD = {
    "max_length": "max_new_tokens", "min_length": "min_new_tokens", "guidance_scale": "cfg_scale", "stop_strings": "stopping_criteria",
    "max_time": "callback_on_step_end", "suppress_tokens": "a tokenizer without them", "num_return_sequences": "several prompts",
}  # fmt: skip
"""What to say in place of a field that we have not."""


def settings(given: Any, known: Collection[str]) -> dict[str, Any]:
    """What a `generation_config=` says, under our names. given: a `GenerationConfig`, a mapping, or None.

    known: the arguments that `generate` takes. Raises `UsageError` with all fields that nothing here takes, and for one
    argument under two names.
    """
    said = fields(given)
    wrong = sorted(name for name in said if name not in known and name not in ALIASES)
    if wrong:
        others = [*known, *ALIASES]
        told = [f"{name} = {said[name]!r}" + _hint(name, others) for name in wrong]
        raise UsageError(
            f"generation_config says {'; '.join(told)}. Text diffusion has no such thing, and leaves out nothing in silence."
            " Take it out of the config."
        )
    own = {name: value for name, value in said.items() if name in known}
    return canonical({name: value for name, value in said.items() if name not in known}, own)


def layered(given: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and what `further` says besides.

    Who asks for the best token in `given` (temperature 0, do_sample False) hears nothing of sampling from `further`; who asks
    for drawn ones is not held back by it.
    """
    left = {name: value for name, value in further.items() if name not in given}
    if given.get("do_sample") is False or given.get("temperature") == 0:
        return dict(given) | {name: value for name, value in left.items() if name not in SAMPLING}
    if given.get("do_sample") or given.get("temperature"):
        for name in ("do_sample", "temperature"):
            if name in left and not left[name]:
                del left[name]
    return dict(given) | left


def of_model(model: Any) -> dict[str, Any]:
    """How the model's own generation_config.json wants tokens drawn; {} where it does not, or says nothing.

    Its end, padding and mask tokens are read when the pipeline is made (`text_models.family`).
    """
    said = fields(getattr(model, "generation_config", None))
    if not said.get("do_sample") or said.get("temperature") == 0:
        return {}
    return {name: said[name] for name in SAMPLING if name in said}


def sentence(used: Mapping[str, Any]) -> str:
    """What is said where tokens are drawn because the model wants it so."""
    numbers = ", ".join(f"{name} = {value}" for name, value in used.items() if name != "do_sample")
    return (
        f"Tokens are drawn ({numbers or 'temperature = 1'}) because the model's generation_config.json says so. Pass"
        " temperature=0 for the most probable ones."
    )


def fields(given: Any) -> dict[str, Any]:
    """What differs from "nothing said"; of a `GenerationConfig`, from transformers' defaults."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        said = dict(given)
    elif hasattr(given, "to_diff_dict"):
        said = given.to_diff_dict()
    else:
        raise UsageError(
            f"generation_config is a transformers.GenerationConfig or a dictionary, got {type(given).__name__}."
            " GenerationConfig.from_pretrained(folder) reads one."
        )
    silent = {name for name, value in said.items() if value is None or name in ABOUT or _neutral(name, value)}
    return {name: value for name, value in said.items() if name not in silent}


def _neutral(name: str, value: Any) -> bool:
    """Is it a field that we have not, at a value that changes nothing?"""
    return name in NEUTRAL and type(value) in (type(NEUTRAL[name]), int) and value == NEUTRAL[name]


def _hint(name: str, known: Collection[str]) -> str:
    return f" (take {INSTEAD[name]})" if name in INSTEAD else nearest(name, known).rstrip(".")
