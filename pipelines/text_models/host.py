"""How a masked language model is called: which family it is, and what its forward wants.

The engine asks for logits of some tokens at some positions (a `Pass`) and knows nothing of the model behind it. A family
is one subclass of `TextHost`; `families.py` chooses it from the model's config.

Shapes: m texts, N computed tokens of each, R of them whose logits are wanted, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.caching.store import KVStore, Pass
from hasten.canvas import TextFacts
from hasten.errors import ModelError
from hasten.pipelines.text_models.layers import TextLayers
from hasten.pipelines.text_models.tap import CatchSdpa, Tap, attach, has_interface, sites
from hasten.session import Attachment


class TextHost:
    """One model. Subclasses set `facts` and say in `forward` how it is called; the rest is common to all.

    model: stays as it is; it is touched only within `attached()`, and exactly restored. caches: keys and values can be
    kept from one evaluation to the next (a model that looks at the noise level in every layer cannot). repeats: the share
    of given tokens that it gives back, None until a reviser needs to know (`repeats.py`).
    """

    caches: bool = True
    family: ClassVar[str] = ""

    def __init__(self, model: nn.Module, facts: TextFacts) -> None:
        self.model, self.facts = model, facts
        self.tap = Tap()
        self.repeats: float | None = None
        self._layers: TextLayers | None = None
        self._sites: list[nn.Module] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def forward(self, ids: Tensor, positions: Tensor, now: Pass) -> Any:
        """Call the model on ids and positions, int64 [m, N] each; what it returns, or its logits.

        Attention masks are not passed: the tap has them. `now` is there for families that want more (noise levels).
        """
        return self.model(input_ids=ids, position_ids=positions, use_cache=False)

    def head(self) -> nn.Module | None:
        """The module that turns hidden states into logits; before it, all but the wanted tokens are dropped. None: the
        model gives the logits of all tokens, and they are dropped afterwards."""
        get = getattr(self.model, "get_output_embeddings", None)
        found = get() if callable(get) else None
        return found if isinstance(found, nn.Module) else None

    def interfaced(self) -> bool:
        """Does its attention go through transformers' interface? Otherwise torch's function is caught underneath."""
        return has_interface(self.model)

    def shadow(self, attachment: Attachment) -> None:
        """More to put onto the instance while it generates (positions, for models that do not take any)."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model answers from our store within; afterwards it is as it was."""
        with ExitStack() as stack:
            if self.interfaced():
                self._sites = self._sites or sites(self.model)
                attachment = attach(self.model, self.tap, self._sites)
                mode: Any = nullcontext()
            else:
                attachment, mode = Attachment(), CatchSdpa(self.tap)
            stack.callback(attachment.restore)
            self.shadow(attachment)
            head = self.head()
            if head is not None:
                handle = head.register_forward_pre_hook(self._wanted)
                stack.callback(handle.remove)
            stack.enter_context(mode)
            stack.enter_context(torch.no_grad())
            yield

    @property
    def layers(self) -> TextLayers:
        """Its layers, one by one, for caches that compute other tokens in each. Raises `RefusedError` without a list of
        them."""
        if self._layers is None:
            self._layers = TextLayers(self)
        return self._layers

    def run(self, now: Pass, store: KVStore) -> Tensor:
        """Logits of the wanted tokens, [m, R, V]; keys and values go into `store` as `now.keep` says.

        Raises `ModelError` where not every layer's attention was caught: then nothing of it can be trusted.
        """
        positions = torch.where(now.slots < store.slots, now.slots, 0)
        with self.tap.during(now, store):
            given = self.forward(now.ids, positions, now)
            caught = self.tap.calls
        if caught != self.facts.layers:
            raise ModelError(
                f"{type(self.model).__name__} has {self.facts.layers} attention layers, of which {caught} could be followed."
                " Load it with attn_implementation='sdpa'."
            )
        logits: Tensor = given if isinstance(given, Tensor) else given.logits
        return logits if self.head() is not None else rows_of(logits, now.read)

    def _wanted(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        now = self.tap.now
        if now is None:
            return None
        return (rows_of(args[0], now.read), *args[1:])


def rows_of(states: Tensor, read: Tensor) -> Tensor:
    """Rows [m, R, C] of states [m, N, C]; numbers N (none) give any row."""
    index = read.clamp(max=states.shape[1] - 1)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
