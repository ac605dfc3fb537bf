"""`TextDiffusionPipeline`: prompts in every form, results in transformers' shape, sessions, and texts that do not know of
each other."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten
from hasten.caching.kv import Dual, Prefix
from hasten.errors import LimitError, ModelError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines import tiny_models
from hasten.pipelines.text.arguments import ALIASES
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.output import TextOutput
from hasten.pipelines.text.session import TextDiffusionSession
from hasten.recipe import Recipe
from hasten.samplers.commit import Either, Threshold, Unmask
from hasten.samplers.scores import Margin, Softened
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.pipelines.text_pipes import EOS, MASK, PAD, model, pipe, saved, tokenizer

RAGGED = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
FAST = Recipe(
    name="fast", commit=Unmask(rule=Threshold(above=0.2)), blocks=InBlocks(rule=Fixed(size=4), end=None), kv=Dual()
)


def written(output: TextOutput) -> list[list[int]]:
    """What stands behind each prompt."""
    width = output.sequences.shape[1] - output.commit_step.shape[1]
    return [line[width : width + count] for line, count in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)]


# --- the shape of results -----------------------------------------------------------------------------


def test_sequences_are_as_transformers_has_them() -> None:
    output = pipe().generate(RAGGED, max_new_tokens=[6, 4, 7], recipe=FAST)
    assert output.sequences.shape == (3, 5 + 7)
    assert output.sequences[:, :5].tolist() == [[PAD, PAD, 1, 2, 3], [4, 5, 6, 7, 8], [PAD, PAD, PAD, PAD, 9]]
    assert output.lengths.tolist() == [6, 4, 7]
    assert output.sequences[1, 9:].tolist() == [PAD] * 3
    assert MASK not in output.sequences.tolist()[0]
    assert not output.interrupted


def test_commit_steps_and_rates_fit_together() -> None:
    output = pipe().generate(RAGGED, max_new_tokens=[6, 4, 7], recipe=FAST)
    for number, count in enumerate(output.lengths.tolist()):
        steps = output.commit_step[number]
        assert (steps[:count] >= 0).all()
        assert (steps[count:] == -1).all()
        assert int(steps.max()) == int(output.nfe[number]) - 1
    assert torch.allclose(output.tokens_per_forward, output.lengths / output.nfe)


def test_texts_are_what_was_written() -> None:
    output = pipe().generate(prompts=["w1 w2", "w3"], max_new_tokens=4, recipe=FAST)
    assert output.texts == [tokenizer().decode(ids, skip_special_tokens=True) for ids in written(output)]
    assert pipe().generate(prompts="w1", max_new_tokens=2, output_type="seq").texts is None


def test_a_tensor_alone() -> None:
    output = pipe().generate(RAGGED, max_new_tokens=3, return_dict_in_generate=False)
    assert torch.equal(output, pipe().generate(RAGGED, max_new_tokens=3).sequences)  # type: ignore[arg-type]


def test_history_ends_with_the_result() -> None:
    output = pipe().generate(RAGGED, max_new_tokens=4, recipe=FAST, output_history=True)
    assert len(output.history) == int(output.nfe.max())
    assert torch.equal(output.history[-1], output.sequences)
    masks = [int((ids == MASK).sum()) for ids in output.history]
    assert masks == sorted(masks, reverse=True)
    assert pipe().generate(RAGGED, max_new_tokens=4).history == ()


def test_the_end_token_ends_a_text() -> None:
    plain = pipe().generate([[1, 2, 3]], max_new_tokens=8, block_length=4)
    early = int(plain.sequences[0, 3 + 4])
    output = pipe().generate([[1, 2, 3]], max_new_tokens=8, block_length=4, eos_token_id=early)
    assert output.lengths.tolist() == [written(plain)[0].index(early) + 1]
    assert output.sequences.shape[1] == 3 + output.lengths[0]


def test_by_default_a_text_fills_the_context() -> None:
    prompt = [[1] * 60, [2]]
    recipe = Recipe(commit=Unmask(rule=Threshold(above=0.0)), blocks=InBlocks(rule=Fixed(size=64), end=None))
    assert pipe().generate(prompt, recipe=recipe).lengths.tolist() == [4, 63]


# --- prompts in every form ----------------------------------------------------------------------------


def test_every_form_of_a_prompt_gives_the_same() -> None:
    right = written(pipe().generate([[1, 2, 3], [4, 5]], max_new_tokens=5, recipe=FAST))
    left_padded = torch.tensor([[PAD, 1, 2, 3], [PAD, PAD, 4, 5]])
    right_padded = torch.tensor([[1, 2, 3, PAD], [4, 5, PAD, PAD]])
    forms: list[dict[str, Any]] = [
        {"input_ids": left_padded, "attention_mask": left_padded != PAD},
        {"input_ids": right_padded, "attention_mask": (right_padded != PAD).long()},
        {"input_ids": [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]},
        {"prompts": ["w1 w2 w3", "w4 w5"]},
        {"inputs": [[1, 2, 3], [4, 5]]},
        dict(tokenizer()(["w1 w2 w3", "w4 w5"], padding=True, return_tensors="pt")),
    ]
    for form in forms:
        output = pipe().generate(**form, max_new_tokens=5, recipe=FAST)
        assert written(output) == right, form
    assert pipe().generate(left_padded, left_padded != PAD, max_new_tokens=5).sequences.shape == (2, 4 + 5)


def test_messages_use_the_chat_template() -> None:
    talk = [{"role": "user", "content": "w7 w8"}]
    right = pipe().generate([[1, 7, 8, 2]], max_new_tokens=4).sequences
    assert torch.equal(pipe().generate(messages=talk, max_new_tokens=4).sequences, right)
    assert torch.equal(pipe().generate(messages=[talk, talk], max_new_tokens=4).sequences, right.repeat(2, 1))


def test_an_empty_prompt_writes_from_nothing() -> None:
    output = pipe().generate([[]], max_new_tokens=4)
    assert output.sequences.shape == (1, 4)
    with pytest.raises(UsageError, match="empty.*at least one token"):
        pipe(shifted=True).generate([[1], []], max_new_tokens=4)


# --- texts do not know of each other ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "block"])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "top_k": 20}, {"cfg_scale": 0.5}, {"min_new_tokens": 3, "eos_penalty": 1.0}])
def test_a_text_of_a_batch_is_what_it_is_alone(kind: str, more: dict[str, Any]) -> None:
    subject, new = pipe(kind, shifted=kind == "full"), [6, 4, 7]
    recipe = FAST if kind == "full" else FAST.model_copy(update={"kv": Prefix()})

    def noise(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    together = subject.generate(RAGGED, max_new_tokens=new, recipe=recipe, generator=[noise(i) for i in range(3)], **more)
    for number, prompt in enumerate(RAGGED):
        alone = subject.generate([prompt], max_new_tokens=new[number], recipe=recipe, generator=[noise(number)], **more)
        assert written(together)[number] == written(alone)[0]
        assert together.nfe[number] == alone.nfe[0]
        assert together.token_layers[number] == alone.token_layers[0]


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_of_any_width_changes_nothing(lengths: list[int], padding: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(PAD, (length,), generator=noise) for length in lengths]
    width = max(lengths) + padding
    ids = torch.full((len(lengths), width), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    padded = pipe().generate(ids, mask, max_new_tokens=3, recipe=FAST)
    assert written(padded) == written(pipe().generate(prompts, max_new_tokens=3, recipe=FAST))
    assert padded.sequences.shape[1] == width + 3


def test_noise_comes_from_the_generator() -> None:
    def sample(seed: int) -> list[list[int]]:
        return written(pipe().generate(RAGGED, max_new_tokens=8, do_sample=True, generator=torch.Generator().manual_seed(seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


# --- numbers of a call --------------------------------------------------------------------------------


def test_aliases_are_understood() -> None:
    right = pipe().generate(RAGGED, max_new_tokens=6, steps=3, block_length=6, threshold=0.2, remasking="topk_margin")
    other = pipe().generate(
        RAGGED, gen_length=6, num_inference_steps=3, block_size=6, confidence_threshold=0.2, alg="topk_margin"
    )
    assert torch.equal(right.sequences, other.sequences)
    for alias in ALIASES:
        with pytest.raises(UsageError, match="both were given|Pass one of"):
            ours = {"max_new_tokens": 6, "prompts": "w1"} | {ALIASES[alias]: 4}
            pipe().generate(**ours, **{alias: 4})


def test_steps_are_the_evaluations() -> None:
    output = pipe().generate(RAGGED, max_new_tokens=8, steps=4, block_length=8)
    assert output.nfe.tolist() == [4, 4, 4]


def test_a_threshold_with_steps_is_at_least_so_many() -> None:
    found = pipe()._job({"input_ids": RAGGED, "threshold": 0.7, "steps": 4}).recipe.commit
    assert isinstance(found, Unmask)
    assert isinstance(found.rule, Either)
    assert [rule.kind for rule in found.rule.rules] == ["threshold", "quota"]
    assert found.rule.rules[0].above == 0.7  # type: ignore[attr-defined]
    assert found.rule.rules[1].steps == 4  # type: ignore[attr-defined]


def test_numbers_change_the_recipes_parts() -> None:
    given = {"input_ids": RAGGED, "recipe": FAST, "threshold": 0.5, "block_length": 2, "remasking": "topk_margin", "alg_temp": 0.2}
    found = pipe()._job(given).recipe
    assert found.commit == Unmask(rule=Threshold(above=0.5), score=Softened(score=Margin(), temperature=0.2))
    assert found.blocks == InBlocks(rule=Fixed(size=2), end=None)
    assert found.kv == FAST.kv
    assert FAST.commit == Unmask(rule=Threshold(above=0.2))


def test_editing_adds_a_reviser_and_zero_is_none() -> None:
    found = pipe()._job({"input_ids": RAGGED, "recipe": FAST, "editing_threshold": 0.6}).recipe
    assert found.revise is not None
    assert found.revise.above == 0.6  # type: ignore[attr-defined]
    assert pipe()._job({"input_ids": RAGGED, "recipe": found, "editing_threshold": 0.0}).recipe.revise is None
    output = pipe().generate(RAGGED, max_new_tokens=4, recipe=FAST, editing_threshold=0.05)
    assert output.lengths.tolist() == [4, 4, 4]


# --- sessions -----------------------------------------------------------------------------------------


def test_accelerate_acts_while_it_is_open() -> None:
    subject = pipe()
    before = subject.generate(RAGGED, max_new_tokens=6)
    with hasten.accelerate(subject, FAST) as run:
        assert isinstance(run, TextDiffusionSession)
        inside = subject.generate(RAGGED, max_new_tokens=6)
        subject.generate(RAGGED, max_new_tokens=6, recipe=Recipe(name="other"))  # its own, so not this session's
        assert len(run.report().generations) == 1
        with hasten.accelerate(subject, Recipe(name="inner", kv=Prefix())) as inner:
            subject.generate(RAGGED, max_new_tokens=6)
        assert inner.closed
    assert run.closed
    run.close()
    assert torch.equal(subject.generate(RAGGED, max_new_tokens=6).sequences, before.sequences)
    report = run.report()
    assert report.name == "fast"
    assert report.token_layers == inside.report.token_layers
    assert report.token_layers < before.report.token_layers
    assert report.cache == "dual"
    assert not report.exact
    assert run.skipped == pytest.approx(1 - report.of_sequential)


def test_the_model_is_as_it_was() -> None:
    subject = pipe()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = subject.model(ids).logits
    config, hooks = subject.model.config, len(subject.model.lm_head._forward_pre_hooks)

    def fails(*step: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.generate(RAGGED, max_new_tokens=4, callback_on_step_end=fails)
    with torch.no_grad():
        assert torch.equal(subject.model(ids).logits, before)
    assert subject.model.config is config
    assert len(subject.model.lm_head._forward_pre_hooks) == hooks
    assert not any("hasten" in name for name in vars(subject.model))


def test_an_untouched_session_says_so() -> None:
    with hasten.accelerate(pipe(), FAST) as run:
        pass
    assert "did nothing" in str(run.report())


def test_the_report_is_json_and_a_page() -> None:
    report = pipe().generate(RAGGED, max_new_tokens=6, recipe=FAST).report
    data = json.loads(report.to_json())
    assert data["nfe"] == report.evaluations
    assert data["written"] == 18
    assert 0 < data["of_sequential"] <= data["computed_fraction"] < 1
    assert "<html" in report.to_html()
    assert "dual, an approximation" in str(report)


# --- how a pipeline is made ---------------------------------------------------------------------------


def test_from_pretrained_reads_a_folder(tmp_path: Any) -> None:
    folder = saved(tmp_path)
    made = TextDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert made.host.facts == pipe().host.facts
    assert torch.equal(made.generate(RAGGED, max_new_tokens=4).sequences, pipe().generate(RAGGED, max_new_tokens=4).sequences)
    assert made.generate(prompts="w1", max_new_tokens=2).texts is not None


def test_load_opens_a_bundled_text_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("tiny-words", "full"), ("tiny-next", "causal")):
        folder = tmp_path / name
        saved(folder, kind=kind)
        (folder / "hasten.json").write_text(json.dumps({"kind": "text"}))
    monkeypatch.setattr(tiny_models, "_BUNDLED", tmp_path)
    made = hasten.load("tiny-words")
    assert isinstance(made, TextDiffusionPipeline)
    right = pipe().generate(RAGGED, max_new_tokens=4).sequences
    assert torch.equal(made.generate(RAGGED, max_new_tokens=4).sequences, right)
    opened = TextDiffusionPipeline.from_pretrained("tiny-words", FAST, device="cpu", probe=False)
    assert opened.recipe == FAST
    mate = hasten.load("tiny-next")
    assert type(mate).__name__ == "TextGenerationPipeline"
    assert mate.model.device == torch.device("cpu")
    assert mate("w1 w2", max_new_tokens=3, return_full_text=False)[0].keys() == {"generated_text"}


def test_pickles_are_refused(tmp_path: Any) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        TextDiffusionPipeline.from_pretrained(folder, device="cpu")


def test_code_of_a_folder_never_runs_unasked(tmp_path: Any) -> None:
    folder = saved(tmp_path)
    settings = json.loads((folder / "config.json").read_text()) | {
        "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        TextDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c"])
def test_a_wrong_name_is_told(name: str) -> None:
    with pytest.raises(ModelError, match="There is no language model"):
        TextDiffusionPipeline.from_pretrained(name)


def test_a_model_without_a_mask_token() -> None:
    bare = model()
    bare.config.mask_token_id = None
    with pytest.raises(ModelError, match="Pass mask_token_id="):
        TextDiffusionPipeline(bare)
    made = TextDiffusionPipeline(bare, mask_token_id=MASK, probe=False)
    assert torch.equal(made.generate(RAGGED, max_new_tokens=4).sequences, pipe().generate(RAGGED, max_new_tokens=4).sequences)


def test_a_recipe_for_other_models_is_refused() -> None:
    with pytest.raises(UsageError, match="sets reuse"):
        TextDiffusionPipeline(model(), recipe="balanced", probe=False)
    with pytest.raises(UsageError, match="loop of its own"):
        hasten.accelerate(model(), FAST)
    unkept = TextDiffusionPipeline(model(), probe=False)
    unkept.host.caches = False
    with pytest.raises(RefusedError, match="Take a recipe without a cache"):
        unkept.generate(RAGGED, recipe=FAST)


@pytest.mark.parametrize(("limits", "said"), [(Limits(max_tokens=8), "at most 8"), (Limits(max_cache_bytes=100), "max_cache_bytes")])
def test_limits_are_the_sessions(limits: Limits, said: str) -> None:
    with hasten.accelerate(pipe(), FAST, limits=limits), pytest.raises(LimitError, match=said):
        pipe().generate(RAGGED, max_new_tokens=8)
    pipe().generate(RAGGED, max_new_tokens=8, eos_token_id=EOS)
