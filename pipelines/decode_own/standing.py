"""A causal language model with something left out: gates before its layers and feed-forward blocks, while a context is open.

Every layer keeps its place in the list: transformers chooses masks by a layer's number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.errors import RefusedError
from hasten.pipelines.decode_own.scratch import decoder
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.samplers.drafters_own.skip import SkipState
from hasten.session import Attachment

NORM = "post_attention_layernorm"
"""The norm before the feed-forward block, in transformers' models: what enters it are the states that the block turns."""


class Standing:
    """Gates on one model. runs: which layers are run; while None, everything is. met, ran: layers (or feed-forward blocks, where
    `ffn`) of tokens that were read with something left out, and those that ran. entering: where it is a dictionary, what enters
    layer i is kept there as "hidden:i"."""

    def __init__(self, model: Any, state: SkipState, ffn: bool) -> None:
        """Raises `RefusedError` for a model whose layers or feed-forward blocks nobody knows."""
        self.owner, self.state = decoder(model), state
        self.layers: nn.ModuleList = self.owner.layers
        self.runs: list[bool] | None = None
        self.ffn = ffn
        self.met = self.ran = 0
        self.entering: dict[str, Tensor] | None = None
        if ffn and not all(hasattr(layer, "mlp") and hasattr(layer, NORM) for layer in self.layers):
            raise RefusedError(f"The layers of this {type(model).__name__} have no mlp behind a {NORM}, so that none can be left out.")

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, the gates stand; then everything is as it was."""
        attachment = Attachment()
        try:
            gates = [Gate(layer, number, self._layer) for number, layer in enumerate(self.layers)]
            attachment.replace(self.owner, "layers", GateList(self.layers, gates))
            for number, layer in enumerate(self.layers if self.ffn else ()):
                block: Any = layer.mlp
                gate = _FeedForwardGate(self, number, block)
                attachment.replace(layer, "mlp", gate)
                attachment.on_restore(getattr(layer, NORM).register_forward_pre_hook(gate.see).remove)
            yield
        finally:
            attachment.restore()

    def token(self, place: int | None) -> None:
        """What follows is a token at `place`; None: a prompt, which everything reads."""
        self.runs = None if place is None else self.state.runs(place)
        self.state.begin()

    def _layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if self.entering is not None:
            self.entering[f"hidden:{number}"] = states
        if not self.ffn:
            self.count(self.runs is None or self.runs[number])
        return layer(*args, **kwargs) if self.runs is None or self.runs[number] else states

    def count(self, ran: bool) -> None:
        """One more was met; a prompt's are not counted."""
        if self.runs is not None:
            self.met, self.ran = self.met + 1, self.ran + ran


class _FeedForwardGate:
    """Stands for one feed-forward block."""

    def __init__(self, standing: Standing, number: int, block: nn.Module) -> None:
        self.standing, self.number, self.block = standing, number, block
        self.before: Tensor | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """What enters the norm before it."""
        self.before = args[0]

    def __call__(self, states: Tensor) -> Any:
        standing, before = self.standing, self.before
        self.before = None
        if standing.runs is None or before is None:
            return self.block(states)
        skipped = standing.state.skips_ffn(self.number)
        standing.count(not skipped)
        if skipped:
            return states.new_zeros(states.shape)
        added = self.block(states)
        standing.state.saw_ffn(self.number, before, before + added)
        return added

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)
