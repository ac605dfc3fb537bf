"""The attention seam on real pipelines: reached per instance and thread, composed with the rest, restored exactly, and honest."""

from __future__ import annotations

import copy
import functools
import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models import attention_dispatch
from torch import Tensor, nn

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.forecast import Hold
from hasten.limits import Limits
from hasten.pipelines.accelerate import Session
from hasten.pipelines.attention_seam import AttentionSeam
from hasten.recipe import Recipe
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.scorers.pooled import Pooled
from hasten.sparse_attn.selectors.top import All
from tests.conformance.loop import Loop, assert_same, solver, turn
from tests.conformance.small import Inputs, Small, every
from tests.hosts import FLUX_CALL, UNET_CALL, WAN_CALL, flux_arguments, small_flux, small_unet, small_wan
from tests.pipelines.attention_recipes import FULL, PART, STOOD_FOR, changed
from tests.pipelines.seam_contract import loop, state_of

pytestmark = pytest.mark.filterwarnings("ignore:hasten")
SITES = [f"transformer.blocks.{number}.attn1" for number in range(2)]


@pytest.fixture(scope="module")
def wan() -> WanPipeline:
    return small_wan(layers=2)


@pytest.fixture(scope="module")
def plain(wan: WanPipeline) -> Tensor:
    return generate(wan)


def generate(pipe: Any, *, seed: int = 0, **changes: Any) -> Tensor:
    call = {**WAN_CALL, "num_inference_steps": 4, "output_type": "latent", "return_dict": False} | changes
    return pipe("a seven", generator=torch.Generator().manual_seed(seed), **call)[0]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def seam_of(session: Session) -> AttentionSeam:
    seam = session.gates[0].attention
    assert seam is not None
    return seam


# --- what is computed -------------------------------------------------------------------------------


def test_everything_read_is_dense_attention(wan: WanPipeline, plain: Tensor) -> None:
    before = state_of(wan.transformer)
    with hasten.accelerate(wan, FULL) as session:
        found = generate(wan)
    assert off(found, plain) < 1e-5
    assert [call.site for call in session.trace.attention] == SITES * 2 * 4, "both branches of four steps"
    assert [(call.step, call.branch) for call in session.trace.attention[:8:2]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert state_of(wan.transformer) == before and torch.equal(generate(wan), plain)


def test_runs_of_a_session_start_clean(wan: WanPipeline, plain: Tensor) -> None:
    """Nothing that one run has selected serves the next, although selections last for four steps."""
    recipe = changed(STOOD_FOR, refresh=4)
    with hasten.accelerate(wan, recipe) as session:
        first, other, again = generate(wan), generate(wan, seed=1), generate(wan)
    with hasten.accelerate(wan, recipe):
        assert torch.equal(generate(wan, seed=1), other)
    assert torch.equal(first, again) and off(first, plain) > 1e-4
    runs = [[(c.step, c.branch, c.density, c.recall) for c in session.trace.attended(number)] for number in (0, 2)]
    assert runs[0] == runs[1] and all(0 < recall <= 1 for *_, recall in runs[0])  # type: ignore[operator]


def test_another_resolution_is_learned_anew(wan: WanPipeline) -> None:
    expected = generate(wan, height=48)
    with hasten.accelerate(wan, FULL) as session:
        generate(wan)
        assert off(generate(wan, height=48), expected) < 1e-5
    assert {call.tokens for call in session.trace.attention} == {8, 12}
    assert sum("one extra evaluation" in note for note in session.trace.notes) == 1


def test_first_steps_are_the_hosts_own_attention(wan: WanPipeline, plain: Tensor) -> None:
    with hasten.accelerate(wan, changed(PART, warm=1.0)) as session:
        assert torch.equal(generate(wan), plain)
    assert {call.action for call in session.trace.attention} == {"dense"}


def test_selections_are_reused_and_shared(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, changed(PART, refresh=2, share_branches=True)) as session:
        generate(wan)
    reused = [(call.step, call.branch) for call in session.trace.attention if call.reused and call.layer == 0]
    assert reused == [(0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1)]


@pytest.fixture
def backends() -> Iterator[Any]:
    """diffusers' registry of backends, whose active one models change when they are given one of their own."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield registry
    registry._active_backend = active


@pytest.mark.parametrize("everywhere", [False, True])
def test_dense_steps_run_on_the_users_backend(
    wan: WanPipeline, plain: Tensor, backends: Any, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    math, calls = attention_dispatch.AttentionBackendName._NATIVE_MATH, []
    monkeypatch.setitem(backends._backends, math, _counted(backends._backends[math], calls))
    if everywhere:
        backends.set_active_backend(math)
    else:
        wan.transformer.set_attention_backend(math.value)
    expected, alone = generate(wan), len(calls)
    with hasten.accelerate(wan, changed(FULL, warm=0.5)):
        found = generate(wan)
    half = len(calls) - alone
    with hasten.accelerate(wan, changed(FULL, warm=1.0)):
        assert torch.equal(generate(wan), expected)
    wan.transformer.reset_attention_backend()
    assert off(found, expected) < 1e-5
    assert alone == 32 and half == 16 + 8 and len(calls) == 32 + 24 + 32, "cross-attention is always the user's"


def _counted(function: Any, calls: list[int]) -> Any:
    @functools.wraps(function)
    def call(**named: Any) -> Any:
        calls.append(1)
        return function(**named)

    return call


def test_a_backend_chosen_meanwhile_stays_chosen(wan: WanPipeline, plain: Tensor, backends: Any) -> None:
    processor = wan.transformer.blocks[0].attn1.processor
    with hasten.accelerate(wan, changed(PART, warm=1.0)):
        assert isinstance(wan.transformer.blocks[0].attn1.processor, type(processor))
        wan.transformer.set_attention_backend("_native_math")
        math = generate(wan)
    assert processor._attention_backend == "_native_math" and wan.transformer.blocks[0].attn1.processor is processor
    assert torch.equal(generate(wan), math)
    wan.transformer.reset_attention_backend()
    backends.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    assert torch.equal(generate(wan), plain)


# --- whose calls they are ---------------------------------------------------------------------------


def test_another_pipeline_on_the_same_network_is_left_alone(wan: WanPipeline, plain: Tensor) -> None:
    other = WanPipeline(**wan.components)
    other.set_progress_bar_config(disable=True)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(other), plain)
        assert not torch.equal(generate(wan), plain)
    assert len(session.trace.runs) == 1


def test_another_thread_is_left_alone(wan: WanPipeline) -> None:
    call = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]), "encoder_hidden_states": torch.ones(1, 5, 32), "return_dict": False,
    }  # fmt: skip
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(wan.transformer(**call)[0])

    work()
    inside = threading.Event()

    class Meeting(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None:
            if not inside.is_set():
                inside.set()
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

    hook = wan.transformer.blocks[0].attn1.to_q.register_forward_hook(lambda *_: Meeting()())
    with hasten.accelerate(wan, PART):
        generate(wan)
    hook.remove()
    assert len(found) == 2 and torch.equal(*found)


def test_copies_are_plain(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART):
        twin = copy.deepcopy(wan.transformer)
    kinds = {type(module.attn1.processor) for module in twin.blocks}
    assert kinds == {type(wan.transformer.blocks[0].attn1.processor)}
    assert "_hasten" not in str([vars(module) for module in twin.modules()])


def test_a_run_that_breaks_off_leaves_nothing(wan: WanPipeline, plain: Tensor) -> None:
    before = state_of(wan.transformer)

    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 1:
            raise KeyboardInterrupt
        return {}

    with hasten.accelerate(wan, changed(PART, refresh=4)) as session:
        first = generate(wan)
        with pytest.raises(KeyboardInterrupt):
            generate(wan, seed=1, callback_on_step_end=stop)
        assert torch.equal(generate(wan), first)
    assert [len(list(session.trace.attended(number))) for number in range(3)] == [16, 8, 16]
    assert state_of(wan.transformer) == before and torch.equal(generate(wan), plain)


class Weighted(nn.Module):
    """A processor with weights of its own, as IP-Adapter's are."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.inner = [inner]

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.gain * self.inner[0](attn, hidden_states, *args, **kwargs)


def test_processors_that_are_modules_and_such_that_are_functions() -> None:
    pipe = small_wan(layers=3)
    for block in pipe.transformer.blocks[:2]:
        block.attn1.processor = Weighted(block.attn1.processor)
    third = pipe.transformer.blocks[2].attn1
    original = third.processor
    third.processor = lambda attn, *args, **kwargs: original(attn, *args, **kwargs)
    plain, before, weights = generate(pipe), state_of(pipe.transformer), list(pipe.transformer.state_dict())
    with hasten.accelerate(pipe, FULL) as session:
        found = generate(pipe)
        assert list(pipe.transformer.state_dict()) == weights and "blocks.0.attn1.processor.gain" in weights
    assert off(found, plain) < 1e-5
    assert {call.site for call in session.trace.attention} == set(SITES)
    assert any("from which no class can be derived" in note for note in session.trace.notes)
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe), plain)


# --- together with the rest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reuse",
    [
        NetworkReuse(rule=Every(interval=2), forecast=Hold()),
        StackReuse(lead=1, rule=Every(interval=2), forecast=Hold()),
    ],
    ids=["network", "blocks"],
)
def test_with_reuse(wan: WanPipeline, reuse: Any) -> None:
    """Reuse acts as it does alone, and what it computes is sparse."""
    with hasten.accelerate(wan, Recipe(name="alone", reuse=reuse)) as alone:
        expected = generate(wan)
    with hasten.accelerate(wan, Recipe(name="both", reuse=reuse, attention=FULL.attention)) as both:
        found = generate(wan)
    assert off(found, expected) < 1e-4
    assert [(e.step, e.site, e.action) for e in both.trace.events] == [(e.step, e.site, e.action) for e in alone.trace.events]
    assert not any("refused" in note for note in both.trace.notes)
    calls = sorted((call.step, call.layer, call.branch) for call in both.trace.attention)
    left = {(1, 0), (3, 0)} if isinstance(reuse, StackReuse) else set()
    expected_calls = {(0, 0), (0, 1), (2, 0), (2, 1)} | left
    assert calls == sorted((*place, branch) for place in expected_calls for branch in (0, 1)), "proofs are not counted"


def test_blocks_are_proved_on_sparse_attention(wan: WanPipeline) -> None:
    """What is proved to be lossless is compared with an evaluation that reads the same keys."""
    reuse = StackReuse(lead=1, rule=Every(interval=2), forecast=Hold())
    with hasten.accelerate(wan, Recipe(name="both", reuse=reuse, attention=PART.attention)) as session:
        generate(wan)
        one = generate(wan, num_inference_steps=1)
    assert not any("refused" in note for note in session.trace.notes)
    assert any(event.action == "reuse" for event in session.trace.events)
    with hasten.accelerate(wan, Recipe(name="first", reuse=reuse, attention=PART.attention)):
        first = generate(wan, num_inference_steps=1)
    with hasten.accelerate(wan, PART):
        alone = generate(wan, num_inference_steps=1)
    assert off(one, alone) < 1e-5 and off(first, alone) < 1e-5, "what was shown NaN to learn the blocks has selected nothing"


def test_with_guidance_left_out(wan: WanPipeline) -> None:
    recipe = hasten.recipe("guidance-interval") | PART
    with hasten.accelerate(wan, recipe) as session:
        assert bool(torch.isfinite(generate(wan)).all())
    assert any(event.action == "skip" for event in session.trace.events) and session.trace.attention


def test_a_cap_on_bytes_ends_it_for_the_run(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART, limits=Limits(max_cache_bytes=10)) as session:
        generate(wan)
    assert len(session.trace.attention) == 2 and "above the cap" in " ".join(session.trace.notes)


# --- other hosts ------------------------------------------------------------------------------------


def test_joint_attention_of_flux() -> None:
    pipe = small_flux(layers=1, single_layers=2)
    call = {**FLUX_CALL, "num_inference_steps": 2, "output_type": "latent"}
    expected = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    with hasten.accelerate(pipe, FULL) as session:
        found = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    assert off(found, expected) < 1e-5
    learned = list(next(iter(seam_of(session).learned.values())).values())
    assert [(s.queries, s.keys, s.grid) for s in learned[0].q.segments] == [  # type: ignore[union-attr]
        ("dense", "always", None), ("sparse", "select", (1, 16, 16))
    ]  # fmt: skip


def test_unet() -> None:
    """Convolutions mix all pixels, so the grid of a level goes by its number of tokens."""
    pipe = small_unet()
    call = {**UNET_CALL, "num_inference_steps": 2, "output_type": "latent"}
    expected = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    with hasten.accelerate(pipe, FULL) as session:
        found = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    assert off(found, expected) < 1e-5 and any(call.sparse for call in session.trace.attention)
    grids = {each.q.segments[0].grid for kind in seam_of(session).learned.values() for each in kind.values() if each.q}
    assert all(grid is not None and grid[0] == 1 and grid[1] == grid[2] for grid in grids)


class Padded:
    """Conformance inputs with another number of real text tokens in each branch."""

    def __init__(self, inner: Small, name: str) -> None:
        self.inner, self.name = inner, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def inputs(self, seed: int, size: int) -> Inputs:
        found = self.inner.inputs(seed, size)
        length = found["encoder_hidden_states"].shape[1]
        return {**found, self.name: (torch.arange(length) < 1 + seed % 4).long()[None]}

    def call(self, model: nn.Module, x: Tensor, t: float, conditioning: Inputs) -> Any:
        return self.inner.call(model, x, t, conditioning)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("HunyuanVideoTransformer3DModel", "encoder_attention_mask"),
        ("QwenImageTransformer2DModel", "encoder_hidden_states_mask"),
    ],
)
def test_padded_text_is_read_by_nobody(name: str, mask: str) -> None:
    small = Padded(every()[name], mask)
    model, loop = small.made(), Loop(steps=2)
    expected = turn(small, model, loop, solver(small))  # type: ignore[arg-type]
    scheduler = solver(small)  # type: ignore[arg-type]
    with hasten.accelerate(model, FULL, scheduler=scheduler) as session:
        found = turn(small, model, loop, scheduler)  # type: ignore[arg-type]
    assert_same(found, expected, 2e-5)
    assert session.trace.attention and all(call.sparse and call.density < 1 for call in session.trace.attention)
    assert not any("stay" in note for note in session.trace.notes)


# --- what cannot be, and what does not pay --------------------------------------------------------


def test_short_sequences_are_declined_with_one_word(wan: WanPipeline, plain: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught, hasten.accelerate(wan, changed(PART, min_tokens=None)) as session:
        warnings.simplefilter("always")
        assert torch.equal(generate(wan), plain) and torch.equal(generate(wan), plain)
    told = [str(w.message) for w in caught if "few to gain" in str(w.message)]
    assert len(told) == 1 and "8 tokens" in told[0]
    assert "attention part did nothing" in str(session.report())


def test_what_fails_is_dense_and_told(wan: WanPipeline, plain: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("hasten.sparse_attn.policy.pack", fail)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(wan), plain)
    assert sum("out of luck" in note for note in session.trace.notes) == 1


def test_a_layout_that_needs_a_grid_is_refused_without_one() -> None:
    """The positions of these tokens are random numbers, from which no grid can be read."""
    needs = changed(FULL, patterns=(Pattern(layout=Swap(), score=Pooled(), select=All()),))
    model = small_flux(layers=1, single_layers=1).transformer
    calls = [flux_arguments() | {"guidance": torch.tensor([3.5])}]
    with torch.no_grad():
        expected = model(**calls[0])[0]
    outputs, session = loop(model, needs, lambda step: calls, steps=2)
    assert all(torch.equal(output, expected) for (output,) in outputs)
    assert any("grid" in note and "stays dense" in note for note in session.trace.notes)


def test_a_network_that_refuses_nan_stays_dense(wan: WanPipeline, plain: Tensor) -> None:
    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if bool(args[0].isnan().any()):
            raise ValueError("NaN in the latents")

    hook = wan.transformer.patch_embedding.register_forward_pre_hook(check)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(wan), plain)
    hook.remove()
    assert any("NaN in the latents" in note for note in session.trace.notes)


def test_gradients_are_left_alone(wan: WanPipeline) -> None:
    """Training inside an open session is dense and flows."""
    wan.transformer.requires_grad_(True)
    with hasten.accelerate(wan, PART):
        generate(wan)
        x = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
        out = wan.transformer(hidden_states=x, timestep=torch.tensor([500]), encoder_hidden_states=torch.ones(1, 5, 32))[0]
        out.sum().backward()
    wan.transformer.requires_grad_(False)
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


# --- the report -------------------------------------------------------------------------------------


def test_the_report_says_what_was_read(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, changed(STOOD_FOR, warm=0.25)) as session:
        generate(wan)
    report = session.report()
    read = report.attention
    assert read is not None and read.calls == 16 and read.sparse == 12
    assert read.of_sparse is not None and read.of_sparse < read.density < 1
    assert read.recall is not None and read.lowest is not None and 0 < read.lowest <= read.recall <= 1
    text = str(report)
    assert "12 of 16 calls sparse" in text and "of the mass by estimate" in text and "branch 1 transformer" in text
    assert "  #" in text
    data = json.loads(report.to_json())["attention"]
    assert len(data["each"]) == 16 and [row["step"] for row in data["by_step"]] == [0, 1, 2, 3] * 2
    assert {row["site"] for row in data["by_layer"]} == set(SITES)
    page = report.to_html()
    assert page.count("of the pairs") >= 16 and "Share of pairs read" in page


def test_recall_is_unknown_where_nothing_stands_in(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART) as session:
        generate(wan)
    assert all(call.recall is None for call in session.trace.attention)
    assert "is not known" in str(session.report())


def test_a_kind_of_attention_for_language_models_is_refused(wan: WanPipeline) -> None:
    from hasten.recipe import Attention

    class Other(Attention):
        kind = "other-attention-of-a-test"

    with pytest.raises(hasten.errors.UsageError, match="language models"):
        hasten.accelerate(wan, Recipe(name="other", attention=Other()))
