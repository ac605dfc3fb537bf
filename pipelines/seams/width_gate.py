"""Width gates: a module that can be cut is shadowed in its parent's `__dict__` by a proxy that may run a narrow twin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hasten.agree import Mean, alone
from hasten.caching.histories import Key, key_of
from hasten.caching.width import WidthState, kept, ranked
from hasten.pipelines.host import Output
from hasten.pipelines.seams.module_gate import ModuleProxy, find_sites
from hasten.pipelines.seams.proof import loss_of_repeat
from hasten.pipelines.seams.structure import candidates
from hasten.pipelines.seams.width_twin import Narrowing, narrowing_of
from hasten.pipelines.work import Flops
from hasten.session import Attachment
from hasten.step import Step

Order = Literal["norm", "measured", "stored"]


@dataclass(slots=True)
class WidthSite:
    """One module that may run narrow.

    name: dotted; owner, attribute: where its parent keeps it; block: its number through all block lists. cut: how it is
    cut. order: its units, the most important first. flops: of one call in full. width: of the tokens, where they were seen
    to be treated one by one; 0 otherwise. reason: why it is not cut, "" where it is.
    """

    name: str
    owner: nn.Module
    attribute: str
    module: nn.Module
    block: int
    cut: Narrowing
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    flops: int = 0
    calls: int = 0
    width: int = 0
    reason: str = ""

    def narrow(self, count: int) -> nn.Module:
        """The module with its `count` most important units."""
        return self.cut.twin(self.module, self.order[:count].sort().values)

    def rest(self, count: int) -> nn.Module:
        """The module with all other units; `narrow` adds the bias of the outputs."""
        return self.cut.twin(self.module, self.order[count:].sort().values, bias=False)


class Visitor(Protocol):
    """Decides over every call of a gated module during one evaluation."""

    def module(self, site: WidthSite, full: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`site` is called; `full` runs it as it is. Returns what stands for its output."""


class WidthGates:
    """All width gates of one network. sites: what may be cut; refused: dotted name -> why it may not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        lists = candidates(model)
        self.num_blocks = sum(len(blocks) for blocks in lists.values())
        self.sites: list[WidthSite] = []
        self.refused: dict[str, str] = {}
        self.flops = 0
        self._attachment = Attachment()
        self._active = threading.local()
        for found in find_sites(model):
            block = _block_of(found.name, lists)
            cut = narrowing_of(found.module, attention=found.family != "feed_forward")
            reason = found.reason or ("lies outside the lists of blocks" if block is None else "")
            if reason or isinstance(cut, str):
                self.refused[found.name] = reason or str(cut)
            elif block is not None:
                self.sites.append(WidthSite(found.name, found.owner, found.attribute, found.module, block, cut))
        self._attach()

    def run(self, forward: Callable[[], Any], visitor: Visitor) -> Any:
        """Run `forward`, every call of a gated module being handed to `visitor`."""
        self._active.visitor = visitor
        try:
            return forward()
        finally:
            self._active.visitor = None

    def learn(self, forward: Callable[[], Any], order: Order, agree: Mean = alone, tokens: bool = False) -> bool:
        """Watch one evaluation: what each module costs, which of its units matter, and that cutting it is right.

        Afterwards only the modules that can be cut are gated. False when something was not finite, which teaches
        nothing; then another evaluation has to be watched. agree: makes importance one on all ranks that share a sample.
        tokens: also find out which modules treat every token by itself.
        """
        with Flops() as counter:
            teacher = Teacher(counter, order, agree, tokens)
            self.run(forward, teacher)
            self.flops = counter.total - teacher.extra
        if teacher.blinded:
            for site in self.sites:
                site.calls, site.reason = 0, ""
            return False
        for site in self.sites:
            site.reason = site.reason or ("" if site.calls else "is not called by its parent")
        self.detach()
        self.refused |= {site.name: site.reason for site in self.sites if site.reason}
        self.sites = [site for site in self.sites if not site.reason]
        self._attachment = Attachment()
        self._attach()
        return True

    def detach(self) -> None:
        """Give all parents their own modules back."""
        self._attachment.restore()

    def _attach(self) -> None:
        for site in self.sites:
            # What stands there now: the module, or the gate of another session on this network.
            full = getattr(site.owner, site.attribute)
            proxy = ModuleProxy(site.module, partial(self._call, site, full))
            self._attachment.replace(site.owner, site.attribute, proxy)

    def _call(self, site: WidthSite, full: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        visitor: Visitor | None = getattr(self._active, "visitor", None)
        return full(*args, **kwargs) if visitor is None else visitor.module(site, full, args, kwargs)


class Teacher:
    """The evaluation that teaches: every module runs in full, and is tried with half of its units.

    Right is: the twin gives what the whole module gives when the other units pass nothing on. A norm across all units,
    or a gate that lies elsewhere than thought, is found out here. extra: floating point operations spent on trying.
    blinded: whether a module returned something that is not finite.
    """

    def __init__(self, counter: Flops, order: Order, agree: Mean, tokens: bool = False) -> None:
        self.counter, self.order, self.agree, self.extra, self.blinded = counter, order, agree, 0, False
        self.tokens = tokens

    def module(self, site: WidthSite, full: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site.calls += 1
        if site.calls > 1:
            site.reason = "runs more than once per evaluation"
            return full(*args, **kwargs)
        before = self.counter.total
        seen: dict[str, Tensor] = {}
        hooks = [] if self.order != "measured" else [_listen(site, name, seen) for name in site.cut.outs]
        try:
            value = full(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        site.flops = self.counter.total - before
        self._try(site, args, kwargs, seen)
        self.extra += self.counter.total - before - site.flops
        return value

    def _try(self, site: WidthSite, args: tuple[Any, ...], kwargs: dict[str, Any], seen: dict[str, Tensor]) -> None:
        cut, module = site.cut, site.module
        measured = seen if self.order == "measured" else None
        importance = self.agree(cut.importance(module, measured))
        site.order = torch.arange(cut.num, device=importance.device) if self.order == "stored" else ranked(importance)
        half = site.order[: kept(0.5, cut.num)].sort().values
        wanted = cut.masked(module, half)(*args, **kwargs)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in Output(wanted).tensors):
            self.blinded = True
            return
        site.reason = loss_of_repeat(wanted, lambda: cut.twin(module, half)(*args, **kwargs))
        if self.tokens and not cut.heads and not site.reason:
            site.width = _token_width(module, args, kwargs)


class WidthWalk:
    """One evaluation of a network at the widths that its policy gives. saved: floating point operations not spent."""

    def __init__(self, gates: WidthGates, step: Step, state: WidthState, key: Key) -> None:
        self.gates, self.step, self.state, self.key = gates, step, state, key
        self.saved = 0.0
        self._names: set[str] = set()

    @property
    def share(self) -> float:
        """Work that was done, of what the network's evaluation in full costs."""
        return 1.0 - self.saved / max(1, self.gates.flops)

    def module(self, site: WidthSite, full: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shares = self.state.shares(self.step, site.block, self.gates.num_blocks)
        count = kept(shares.heads if site.cut.heads else shares.channels, site.cut.num)
        again = site.name in self._names
        self._names.add(site.name)
        if count == site.cut.num or again or site.cut.wrapped(site.module):
            return full(*args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        key = (*self.key, *(() if x is None else key_of(x)), count)
        rests = None if self.state.full else self.state.rests_of(self.step, site.name, key)
        if rests is None and self.state.holds:
            # In two parts, which cost as much as the whole and say what the rest adds.
            rests = Output(site.rest(count)(*args, **kwargs)).tensors
            self.state.learn(self.step, site.name, key, rests)
        else:
            self.saved += site.flops * (1 - count / site.cut.num)
        output = Output(site.narrow(count)(*args, **kwargs))
        return output.rebuild(output.tensors if rests is None else [y + r for y, r in zip(output.tensors, rests, strict=True)])


def _block_of(name: str, lists: dict[str, list[nn.Module]]) -> int | None:
    """The number of the block in which the module with this dotted name lies; None outside of all lists."""
    offset = 0
    for attribute, blocks in lists.items():
        head, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if head == attribute and number.isdigit():
            return offset + int(number)
        offset += len(blocks)
    return None


def _listen(site: WidthSite, name: str, seen: dict[str, Tensor]) -> Any:
    """A hook that notes the mean square of what an output projection is given."""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name] = args[0].float().square().flatten(0, -2).mean(dim=0)

    return site.module.get_submodule(name).register_forward_pre_hook(note)


def _token_width(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """D of the tokens [B, N, D] that are all a module is given, if half of them alone give what they give among all; 0
    where they do not."""
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].ndim != 3:
        return 0
    x = given[0]
    whole = module(x)
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        return 0
    return x.shape[2] if not loss_of_repeat(whole[:, 1::2], lambda: module(x[:, 1::2])) else 0
