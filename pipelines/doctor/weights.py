"""Weights that change, move or are compiled while a session is open: LoRA, offload, torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.pipelines.doctor.backends import Check, Inapplicable
from hasten.pipelines.doctor.model import ONCE, Model, stood_in, without_hasten
from hasten.pipelines.doctor.network import ALONE, Loop, Ticks, near
from hasten.pipelines.seams.structure import candidates
from hasten.pipelines.session import Session
from hasten.recipe import Recipe

PROJECTIONS = ("to_q", "to_v", "to_qkv", "q_proj", "v_proj", "qkv", "query", "value")
"""What networks call the linear maps that a LoRA is usually put on."""


def checks(model: Model, *, compiled: bool) -> Iterator[Check]:
    """compiled: also torch.compile, which takes longest."""
    yield model.attempt("LoRA loaded, swapped, removed", lambda: lora(model))
    for name, offload in OFFLOADS.items():
        yield model.attempt(name, lambda offload=offload: offloaded(model, offload))  # type: ignore[misc]
    if compiled:
        yield model.attempt("torch.compile of its blocks", lambda: graphs(model))
    else:
        yield Check("torch.compile of its blocks", "inapplicable", "left out because it takes long; add --compile")


def stand(model: Model, ticks: Ticks, session: Session | None, expected: Tensor, what: str) -> None:
    """One run of a loop that stands still: every step gives `expected`, which was computed without a session."""
    before = 0 if session is None else stood_in(session)
    loop = Loop(model)
    loop.run([(0,)] * 3, ticks)
    for (step, _), value in loop.outputs.items():
        near(value, expected, f"{what}, step {step}", exact=False)
    assert session is None or stood_in(session) > before, f"{what}: nothing was skipped"


# --- LoRA -----------------------------------------------------------------------------------------


def lora(model: Model) -> str:
    """Adapters come, are swapped and go between the runs of one session, and every run is of the weights it has."""
    network = model.network
    if not hasattr(network, "add_adapter"):
        raise Inapplicable(f"{type(network).__name__} takes no adapters")
    if getattr(network, "_hf_peft_config_loaded", False):
        raise Inapplicable("adapters are loaded already, which are better left alone")
    names = {name.rpartition(".")[2] for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    targets = sorted(names.intersection(PROJECTIONS))
    if not targets:
        raise Inapplicable(f"no linear map of {model.site} is called {', '.join(PROJECTIONS[:5])}")
    stages: dict[str, Callable[[], None]] = {
        "without LoRA": lambda: None,
        "LoRA loaded": lambda: _add_adapter(network, targets, "one", 1),
        "second LoRA loaded": lambda: _add_adapter(network, targets, "two", 2),
        "LoRA swapped": lambda: network.set_adapter("hasten_one"),  # type: ignore[operator]
        "LoRA removed": lambda: network.unload_lora(),  # type: ignore[operator]
    }
    with model.borrowed():
        expected = _staged(model, stages)
    _assert_told_apart(list(expected.values()))
    for which, recipe in ONCE.items():
        ticks = Ticks()
        with model.borrowed(), model.session(recipe, network, scheduler=ticks) as session:
            for stage, change in stages.items():
                change()
                stand(model, ticks, session, expected[stage], f"{which}, {stage}")
    return f"{len(stages)} stages on {', '.join(targets)}, each run as without hasten"


def _staged(model: Model, stages: dict[str, Callable[[], None]]) -> dict[str, Tensor]:
    expected = {}
    for stage, change in stages.items():
        with without_hasten(f"{stage}: impossible on this network"):
            change()
            expected[stage] = Loop(model).evaluate(0)
    return expected


def _assert_told_apart(outputs: list[Tensor]) -> None:
    """The adapters must change the output, and the last stage must be the first again."""
    if any(torch.equal(a, b) for a, b in itertools.pairwise(outputs)):
        raise Inapplicable("an adapter on its projections does not change what the network returns")
    near(outputs[-1], outputs[0], "LoRA removed, without hasten", exact=True)


def _add_adapter(network: Any, targets: list[str], name: str, seed: int) -> None:
    """A rank-2 adapter with weights that act at once, and the only one that does."""
    from peft import LoraConfig

    full = f"hasten_{name}"
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=full)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in network.named_parameters():
        if f".{full}." in path:
            drawn = torch.randn(parameter.shape, generator=generator) * (0.5 / parameter.shape[-1] ** 0.5)
            parameter.data.copy_(drawn)
    network.set_adapter(full)


# --- offload --------------------------------------------------------------------------------------


def offloaded(model: Model, offload: Callable[[nn.Module, torch.device], None]) -> str:
    """Weights that are fetched when they are needed, in a session: every step right, and right again after it."""
    network = model.network
    device = next(network.parameters()).device
    if any(hasattr(part, "_hf_hook") or _hooks(part) for part in network.modules()):
        raise Inapplicable("the network is offloaded or hooked already, so that all other checks ran with it")
    with without_hasten(ALONE):
        expected = Loop(model).evaluate(0)
    with model.borrowed():
        for part in network.modules():
            vars(part).pop("_diffusers_hook", None)  # empty, and the offload writes into it
        with without_hasten("impossible on this network"):
            offload(network, device)
            plain = Loop(model).evaluate(0)
        near(plain, expected, "offloaded, without hasten", exact=False)
        for which, recipe in ONCE.items():
            ticks = Ticks()
            with model.session(recipe, network, scheduler=ticks) as session:
                stand(model, ticks, session, expected, which)
            stand(model, ticks, None, plain, f"{which}, session closed")
    where = "its hooks; nothing has to move on a CPU" if device.type == "cpu" else f"from the CPU to {device}"
    return f"every step right ({where})"


def _hooks(part: nn.Module) -> bool:
    """Has diffusers put a hook on this module? An empty register of hooks (`cache_context` makes one) is none."""
    return bool(getattr(getattr(part, "_diffusers_hook", None), "hooks", None))


def _group(network: nn.Module, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        network, onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def _model(network: nn.Module, device: torch.device) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(network, execution_device=device)


def _sequential(network: nn.Module, device: torch.device) -> None:
    import accelerate

    accelerate.cpu_offload(network, execution_device=device)


OFFLOADS = {"model offload": _model, "sequential offload": _sequential, "group offload": _group}
"""Name -> what puts it onto a network."""


# --- torch.compile --------------------------------------------------------------------------------


class Counting:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def graphs(model: Model) -> str:
    """Each block compiled as one full graph: the session causes no further graph and breaks none."""
    network = model.network
    parts = [network, *network.modules()]
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise Inapplicable("the network is compiled already, so that all other checks ran with it")
    if not candidates(network):
        raise Inapplicable(f"{model.site} has no list of blocks to compile")
    with without_hasten("its blocks do not compile as full graphs"):
        alone = _counted(model, None, "")
    for which, recipe in ONCE.items():
        found = _counted(model, recipe, which)
        assert found == alone, f"{which}: {found} graphs, {alone} without hasten"
    return f"{alone} graphs, with hasten and without, fullgraph=True"


def _counted(model: Model, recipe: Recipe | None, which: str) -> int:
    """Graphs that a loop of a few steps causes, from nothing."""
    backend, ticks = Counting(), Ticks()
    torch._dynamo.reset()
    with model.borrowed() as network:
        expected = Loop(model).evaluate(0)
        for blocks in candidates(network).values():
            for block in blocks:
                block.compile(backend=backend, fullgraph=True)
        if recipe is None:
            stand(model, ticks, None, expected, "compiled, without hasten")
        else:
            with model.session(recipe, network, scheduler=ticks) as session:
                stand(model, ticks, session, expected, which)
    return backend.graphs
