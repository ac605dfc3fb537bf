"""Layers or feed-forward blocks left out without a whole model that verifies: other texts than the model's, and so to be asked for."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.pipelines.decode_own.scratch import decoder
from hasten.pipelines.decode_own.standing import Standing
from hasten.samplers.drafters_own.skip import Skip


class Alone:
    """While open, new tokens of `generate` are read with what `skip` leaves out; prompts are read by everything.

        with Alone(model, ByPlace(), allow_lossy=True) as run:
            model.generate(**inputs)
        print(run.share)

    Raises `RecipeError` without `allow_lossy`, `RefusedError` for a model whose layers nobody knows. `OwnModel(skip=...)` drafts with
    the same and is lossless.
    """

    def __init__(self, model: Any, skip: Skip, *, allow_lossy: bool = False) -> None:
        if not allow_lossy:
            raise RecipeError(
                f"{skip.kind} alone writes other texts than the model. Say allow_lossy=True where that is wanted, or let it draft,"
                " which is lossless: OwnModel(skip=...)."
            )
        self.model, self.skip = model, skip
        self.state = skip.start(len(decoder(model).layers))
        self.standing = Standing(model, self.state, skip.ffn)
        self._stack = ExitStack()
        self._mask: Tensor | None = None

    @property
    def share(self) -> float:
        """Share of the layers (for feed-forward: of the blocks) that new tokens were read by; 1.0: nothing was left out."""
        return self.standing.ran / max(1, self.standing.met)

    def __enter__(self) -> Self:
        self._stack.enter_context(self.standing.open())
        self._stack.callback(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._stack.callback(self.model.register_forward_hook(self._after).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, states = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given: Any = states if ids is None else ids
        cache = kwargs.get("past_key_values")
        length = 0 if cache is None else int(cache.get_seq_length())
        if given.shape[1] > 1 or not length:
            mask: Any = kwargs.get("attention_mask")
            padded = isinstance(mask, Tensor) and mask.dim() == 2
            self._mask = mask[:, -given.shape[1] :] if padded else torch.ones(given.shape[:2], device=given.device)
            self.standing.token(None)
            self.standing.entering = {} if self.skip.needs else None
        else:
            self._mask = None
            self.standing.token(length)

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._mask is not None:
            self.state.prompt(self.standing.entering or {}, self._mask)
        self.standing.entering = None
