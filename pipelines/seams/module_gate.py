"""Module gates: an attention or feed-forward module is shadowed in its parent's `__dict__` by a proxy that may skip it.

The registered module stays where it is: parameters, `state_dict`, hooks and adapters are untouched.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from hasten.caching.histories import Key, key_of
from hasten.caching.modules import FAMILIES, Family, ModuleState
from hasten.pipelines.host import Output, is_whole_compiled
from hasten.session import Attachment
from hasten.step import Step

QUERIES = frozenset({"to_q", "q_proj", "wq", "q", "query", "query_proj", "linear_q", "q_linear", "to_query"})
KEYS = frozenset({"to_k", "k_proj", "wk", "k", "key", "key_proj", "linear_k", "k_linear", "to_key", "to_kv", "kv", "kv_proj"})
FUSED = frozenset({"to_qkv", "qkv", "qkv_proj", "wqkv", "linear_qkv", "to_qkv_mlp_proj"})
"""What the projections of an attention module are called; their presence is what makes it one."""

TEMPORAL = ("temporal", "temp_", "motion_module", "time_attn")
CROSS = ("cross", "attn2")
"""Parts of names that tell what cannot be seen from the tensors."""


@dataclass(slots=True)
class Site:
    """One module that may be skipped. name: dotted; owner, attribute: where its parent keeps it.

    family: known from the start for feed-forward, after the first evaluation for attention.
    template: its return value without tensors. reason: why it is not skipped, "" where it may be.
    """

    name: str
    owner: nn.Module
    attribute: str
    module: nn.Module
    family: Family
    calls: int = 0
    reason: str = ""
    template: Output | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def saw(self, x: Tensor | None, output: Output) -> None:
        """One call of the first evaluation: can it be made up?"""
        self.calls += 1
        if self.calls > 1:
            self.reason = "runs more than once per evaluation"
        elif x is None:
            self.reason = "takes no tensor first"
        elif not output.plain:
            self.reason = "returns something other than tensors"
        elif self.family == "feed_forward" and [y.shape for y in output.tensors] != [x.shape]:
            self.reason = "changes the shape of what it gets"
        self.template = output.emptied() if not self.reason else None

    def classify(self) -> None:
        """Self-, temporal or cross-attention, from what the projections were given and, failing that, the name."""
        if self.family == "feed_forward":
            return
        q, k = self.inputs.get("q"), self.inputs.get("k")
        other = any(part in self.name for part in CROSS) if q is None or k is None else not _same(q, k)
        temporal = any(part in self.name for part in TEMPORAL)
        self.family = "cross_attention" if other else "temporal_attention" if temporal else "self_attention"
        self.inputs.clear()


class ModuleProxy(nn.Module):
    """What a parent meets in place of its module: calls go to `run`. A module itself, sharing the children, so that code
    that walks dotted names (peft) finds them; everything else is read from and written to the module it stands for."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        vars(self).update(_modules=module._modules, _stands_for=module, _run=run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_run"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_stands_for"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(vars(self)["_stands_for"], memo)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_stands_for" in vars(self):
            setattr(vars(self)["_stands_for"], name, value)
        else:
            super().__setattr__(name, value)


class ModuleGates:
    """All module gates of one network. sites: what may be skipped; of every kind until `learned`."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = list(find_sites(model))
        self.refused: dict[str, str] = {}
        self.learned = False
        self._attachment = Attachment()
        self._active = threading.local()
        self._refuse({site.name: site.reason for site in self.sites if site.reason})
        self._attach()

    def detach(self) -> None:
        """Give all parents their own modules back."""
        self._attachment.restore()

    def run(self, forward: Callable[[], Any], walk: Walk) -> Any:
        """Run `forward` with the gates deciding by `walk`; the first time also learn what they stand for."""
        self._active.walk = walk
        hooks = [] if self.learned else [hook for site in self.sites for hook in _listen(site)]
        try:
            return forward()
        finally:
            self._active.walk = None
            for hook in hooks:
                hook.remove()

    def look_again(self) -> None:
        """The evaluation that has run cannot be repeated; learn from a later one."""
        for site in self.sites:
            site.calls, site.reason = 0, ""

    def learn(self, families: set[Family]) -> None:
        """One evaluation has run: keep gates only on modules of `families` whose output can be made up."""
        for site in self.sites:
            site.classify()
            site.reason = site.reason or ("" if site.calls else "is not called by its parent")
        self.learned = True
        self.detach()
        self._refuse({site.name: site.reason for site in self.sites if site.reason})
        self.counts = {family: sum(site.family == family for site in self.sites) for family in FAMILIES}
        self.sites = [site for site in self.sites if site.family in families]
        self._attachment = Attachment()
        self._attach()

    def compiled(self) -> str:
        """Name of a gated module whose parent has been compiled since; "" when there is none."""
        return next((site.name for site in self.sites if is_whole_compiled(site.owner)), "")

    def _refuse(self, reasons: dict[str, str]) -> None:
        self.refused |= reasons
        self.sites = [site for site in self.sites if site.name not in reasons]

    def _attach(self) -> None:
        for site in self.sites:
            # What stands there now: the module, or the proxy of another session on this network.
            site.module = getattr(site.owner, site.attribute)
            proxy = ModuleProxy(site.module, partial(self._call, site))
            self._attachment.replace(site.owner, site.attribute, proxy)

    def _call(self, site: Site, /, *args: Any, **kwargs: Any) -> Any:
        walk = getattr(self._active, "walk", None)
        return site.module(*args, **kwargs) if walk is None else walk.module(site, args, kwargs)


class Walk:
    """One evaluation of a network with its gates active. skipped: family -> numbers of the modules that were.

    key: of the network's input. Inputs of modules alone would not do: those of a text stream keep their shape when
    the resolution changes.
    """

    def __init__(self, gates: ModuleGates, step: Step, state: ModuleState, key: Key) -> None:
        self.step, self.state, self.key, self.learning = step, state, key, not gates.learned
        self.skipped: dict[Family, list[int]] = {family: [] for family in FAMILIES}
        self._met: dict[Family, int] = dict.fromkeys(FAMILIES, 0)
        self._names: set[str] = set()

    def module(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer or compute one call."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if not self.learning and (site.name in self._names or x is None):
            return site.module(*args, **kwargs)
        number = self._met[site.family]
        self._met[site.family] += 1
        self._names.add(site.name)
        key = () if x is None else (*self.key, *key_of(x))
        if site.template is not None:
            values = self.state.answer(self.step, site.name, site.family, key)
            if values is not None:
                self.skipped[site.family].append(number)
                return site.template.rebuild(values)
        value = site.module(*args, **kwargs)
        output = Output(value)
        if self.learning:
            site.saw(x, output)
        if x is not None and output.tensors:
            self.state.observe(self.step, site.name, key, output.tensors)
        return value


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Attention modules by their projections, and the feed-forward modules beside them in the same parent."""
    attention = {id(module) for module in model.modules() if _is_attention(module)}
    compiled: set[str] = set()
    for path, owner in model.named_modules():
        if path and (is_whole_compiled(owner) or path.rpartition(".")[0] in compiled):
            compiled.add(path)
        has_attention = any(id(child) in attention for child in owner.children())
        if id(owner) in attention or not has_attention:
            continue
        for name, child in owner.named_children():
            beside = not any(id(inner) in attention for inner in child.modules()) and _is_feed_forward(child)
            if id(child) not in attention and not beside:
                continue
            family: Family = "self_attention" if id(child) in attention else "feed_forward"
            site = Site(f"{path}.{name}".lstrip("."), owner, name, child, family)
            if path in compiled:
                site.reason = "lies inside a compiled block"
            elif isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                site.reason = "is kept in a list"
            yield site


def _is_attention(module: nn.Module) -> bool:
    names = set(module._modules)
    return bool(names & FUSED) or bool(names & QUERIES and names & KEYS)


def _is_feed_forward(module: nn.Module) -> bool:
    """At least two projections, and not a list of something; that it keeps the shape is seen when it runs."""
    layers = sum(isinstance(inner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for inner in module.modules())
    return layers >= 2 and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _listen(site: Site) -> Iterator[Any]:
    """Hooks that note what the query and key projections of an attention module are given."""
    if site.family == "feed_forward" or is_whole_compiled(site.module):
        return
    for label, names in (("q", QUERIES | FUSED), ("k", KEYS | FUSED)):
        for name, child in site.module.named_children():
            if name in names:

                def note(module: nn.Module, args: tuple[Any, ...], label: str = label) -> None:
                    if args and isinstance(args[0], Tensor):
                        site.inputs[label] = args[0]

                yield child.register_forward_pre_hook(note)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())
