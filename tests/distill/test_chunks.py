"""Video students that see no later chunk: masks, kept keys and roll-outs agree, gradients end where they should."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hasten
from hasten.caching.frames import FrameStore
from hasten.distill.bench import table
from hasten.distill.data.store import Store
from hasten.distill.export.student import Student
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Batch, Facts, Method
from hasten.distill.methods.causal import Causal
from hasten.distill.methods.self_forcing import Magic141, SelfForcing
from hasten.distill.network.chunks import Chunks, ChunkSteps
from hasten.distill.network.few_steps import sample
from hasten.distill.network.host_call import Condition, HostCall, learn
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Adapter, Role, Roles
from hasten.errors import HastenError, LimitError, ModelError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.host import Layout
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.seams.frames import FrameSeam, View, causal_mask, forced_mask
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.chunk_calls import ChunkCalls, spans
from tests.distill.test_trainer import same, weights
from tests.distill.toys import host as toy_host
from tests.hosts import WAN_CALL, small_wan

SHAPE, TOKENS, CHUNKS = (3, 7, 4, 6), 6, ((0, 3), (3, 6), (6, 7))
CLOSE = 2e-5
"""Of the largest number: another order of float32 operations."""

METHODS: dict[str, Method] = {
    "causal": Causal(calls=2),
    "causal-noisy": Causal(calls=2, first=1, context="noisy", shift=3.0),
    "self-forcing": SelfForcing(calls=2, ratio=1),
    "magic141": Magic141(calls=2, ratio=1, how="ode"),
}


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=8,
        freq_dim=16, ffn_dim=20, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    return made.eval()


def host(seed: int = 0) -> HostCall:
    made = network(seed)
    return HostCall(made, "transformer", Layout.of(made), {"return_dict": False}, Flow(), SHAPE, torch.float32, 1.0, None)


def clip(rows: int = 2, frames: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def told(rows: int = 2) -> Condition:
    return Condition({"encoder_hidden_states": torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(2))})


def chunks(how: Any = "ode", calls: int = 2, chunk: int = 3, first: int = 0) -> Chunks:
    made = host()
    steps = replace(ChunkSteps.even(calls, made.path, how), chunk=chunk, first=first)
    return Chunks(Role("student", made, None, (), False), steps)


def asked(model: Any, x: Tensor, time: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(hidden_states=x, timestep=time, return_dict=False, **told(len(x)).tensors)[0]
    return found


def near(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() <= CLOSE * two.abs().max())


# --- what is seen ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 9))
def test_chunks_are_the_clip_in_order(frames: int, chunk: int, first: int) -> None:
    found = spans(frames, chunk, min(first, frames))
    assert [f for begin, end in found for f in range(begin, end)] == list(range(frames))
    assert all(end - begin == chunk for begin, end in found[1:-1])


def test_kept_keys_give_what_a_mask_gives_and_nothing_stays_on_the_network() -> None:
    model, x = network(), clip()
    seam, before = FrameSeam(model), asked(model, x, torch.full((2,), 500.0))
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    time = torch.zeros(2, 7)
    time[:, 6] = 700
    with seam.seeing(View(mask=causal_mask(CHUNKS, TOKENS))):
        masked = asked(model, x, time.repeat_interleave(TOKENS, 1))
    assert not near(masked[:, :, 6:], asked(model, x, time.repeat_interleave(TOKENS, 1))[:, :, 6:])  # the mask matters
    store, at_once = FrameStore(TOKENS), FrameStore(TOKENS)
    for begin, end in CHUNKS[:2]:
        with seam.seeing(View(store, keep=True, begin=begin)):
            asked(model, x[:, :, begin:end], torch.zeros(2))
    with seam.seeing(View(store, begin=6)):
        kept = asked(model, x[:, :, 6:], torch.full((2,), 700.0))
    assert near(kept, masked[:, :, 6:])
    with seam.seeing(View(at_once, keep=True, mask=causal_mask(CHUNKS, TOKENS))):
        asked(model, x, torch.zeros(2))
    with seam.seeing(View(at_once, mask=forced_mask(CHUNKS, TOKENS))):
        forced = asked(model, x, torch.full((2,), 700.0))
    assert near(forced[:, :, 6:], kept)
    with pytest.raises(ZeroDivisionError), seam.seeing(View(begin=1)):
        raise ZeroDivisionError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == modules
    assert torch.equal(asked(model, x, torch.full((2,), 500.0)), before)


def test_no_chunk_sees_a_later_one() -> None:
    made, x, tau = chunks(), clip(), torch.linspace(0.2, 1.5, 7, dtype=torch.float64).expand(2, -1)
    changed = torch.cat([x[:, :, :3], 9 * x[:, :, 3:]], 2)
    with torch.no_grad():
        for before, other in ((None, None), (x, changed)):
            one, two = made.data(x, tau, told(), before), made.data(changed, tau, told(), other)
            assert torch.equal(one[:, :, :3], two[:, :, :3]) and not torch.equal(one[:, :, 3:], two[:, :, 3:])


def test_a_window_reads_as_many_frames_and_no_more() -> None:
    """Against one masked evaluation in which every chunk reads two frames before it."""
    model, x = network(), clip()
    seam, number = FrameSeam(model), torch.arange(7)
    begin = torch.tensor([b for b, e in CHUNKS for _ in range(b, e)])
    end = torch.tensor([e for b, e in CHUNKS for _ in range(b, e)])
    frames = (number >= begin[:, None] - 2) & (number < end[:, None])
    time = torch.zeros(2, 7)
    time[:, 6] = 700
    with seam.seeing(View(mask=frames.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1))):
        masked = asked(model, x, time.repeat_interleave(TOKENS, 1))
    store = FrameStore(TOKENS, window=2)
    for first, last in CHUNKS[:2]:
        with seam.seeing(View(store, keep=True, begin=first)):
            asked(model, x[:, :, first:last], torch.zeros(2))
        store.slide(seam.turn)
        assert store.frames == 2
    with seam.seeing(View(store, begin=6)):
        assert near(asked(model, x[:, :, 6:], torch.full((2,), 700.0)), masked[:, :, 6:])


def test_the_sink_stands_before_the_window() -> None:
    model = network()
    seam, k = FrameSeam(model), torch.randn(1, 2, 2 * TOKENS, 12)

    def placed(keys: Tensor, begin: int) -> Tensor:
        """Keys of two frames from `begin` on, by the network's own embedding."""
        cos, sin = (t[0, -2 * TOKENS :, 0] for t in model.rope(torch.empty(1, 3, begin + 2, 4, 6)))
        one, two = keys[..., 0::2], keys[..., 1::2]
        c, s = cos[:, 0::2], sin[:, 1::2]
        return torch.stack([one * c - two * s, one * s + two * c], -1).flatten(-2)

    assert near(seam.turn(placed(k, 1), 4), placed(k, 5))
    store = FrameStore(TOKENS, sink=1, window=2)
    for frame in range(5):
        store.keep(0, torch.full((1, 1, TOKENS, 2), float(frame)), torch.full((1, 1, TOKENS, 2), float(frame)))
        store.slide(lambda keys, frames: keys + 10 * frames)
    empty = torch.empty(1, 1, 0, 2)
    keys, values = (t[0, 0, ::TOKENS, 0].tolist() for t in store.read(0, empty, empty))
    assert values == [0, 3, 4] and keys == [20, 3, 4]
    assert store.num_bytes() == 2 * 3 * TOKENS * 2 * 4


# --- the roll-out -----------------------------------------------------------------------------------------


def test_gradients_pass_the_last_call_of_each_chunk_and_never_what_is_kept() -> None:
    made, z = chunks(), clip().requires_grad_()
    out = made.made(z, told(), 0, lambda number: z, graph=True)
    (of_last,) = torch.autograd.grad(out[:, :, 6:].sum(), z, retain_graph=True)
    assert not of_last[:, :, :6].any() and of_last[:, :, 6:].any()
    graphs: list[bool] = []
    watch = made.role.host.network.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    assert made.made(z, told(), 1, lambda number: z, graph=True).requires_grad
    assert graphs == [False, True, False] * 2 + [False, True]  # a call, the last one, what is kept
    watch.remove()
    parameters = list(made.role.host.network.parameters())
    reached = torch.autograd.grad(made.made(clip(), told(), 1, lambda n: clip(), True).sum(), parameters, allow_unused=True)
    assert all(g is not None for g in reached)


def test_each_chunk_is_made_by_the_calls_up_to_the_exit_and_one_that_keeps() -> None:
    made, counted = chunks("consistency", 3), []
    made.role.host.network.register_forward_hook(lambda *_: counted.append(1))
    for exit in range(3):
        counted.clear()
        made.made(clip(), told(), exit, lambda number: clip())
        assert len(counted) == 3 * (exit + 1) + 2
    counted.clear()
    frame = clip()[:, :, :3]
    out = made.made(clip(seed=5), told(), 0, lambda number: clip(), given=frame)
    assert torch.equal(out[:, :, :3], frame) and len(counted) == 2 + 2


def test_what_stands_before_matters_and_rows_do_not() -> None:
    made = chunks("consistency")
    one, fresh = clip(), clip(seed=9)
    other = one.clone()
    other[0, :, :3] += 1
    first, second = (sample(made, z, told(), made.steps, lambda number, x: fresh) for z in (one, other))
    assert not near(first[0, :, 6:], second[0, :, 6:]) and near(first[1], second[1])
    with pytest.raises(UsageError, match="fresh noise"):
        sample(made, one, told(), made.steps)


# --- trainings --------------------------------------------------------------------------------------------


def rows(count: int = 6) -> Store:
    kept, empty = told(2), Condition({"encoder_hidden_states": torch.zeros(1, 5, 8)})
    x0, z = clip(count, seed=3), clip(count, seed=4)
    return Store(("a", "b"), kept, empty, torch.arange(count) % 2, x0, z, SHAPE)


def training(method: Method, out: Path, full: bool = False, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    made = Roles.of_copies(host(), method.trains) if full else Roles.on_one_base(host(), method.trains, Adapter(rank=2))
    chosen = TrainSettings(**{"steps": 4, "batch": 2, "lr": 1e-2, "warmup": 1, **settings})
    return Trainer(method, made, rows(), chosen, out, SHAPE, progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_trainings_resume_bit_for_bit_and_reach_every_weight(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # weights that never move are warned of
        training(method, tmp_path / "whole").fit()
    training(method, tmp_path / "cut").fit(stop_after=2)
    training(method, tmp_path / "cut").fit(resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_parts_is_the_same_batch(name: str, tmp_path: Path) -> None:
    for parts in (1, 2):
        training(METHODS[name], tmp_path / str(parts), steps=1, accumulate=parts, lr=1e-3).fit()
    one, two = (weights(tmp_path / str(parts)) for parts in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-3, atol=1e-5, msg=key)


def test_a_causal_student_learns_the_teachers_clips(tmp_path: Path) -> None:
    trained = training(Causal(calls=2), tmp_path, full=True, steps=25, batch=4, lr=5e-3)
    trained.fit()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_magic_gives_the_datas_first_frame_in_its_share_of_the_steps() -> None:
    for share, allowed in ((0.0, {0, 1}), (1.0, {2, 3}), (0.5, {0, 1, 2, 3})):
        state: Any = Magic141(calls=2, given=share).start(Facts(Roles.on_one_base(host(), Magic141.trains, Adapter(2)), 4, SHAPE))
        assert {state.exit(Draw(0, step, (0,)), "student") for step in range(40)} == allowed
    batch, draw = rows().batch(torch.tensor([0, 1]), Draw(0, 0, (0, 1))), Draw(0, 0, (0, 1))
    assert batch.x0 is not None
    got, own = (state.rollout.made(batch, draw, "student", exit, False) for exit in (3, 1))
    assert torch.equal(got[:, :, :1], batch.x0[:, :, :1]) and not torch.equal(own[:, :, :1], batch.x0[:, :, :1])
    assert state.sampler() == ChunkSteps(state.sampler().angles, "consistency", chunk=6, first=1)


# --- refusals ---------------------------------------------------------------------------------------------


def _checkpointed() -> Any:
    made = host()
    made.network.enable_gradient_checkpointing()  # type: ignore[operator]
    return made


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: (toy_host(), 3), ModelError, "need a video model"),
        (lambda: (replace(toy_host(), shape=SHAPE), 3), RefusedError, "Toy cannot be made causal in time: known are Wan"),
        (lambda: (_checkpointed(), 3), UsageError, "train.checkpointing"),
        (lambda: (host(), 7), UsageError, "A clip of 7 latent frames is a single chunk of 7"),
    ],
)
def test_what_cannot_be_right_is_refused(make: Callable[[], Any], kind: type[HastenError], sentence: str) -> None:
    made, chunk = make()
    with pytest.raises(kind, match=sentence):
        Chunks(Role("student", made, None, (), False), ChunkSteps((1.5,), "ode", chunk=chunk))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{sigmas: [1.0], chunk: 0}", "greater than or equal to 1"),
        ("{timesteps: [999], chunk: 1}", "flow-matching models alone"),
        ("{sigmas: [1.0], chunk: 1, sink: 2}", "sampler.sink needs sampler.window"),
    ],
)
def test_recipes_of_chunks_are_checked(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        from_yaml(f"version: 1\nsampler: {{kind: chunk-calls, {text[1:]}")


# --- under a recipe ---------------------------------------------------------------------------------------

CLIP = WAN_CALL | {"num_frames": 13, "output_type": "latent"}
"""Four latent frames."""

PROMPT = "a seven moving left"


def video(pipe: Any, **more: Any) -> Tensor:
    return torch.as_tensor(pipe(PROMPT, **(CLIP | {"generator": torch.Generator().manual_seed(1)} | more))[0])


def test_a_students_folder_makes_the_clip_of_the_roll_out_and_leaves_no_trace(tmp_path: Path) -> None:
    pipe = small_wan(layers=2)
    made, condition = learn(pipe, [PROMPT], **CLIP)
    roles = Roles.on_one_base(made, ("student",), Adapter(rank=3))
    with torch.no_grad():
        for parameter in roles["student"].parameters().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    student = Chunks(roles["student"], ChunkSteps(tuple(ChunkSteps.even(2, made.path).angles), "ode", chunk=2, first=1))
    z = torch.randn(1, *made.shape, generator=torch.Generator().manual_seed(6))
    want = sample(student, z, condition, student.steps)
    folder = Student(roles["student"], pipe, "some/teacher", student.steps, call=CLIP).save(tmp_path / "student")
    assert "no loop that makes a clip chunk after chunk" in (folder / "README.md").read_text()
    plain = small_wan(layers=2)
    before, own = video(plain), {name: dict(vars(module)) for name, module in plain.transformer.named_modules()}
    scheduler = plain.scheduler
    with hasten.accelerate(plain, folder / "recipe.yaml") as run:
        assert near(video(plain, latents=z, num_inference_steps=50, guidance_scale=5.0), want)
        assert not near(video(plain), before)
        report = str(run.report())
    assert "1 first, then 2 latent frames that read all frames before it, 2 calls each" in report
    assert run.trace.bytes_peak == 2 * 2 * 3 * 4 * 24 * 4  # k and v of two layers, of three frames of four tokens
    assert {name: dict(vars(module)) for name, module in plain.transformer.named_modules()} == own
    assert plain.scheduler is scheduler and type(plain).__name__ == "WanPipeline" and torch.equal(video(plain), before)


def test_clips_may_be_longer_than_those_of_training_and_what_does_not_fit_is_refused() -> None:
    pipe = small_wan(layers=2)
    rolling = Recipe(name="rolling", sampler=ChunkCalls(sigmas=(1.0, 0.5), chunk=2, window=2, sink=1))
    with hasten.accelerate(pipe, rolling) as run:
        one, two = video(pipe, num_frames=37), video(pipe, num_frames=37)
        assert one.shape[2] == 10 and bool(one.isfinite().all()) and torch.equal(one, two)  # the seed decides
        assert run.report().computed_fraction == 1.0 and run.trace.bytes_peak == 2 * 2 * 3 * 4 * 24 * 4  # sink and window
        with pytest.raises(UsageError, match="up to 32 latent frames; 34 were asked for"):
            video(pipe, num_frames=133)
        with pytest.raises(RefusedError, match="student is sampled from this WanPipeline already"):
            hasten.accelerate(pipe, rolling)
    with hasten.accelerate(pipe, rolling, limits=Limits(max_cache_bytes=10)), pytest.raises(LimitError, match="sampler.window"):
        video(pipe)
    with pytest.raises(UsageError, match="what they would leave out"):
        hasten.accelerate(pipe, rolling | find_recipe("teacache"))


def test_calls_of_a_chunk_are_no_calls_of_a_whole_clip() -> None:
    """The contest's bars leave out who takes more evaluations than it says calls."""
    teacher = {"who": "teacher", "name": "teacher", "calls": 50, "frechet": 10.0, "recall": 0.8, "accuracy": 0.9}
    student = teacher | {"who": "student", "name": "a", "calls": 4}
    assert table.near([teacher, student], 4, 1.1).met and table.near([teacher, student | {"chunks": [1, 8]}], 4, 1.1).met is None


def test_facts_of_a_batch_are_rows() -> None:
    """An exit is one for all rows, whoever else is in the batch."""
    state: Any = SelfForcing(calls=4).start(Facts(Roles.on_one_base(host(), SelfForcing.trains, Adapter(2)), 4, SHAPE))
    exits = [state.exit(Draw(0, step, (0, 1)), "student") for step in range(20)]
    assert exits == [state.exit(Draw(0, step, (2,)), "student") for step in range(20)] and set(exits) == {0, 1, 2, 3}
    batch = Batch(told(), told(1), None, None, SHAPE)
    assert state.rollout.made(batch, Draw(0, 0, (0, 1)), "a", 1, False).shape == (2, *SHAPE)
