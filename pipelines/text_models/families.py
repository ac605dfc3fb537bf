"""Which family a masked language model is of, from its config."""

from __future__ import annotations

from typing import Any

from hasten.errors import ModelError, UsageError
from hasten.pipelines.text_models.dit import BD3LM, MDLM
from hasten.pipelines.text_models.family import Family, Told
from hasten.pipelines.text_models.llada import LLaDA, LLaDA2, LLaDAMoE
from hasten.pipelines.text_models.qwen import A2D, SDAR, Bundled, Dream, FastDLLM2

FAMILIES: tuple[type[Family], ...] = (Bundled, LLaDA, LLaDAMoE, LLaDA2, Dream, SDAR, FastDLLM2, A2D, MDLM, BD3LM)
"""In the order in which they are asked."""


def starts_from_noise(model: Any) -> bool:
    """Is it a DiffusionGemma, which has no mask token? Asked by name: not every version of transformers has the class."""
    return getattr(getattr(model, "config", None), "model_type", None) == "diffusion_gemma"


def choose(
    model: Any, tokenizer: Any = None, *, mask_token_id: int | None = None, block: int | None = None,
    shifted: bool | None = None,
) -> Family:  # fmt: skip
    """The host for `model`, chosen from `config.hasten_diffusion`, `config.architectures` and `config.model_type`.

    tokenizer: for tokens that the config does not name. mask_token_id, block, shifted: what is said here counts before
    all else. Raises `ModelError` for a model of no known family or without a mask token, `UsageError` for a block
    where there are none, `RefusedError` where the model cannot be evaluated rightly.
    """
    if getattr(model, "config", None) is None:
        raise ModelError(f"{type(model).__name__} has no config. Pass a model that transformers loaded.")
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode, which changes its output. Call model.eval().")
    for claims in ("named", "typed"):
        for family in FAMILIES:
            if getattr(family, claims)(model):
                return family.of(model, tokenizer, Told(mask_token_id, block, shifted))
    if starts_from_noise(model):
        raise ModelError(
            "DiffusionGemma has no mask token: it is written from noise. Use hasten.DiffusionGemmaPipeline(model, tokenizer), or"
            " hasten.TextDiffusionPipeline.from_pretrained, which chooses it."
        )
    named = ", ".join(getattr(model.config, "architectures", None) or [type(model).__name__])
    known = ", ".join(family.family for family in FAMILIES if family is not Bundled)
    raise ModelError(
        f"{named} is none of the masked language models that are known here ({known}). If it is one, put"
        ' hasten_diffusion = {"kind": "full"} and mask_token_id into its config.'
    )
