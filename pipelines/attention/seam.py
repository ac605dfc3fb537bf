"""Sparse attention on one network: learn what its calls are made of, hand those that may be sparse to the policy.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import HastenError
from hasten.pipelines.attention.facts import Held, record
from hasten.pipelines.attention.gain import declines
from hasten.pipelines.attention.masks import Padding, readable_keys, understand, with_padding
from hasten.pipelines.attention.ranks import Accord, is_ring
from hasten.pipelines.attention.sites import Site, Sites
from hasten.pipelines.attention.tokens import CROSS, PATCH, TEXT_ONLY, Key, Learned, learn
from hasten.pipelines.host import Call
from hasten.pipelines.seams.writes import kind_of, twin
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.policy import SparseAttention, SparseState
from hasten.sparse_attn.segments import Tokens
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate

CHANNELS = ("in_channels", "in_visual_dim", "latent_channels")
"""What configurations call the channels of the latents."""

Place = tuple[Hashable, ...]
"""Whose state: (branch, or None where branches share; site; which of its calls; shapes of q and k)."""


class AttentionSeam:
    """Puts a `SparseAttention` onto one network, until `release`."""

    def __init__(self, gate: DenoiserGate, policy: SparseAttention) -> None:
        self.gate, self.policy = gate, policy
        self.sites = Sites(gate.model)
        for inner in gate.below():
            inner.above.append(self)
        self.states: dict[Place, Held] = {}
        self.learned: dict[Hashable, dict[Key, Learned]] = {}
        self.paddings: dict[Hashable, Padding] = {}
        self.refused: dict[str, str] = {}
        self.doubts: set[str] = set()
        self.run = -1
        self.aimed: float | None = None
        self.off = False
        if not self.sites.all:
            self.off = True
            self._say("no attention processors were found on it, so its attention stays dense")
        if is_ring(gate.model):
            gate.session.note(
                f"{gate.site}: where attention may be sparse its ranks trade heads for tokens instead of passing keys round,"
                " because a plan is about all tokens.", warn=False
            )  # fmt: skip
        for reason in sorted(set(self.sites.refused.values())):
            names = [name for name, why in self.sites.refused.items() if why == reason]
            self._say(f"{len(names)} attention modules ({names[0]}, ...) stay dense: {reason}")

    # --- attach, start, release -------------------------------------------------------------------

    def begin_run(self) -> None:
        """Start clean; what an earlier run has left is written down first."""
        self.flush()
        self.states, self.paddings, self.aimed = {}, {}, None
        self.run = self.gate.session.clock.run
        self.off = not self.sites.all

    def flush(self) -> None:
        """Write what was decided into the trace. Reads numbers from the device, so only when a run is over."""
        record(self.gate.session.trace, self.run, self.states.values())

    def left_out(self, index: int) -> Tensor | None:
        """Mean share of the softmax mass that this step's calls did not read (0-d, on the device, dense calls read all);
        None where nobody knows, or no call was made."""
        facts = [fact for held in self.states.values() for fact in held.state.facts if fact.step == index]
        sparse = [fact.rho for fact in facts if fact.rho is not None]
        if not facts or not self.policy.tells_recall:
            return None
        if not sparse:
            return torch.zeros(())
        return (1 - torch.stack([rho.detach().float().reshape(()) for rho in sparse])).clamp_min(0).sum() / len(facts)

    def aim(self, recall: float) -> None:
        """The account of the run can afford that this share of the mass is read, at every site alike."""
        self.aimed = recall
        for held in self.states.values():
            held.state.aim(recall)

    def forget(self) -> None:
        """Drop all tensors, and stay dense for the rest of this run."""
        self.flush()
        self.states, self.off = {}, True

    def release(self) -> None:
        """Put the network back as it was."""
        self.forget()
        self.sites.detach()
        for inner in self.gate.below():
            inner.above.remove(self)

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return sum(held.state.num_bytes() for held in self.states.values())

    # --- one evaluation ---------------------------------------------------------------------------

    def prepare(self, call: Call) -> None:
        """Look at the first call of each kind, before anything else sees it."""
        kind = _kind(call)
        if kind not in self.learned and self.sites.all:
            accord = Accord(self.gate.agree, _device(call))
            self.learned[kind] = self._agreed(self._learn(call, accord), accord)

    def evaluate(self, call: Call, forward: Callable[[], Any], *, ours: bool = False) -> Any:
        """Run `forward`, which evaluates `call`, with its attention decided here. ours: the host has not asked for it, so
        nothing is decided anew: what was sparse at this step is sparse again, all else is dense."""
        step = self.gate.session.step
        learned = {} if step is None else self.learned.get(_kind(call), {})
        wanted = {number for (number, _), each in learned.items() if each.q is not None}
        if step is None or not wanted:
            return forward()
        with self.sites.walking(Following(self, step, learned, wanted, ours)):
            return forward()

    def repeating(self) -> AbstractContextManager[None]:
        """While open, the evaluation in progress is repeated by a session inside this one."""
        now = self.sites.walks.now
        return self.sites.walking(replace(now, ours=True, visits={})) if isinstance(now, Following) else nullcontext()

    def _learn(self, call: Call, accord: Accord) -> dict[Key, Learned]:
        """The first call of a kind: evaluate it once more on marked latents. The result is thrown away."""

        if hook := _remembers(self.gate.model):
            self._say(f"attention stays dense: a {hook} is hooked onto it, which would keep what it is shown to learn from")
            return {}

        def evaluate(marked: Call, walk: Any) -> None:
            with self.sites.walking(walk, everywhere=True):
                self.gate.bare(marked)

        try:
            found, elsewhere = learn(twin(call), evaluate, *latents_of(self.gate.model), agreed=accord.anywhere)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a network says to NaN is a reason to leave it alone
            self._say(f"attention stays dense, because its tokens cannot be told apart ({type(error).__name__}: {error})")
            return {}
        self.gate.session.note(
            f"{self.gate.site}: one extra evaluation was spent on finding out which of its tokens are text.", warn=False
        )
        if elsewhere:
            self._say(f"{elsewhere} attention calls outside of processors stay dense")
        self._tell(found)
        return declines(found, self.policy, self.gate.model, self._say)

    def _agreed(self, found: dict[Key, Learned], accord: Accord) -> dict[Key, Learned]:
        """`found` without the sites that some rank leaves dense: dense ones exchange tokens in another way."""
        mine = [False] * len(self.sites.all)
        for (number, _), each in found.items():
            mine[number] |= each.q is not None
        kept = accord.everywhere(mine)
        if kept == mine:
            return found
        self._say(f"{sum(mine) - sum(kept)} attention modules stay dense, because another rank leaves them so")
        return {key: each for key, each in found.items() if kept[key[0]]}

    def _tell(self, found: dict[Key, Learned]) -> None:
        """Say which calls stay dense, and why; cross-attention and attention within the prompt go without saying."""
        reasons = Counter(each.reason for each in found.values() if each.reason not in ("", TEXT_ONLY, CROSS))
        for reason, number in reasons.items():
            name = next(each.name for each in found.values() if each.reason == reason)
            self._say(f"{number} attention calls ({name}, ...) stay dense: {reason}")
        if not any(each.q is not None for each in found.values()) and not reasons:
            self._say("attention stays dense: no attention among its video tokens was found")

    def _say(self, sentence: str) -> None:
        self.gate.session.note(f"{self.gate.site}: {sentence}.")

    def doubt(self, name: str, reason: str) -> None:
        """A call stays dense; each reason is said once."""
        if reason not in self.doubts:
            self.doubts.add(reason)
            self._say(f"attention of {name} (and perhaps others) stays dense where {reason}")

    def refuse(self, name: str, reason: str) -> None:
        """A site stays dense for the rest of the session; each reason is said once."""
        if reason not in self.refused.values():
            self._say(f"attention of {name} (and perhaps others) stays dense: {reason}")
        self.refused[name] = reason


@dataclass(slots=True)
class Following:
    """A walk that follows the host's loop. wanted: numbers of the sites that may be sparse. ours: see `evaluate`. visits:
    calls of each site so far."""

    seam: AttentionSeam
    step: Step
    learned: dict[Key, Learned]
    wanted: set[int]
    ours: bool
    visits: dict[int, int] = field(default_factory=dict)

    def wants(self, site: Site) -> bool:
        """Those that may be sparse in calls of this kind."""
        return site.number in self.wanted

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        """o [B, Hq, Sq, Dv]: sparse where everything about this call is known, else the host's own."""
        visit = self.visits[site.number] = self.visits.get(site.number, -1) + 1
        dense = partial(site.dense, q, k, v, **named)
        about = self.learned.get((site.number, visit))
        if about is None or about.q is None or about.k is None or site.name in self.seam.refused:
            return dense()
        if self.seam.off:  # of this rank, perhaps: the others go on, and tokens are exchanged as before
            return dense()
        reason = unfit(about, q, k, named)
        if reason:
            self.seam.doubt(site.name, reason)
            return dense()
        tokens = self._tokens(about, (site.number, visit), q, k, named.get("attn_mask"))
        if isinstance(tokens, str):
            self.seam.refuse(site.name, tokens)
            return dense()
        return self._decided(site, about, visit, (q, k, v), tokens, named, dense)

    def _decided(
        self, site: Site, about: Learned, visit: int, qkv: tuple[Tensor, Tensor, Tensor], tokens: tuple[Tokens, Tokens],
        named: dict[str, Any], dense: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        """Ask the policy's state; whatever goes wrong there ends in dense attention, and is said."""
        q, k, v = qkv
        state = self._state(site, visit, about, q, k)
        before = len(state.facts)
        if self.ours and not any(fact.step == self.step.index and fact.branch == self.step.branch for fact in state.facts[-4:]):
            return dense()
        scale = named.get("scale")
        mask = Mask(left=None, right=0) if named.get("is_causal") else None
        try:
            found = state.attend(
                q, k, v, self.step, *tokens, q.shape[-1] ** -0.5 if scale is None else scale, dense, mask
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a method that fails must not end the user's run
            known = isinstance(error, HastenError)
            self.seam.refuse(site.name, str(error).rstrip(".") if known else f"it failed ({type(error).__name__}: {error})")
            return dense()
        if self.ours:
            del state.facts[before:]
        return found

    def _state(self, site: Site, visit: int, about: Learned, q: Tensor, k: Tensor) -> SparseState:
        branch = None if self.seam.policy.share_branches else self.step.branch
        place = (branch, site.number, visit, q.shape, k.shape)
        if place not in self.seam.states:
            state = self.seam.policy.start(about.layer)
            if self.seam.aimed is not None:
                state.aim(self.seam.aimed)
            self.seam.states[place] = Held(f"{self.seam.gate.site}.{site.name}", q.shape[2], state)
        return self.seam.states[place].state

    def _tokens(
        self, about: Learned, key: Key, q: Tensor, k: Tensor, mask: Tensor | None
    ) -> tuple[Tokens, Tokens] | str:
        """Tokens of both sides, with the padding that the mask hides; or why the mask is more than that."""
        assert about.q is not None and about.k is not None
        if mask is None:
            return about.q, about.k
        shapes = q.shape, k.shape
        place = (key, self.step.branch, *shapes, mask.shape, mask.dtype)
        if place not in self.seam.paddings:
            self.seam.paddings[place] = understand(mask, shapes, about.k)
        padding = self.seam.paddings[place]
        if padding.reason or not padding.segments:
            return padding.reason or (about.q, about.k)
        keys = with_padding(about.k, padding, readable_keys(mask, shapes))
        return (keys if about.q == about.k else about.q), keys


def unfit(about: Learned, q: Tensor, k: Tensor, named: dict[str, Any]) -> str:
    """Why this call cannot be sparse although its kind can; empty when it can."""
    if q.dim() != 4 or (q.shape[2], k.shape[2]) != (about.shapes[0][2], about.shapes[1][2]):
        return "it has another number of tokens than when it was looked at"
    if named.get("dropout_p"):
        return "it drops scores at random"
    grouped = bool(named.get("enable_gqa")) and q.shape[1] % k.shape[1] == 0
    if q.shape[0] != k.shape[0] or (q.shape[1] != k.shape[1] and not grouped):
        return "queries and keys differ in their batch or heads"
    if named.get("is_causal") and q.shape[2] != k.shape[2]:
        return "it is causal over keys that are not its queries"
    return ""


def _device(call: Call) -> torch.device:
    """Where the latents are."""
    found = call.get(call.layout.sample)
    first = found[0] if isinstance(found, list | tuple) and found else found
    return first.device if isinstance(first, Tensor) else torch.device("cpu")


def latents_of(model: nn.Module) -> tuple[set[int], int]:
    """How many channels the latents may have, and how many positions make a token, by the network's configuration."""
    config = dict(getattr(model, "config", {}))
    channels = {config[name] for name in CHANNELS if isinstance(config.get(name), int)}
    found: Any = config.get("patch_size")
    sides = [found] * 2 if isinstance(found, int) else list(found or [])
    known = sides and all(isinstance(side, int) and side > 0 for side in sides)
    return channels, math.prod(sides) if known else PATCH


def _remembers(model: nn.Module) -> str:
    """Name of one of diffusers' hooks that keep tensors for the next evaluation (its caches); "" where there is none."""
    registries = [registry for module in model.modules() if (registry := getattr(module, "_diffusers_hook", None))]
    hooks = [hook for registry in registries for hook in getattr(registry, "hooks", {}).values()]
    return next((type(hook).__name__ for hook in hooks if getattr(hook, "_is_stateful", False)), "")


def _kind(call: Call) -> Hashable:
    """Calls of one kind have the same tokens: the shapes of all tensors but for the batch, and all flags."""
    sample = call.get(call.layout.sample)
    batch = sample.shape[0] if isinstance(sample, Tensor) else len(sample) if isinstance(sample, list) else 0
    told = {name: value for name, value in call.arguments().items() if name != call.layout.timestep}
    shapes = tuple((name, _shape(value, batch)) for name, value in sorted(told.items()))
    return shapes, kind_of(call)


def _shape(value: Any, batch: int) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() and value.shape[0] == batch else tuple(value.shape)
    if isinstance(value, list | tuple):
        return tuple(_shape(inner, batch) for inner in value)
    if isinstance(value, dict):
        return tuple((name, _shape(inner, batch)) for name, inner in sorted(value.items()))
    return value if isinstance(value, int | str | bool) else None
