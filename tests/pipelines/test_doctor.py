"""Each check of `hasten doctor`: right on a sound hasten, red when the very promise is broken on purpose."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from torch import nn

from hasten import clock
from hasten.caching.network import BranchHistory, NetworkReuse, NetworkState
from hasten.caching.stack import StackReuse
from hasten.errors import ModelError
from hasten.pipelines.doctor import conformance as doctor
from hasten.pipelines.doctor import network, promises, runs, weights
from hasten.pipelines.doctor.backends import Check
from hasten.pipelines.doctor.model import REMEMBERING, STEPS, Model
from hasten.pipelines.seams.denoiser_gate import SEAMS, DenoiserGate
from hasten.pipelines.seams.network import NetworkSeam
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.pipelines.session import Session
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)

CALLS = {small_wan: WAN_CALL, small_pixart: PIXART_CALL, small_flux: FLUX_CALL, small_unet: UNET_CALL}
Body = Callable[[Model], str]


def call_of(build: Callable[[], Any]) -> dict[str, Any]:
    return {key: value for key, value in CALLS[build].items() if key != "num_inference_steps"}


def model_of(build: Callable[[], Any] = small_wan) -> Model:
    return Model(build(), call_of(build))


def tried(body: Body, model: Model | None = None) -> Check:
    """One check on a model (a small Wan where none is given)."""
    model = model or model_of()
    return model.attempt("tried", lambda: body(model))


def small_vace() -> WanVACEPipeline:
    """Wan with VACE: a second list of blocks adds hints between those of the first."""
    wan = small_wan()
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=48, num_layers=4, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    assert isinstance(wan.vae, AutoencoderKLWan)
    pipe = WanVACEPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder,
        vae=wan.vae,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS[small_vace] = WAN_CALL


# --- the whole suite ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [small_wan, small_pixart, small_flux, small_unet, small_vace])
@pytest.mark.long
def test_suite_on_sound_pipelines(build: Callable[[], Any]) -> None:
    found = {check.name: check for check in doctor.conformance(build(), quick=True, call=call_of(build))}
    assert {name: check.detail for name, check in found.items() if check.status == "failed"} == {}
    assert all(check.detail for check in found.values()), "every finding says what was seen, or why nothing was"
    refused = build is small_unet
    assert found["structure"].status == found["skipping on equal input"].status == ("refused" if refused else "ok")
    for name in ("branch isolation", "1, 2, 3 and 4 branches", "branches come and go", "another size"):
        assert found[name].status == "ok", found[name]
    for name in ("second thread", "shared network", "group offload", "unchanged after all checks"):
        assert found[name].status == "ok", found[name]
    expected = {
        "injected tensors": {small_vace},
        "interrupt, then restart": {small_wan, small_flux, small_unet, small_vace},
        "guidance off in mid-run": {small_wan, small_unet, small_vace},
        "Heun": {small_wan, small_pixart, small_unet, small_vace},
        "LoRA loaded, swapped, removed": {small_wan, small_flux, small_unet, small_vace},
    }
    for name, able in expected.items():
        assert found[name].status == ("ok" if build in able else "inapplicable"), found[name]
    assert "add --compile" in found["torch.compile of its blocks"].detail


def test_pipelines_that_cannot_be_tried() -> None:
    with pytest.raises(ModelError, match="takes no prompt"):
        next(doctor.conformance(type("NoPrompt", (), {"__call__": lambda self: None})()))


def test_recipe_that_does_nothing_says_so() -> None:
    model = model_of()
    never = promises.never_skipping()["whole network"]
    assert "reuse skipped nothing" in promises.method(model, "never", never).detail
    assert "skipped nothing" not in promises.method(model, "other", REMEMBERING["blocks"]).detail


def test_seam_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.delitem(SEAMS, StackReuse)
    found = promises.method(model, "unknown", REMEMBERING["blocks"])
    assert found.status == "failed" and "KeyError" in found.detail and "left on the model" not in found.detail


# --- seeded defects: branches ---------------------------------------------------------------------


def all_one_branch(self: Any, *args: Any) -> tuple[int, bool]:
    return 0, True


def by_order(self: Any, *args: Any) -> tuple[int, bool]:
    self.called.append(None)
    return len(self.called) - 1, True


@pytest.mark.parametrize("body", [network.isolated, network.counted, network.toggled])
def test_branches_that_are_mixed_up(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock._Branches, "enter", all_one_branch)
    found = tried(body)
    assert found.status == "failed"
    assert "branch 1" in found.detail or "branch 0" in found.detail


def test_branches_known_by_their_order_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(clock._Branches, "enter", by_order)
    assert tried(network.isolated, model).status == "ok"
    assert tried(network.toggled, model).status == "failed"


def test_injections_that_are_held_with_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(small_vace)
    sound = tried(network.injected, model)
    assert sound.status == "ok" and "control_hidden_states" in sound.detail

    def whole(gate: DenoiserGate, policy: StackReuse) -> NetworkSeam:
        return NetworkSeam(gate, NetworkReuse(rule=policy.rule, forecast=policy.forecast))

    monkeypatch.setitem(SEAMS, StackReuse, whole)
    found = tried(network.injected, model)
    assert (found.status, "nobody was told" in found.detail) == ("failed", True)


# --- seeded defects: runs -------------------------------------------------------------------------


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that take what an earlier run has left."""
    begin = DenoiserGate.begin_run

    def once(self: Any) -> None:
        if not vars(self).setdefault("begun_before", False):
            begin(self)
        self.begun_before = True

    monkeypatch.setattr(DenoiserGate, "begin_run", once)
    monkeypatch.setattr(DenoiserGate, "forget", lambda self: None)


@pytest.mark.parametrize("body", [runs.interrupted, runs.unguided, promises.exception])
def test_runs_that_use_what_another_has_left(body: Body, stale: None) -> None:
    found = tried(body)
    assert (found.status, "not bit-identical" in found.detail) == ("failed", True), found


def test_another_size_that_uses_what_another_has_left(stale: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BranchHistory, "fits", lambda self, x: True)
    assert tried(runs.resized).status == "failed"


def test_evaluations_of_heun_that_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = clock.solver_times
    monkeypatch.setattr(clock, "solver_times", lambda scheduler: times(scheduler)[:STEPS])
    found = tried(runs.heun)
    assert (found.status, "evaluations were followed" in found.detail) == ("failed", True), found


def test_second_thread_that_is_taken_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = clock.Clock.enter

    def anybody(self: clock.Clock, *args: Any, **kwargs: Any) -> Any:
        self._thread = threading.get_ident()
        return enter(self, *args, **kwargs)

    monkeypatch.setattr(clock.Clock, "enter", anybody)
    monkeypatch.setattr(clock.Clock, "_ours", lambda self, timestep: True)
    monkeypatch.setattr(clock._Branches, "enter", all_one_branch)
    found = tried(runs.second_thread)
    assert (found.status, "other thread's output" in found.detail) == ("failed", True), found


def test_session_that_takes_the_first_run_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = clock.Clock.follow
    monkeypatch.setattr(clock.Clock, "follow", lambda self, scheduler, begun=True: follow(self, scheduler))
    found = tried(runs.shared)
    assert (found.status, "followed the other's run" in found.detail) == ("failed", True), found


# --- seeded defects: weights ----------------------------------------------------------------------


def test_lora_that_does_not_reach_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(self: GateList, blocks: nn.ModuleList, gates: list[Gate]) -> None:
        nn.Module.__init__(self)
        self.gates = gates

    model = model_of()
    monkeypatch.setattr(GateList, "__init__", bare)
    assert tried(weights.lora, model).status == "failed"
    assert not any("lora" in name for name, _ in model.network.named_modules())


@pytest.mark.parametrize("name", weights.OFFLOADS)
def test_offloaded_weights_and_wrong_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()

    def body(model: Model) -> str:
        return weights.offloaded(model, weights.OFFLOADS[name])

    assert tried(body, model).status == "ok"
    answer = NetworkState.answer

    def off(self: Any, *args: Any) -> Any:
        found = answer(self, *args)
        return found and [value * 1.01 for value in found]

    monkeypatch.setattr(NetworkState, "answer", off)
    found = tried(body, model)
    assert (found.status, "off by" in found.detail) == ("failed", True), found


def test_gates_that_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert tried(weights.graphs, model).status == "ok"
    call = Gate.__call__

    def again(self: Gate, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Gate, "__call__", again)
    found = tried(weights.graphs, model)
    assert (found.status, "without hasten" in found.detail) == ("failed", True), found


# --- nothing stays --------------------------------------------------------------------------------


def spoil(model: Model) -> None:
    """Everything that a check could leave behind."""
    network, block = model.network, model.network.blocks[0]  # type: ignore[index]
    network.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    network.register_forward_pre_hook(lambda *args: None)
    network.blocks[1] = nn.Identity()  # type: ignore[operator, index]
    block.attn1 = nn.Identity()  # type: ignore[union-attr]
    network.requires_grad_(not next(network.parameters()).requires_grad)
    model.pipe.scheduler = type(model.pipe.scheduler)()
    vars(model.pipe)["_guidance_scale"] = 1.0


def test_sessions_that_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(Session, "close", lambda self: None)
    found = tried(promises.restored, model)
    assert found.status == "failed" and "left behind" in found.detail and "left on the model" in found.detail
    assert model.snapshot.differences() == []
    assert tried(doctor.unchanged, model).status == "ok"


@pytest.mark.parametrize("crash", [False, True])
def test_whatever_a_check_leaves_is_taken_off_and_told(crash: bool) -> None:
    model = model_of()

    def body(model: Model) -> str:
        spoil(model)
        if crash:
            raise OSError("crashed")
        return "fine"

    found = tried(body, model)
    assert found.status == "failed" and "left on the model (now removed)" in found.detail
    assert ("crashed" in found.detail) == crash
    assert model.snapshot.differences() == []
    assert tried(doctor.unchanged, model).status == "ok"


def test_changed_weights_are_found_at_the_end() -> None:
    model = model_of()
    assert tried(doctor.unchanged, model).status == "ok"
    with torch.no_grad():
        next(model.network.parameters()).mul_(1.01)
    assert tried(doctor.unchanged, model).status == "failed"


def test_lent_weights_come_back() -> None:
    model = model_of()
    weight = next(model.network.parameters())
    numbers = weight.data
    with warnings.catch_warnings(), model.borrowed() as network:
        network.to(torch.float64)
        assert weight.data is not numbers and weight.dtype == torch.float64
    assert weight.dtype == torch.float32 and weight.data_ptr() == numbers.data_ptr()
