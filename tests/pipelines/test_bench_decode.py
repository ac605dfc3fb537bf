"""`hasten bench decode`: prompts, counting, rows and bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.bench import decode_texts
from hasten.pipelines.bench.decode import Bench, Cell, measured
from hasten.pipelines.bench.decode_bars import bars
from hasten.pipelines.bench.decode_peers import peers
from hasten.pipelines.bench.decode_ways import EVERY, PACED, every, family, way
from hasten.pipelines.recipes import recipe
from hasten.samplers.decode.pace import Goodput, Steady


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return tiny_models.text("tiny-lm")


def test_prompts_are_what_they_say(lm: tuple[Any, Any]) -> None:
    _, tokenizer = lm
    works = {name: make(tokenizer, 3) for name, make in decode_texts.WORKLOADS.items()}
    assert all(len(work.prompts) == 3 and len(set(map(tuple, work.prompts))) == 3 for work in works.values())
    assert [name for name, work in works.items() if work.adverse] == ["noise"]
    for row in works["repetitive"].prompts:
        assert row[:16] == row[16:32] == row[32:48] and row[48:] == row[: len(row) - 48] and len(row) > 48
    assert works["code"].prompts == decode_texts.code(tokenizer, 3).prompts
    special = set(tokenizer.all_special_ids)
    assert not any(special & set(row) for row in works["noise"].prompts)


def test_prose_is_docstrings() -> None:
    source = '"""One. Two."""\n\nx = 1\n\n\ndef f():\n    """Three. Four.\n\n    Five.\n    """\n\n\ndef g():\n    "short"\n'
    assert decode_texts._docstrings(source) == "One. Two.\n\nThree. Four.\n\nFive."
    assert decode_texts._docstrings("def (") == ""


def test_batches_are_padded_on_the_left() -> None:
    work = decode_texts.Workload("w", [[5, 6], [7, 8, 9], [1]])
    first, second = work.batches(2, 0)
    assert first["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert first["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[1]]


def test_no_prompts_is_said(lm: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        decode_texts.of_files(lm[1], [])


def test_peers_are_counted_by_hand(lm: tuple[Any, Any]) -> None:
    """Forwards of transformers' prompt look-up on a text that repeats: fewer than tokens, and drafts are what they read more."""
    model, tokenizer = lm
    (inputs,) = decode_texts.repetitive(tokenizer, 1).batches(1, 0)
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    peer = peers()[0]
    with peer.counting(model) as count:
        found = peer.call(model, model.generate)(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    handle.remove()
    assert count.forwards == len(lengths) < found.shape[1] - inputs["input_ids"].shape[1]
    assert count.drafts == sum(lengths[1:]) - (len(lengths) - 1)


def test_rows_of_a_cell(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    draft, _ = tiny_models.text("tiny-draft")
    bench = Bench(model, tokenizer, "tiny-lm", new=10, repeats=1)
    found = peers(draft)
    cells = [Cell(decode_texts.repetitive(tokenizer, 2), 2, False), Cell(decode_texts.noise(tokenizer, 1), 1, True)]
    rows = [row for cell in cells for row in measured(bench, cell, [way("look-up:width=1")], [found[0], found[4]])]
    names = [(row["recipe"], row.get("drafts_when")) for row in rows]
    assert names == [
        ("plain", None), (found[0].name, None), (found[4].name, None), ("look-up:width=1", EVERY), ("look-up:width=1", PACED),
        ("plain", None), (found[0].name, EVERY), (found[4].name, EVERY), ("look-up:width=1", PACED),
    ]  # fmt: skip
    assert all("refuses drafts for more than one row" in row["note"] and "seconds" not in row for row in rows[1:3])
    assert rows[3]["tokens_per_forward"] > 1.2 and rows[3]["exact_match"] == 1.0 and rows[3]["asked"] == 10
    assert rows[6]["tokens"] == rows[7]["tokens"] == 10 and rows[7]["family"] == "model" and rows[6]["exact_match"] is None
    assert "lossless" in rows[8]["exactness"]
    assert model.generate.__func__ is type(model).generate


def test_what_cannot_run_has_its_reason(lm: tuple[Any, Any]) -> None:
    bench = Bench(*lm, new=4, repeats=1)
    row = bench.row(Cell(decode_texts.code(lm[1], 1), 1, False), "minference", recipe("fast-dllm"))
    assert "note" in row and "speedup" not in row


def test_counting_alone(lm: tuple[Any, Any]) -> None:
    """Nothing is timed: rows of every round, with the counts and texts that timed ones have, and nothing on adverse prompts."""
    counts, timed = (Bench(*lm, "tiny-lm", new=8, repeats=repeats) for repeats in (0, 1))
    cell, ways = Cell(decode_texts.repetitive(lm[1], 2), 1, False), [way("look-up")]
    rows, beside = (list(measured(bench, cell, ways, peers()[:1])) for bench in (counts, timed))
    assert [(row["recipe"], row.get("drafts_when", EVERY)) for row in rows] == [("plain", EVERY), (peers()[0].name, EVERY), ("look-up", EVERY)]
    for row, other in zip(rows, beside, strict=False):
        assert (row["repeats"], row["n"]) == (0, 2) and not {"seconds", "speedup", "speedup_processor"} & set(row)
        assert row["exact_match"] == 1.0 and row["tokens"] == other["tokens"]
        assert row["tokens_per_forward"] == pytest.approx(other["tokens_per_forward"])
    assert not list(measured(counts, Cell(decode_texts.noise(lm[1], 1), 1, True), ways, []))


def test_both_paces() -> None:
    found = way("look-up").paces()
    assert isinstance(found[EVERY].pace, Steady) and isinstance(found[PACED].pace, Goodput)


def test_what_is_measured_unasked_needs_no_training() -> None:
    names = {each.name: family(each.recipe.draft) for each in every()}
    assert names["look-up"] == "text" and names["speculative"] == "model" and names["triforce"] == "dear"
    assert "heads" not in names.values() and "first-routers" not in names


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [("medusa_heads", "medusa", "heads"), ("prompt_tokens", "ppd", "heads"), ("sampler", "gated-mtp", "heads"), ("routers", "first-routers", "dear")],
)
def test_folder_of_a_training(tmp_path: Path, file: str, name: str, kind: str) -> None:
    run = tmp_path / "my-run"
    (run / "student").mkdir(parents=True)
    (run / "student" / f"{file}.safetensors").write_bytes(b"")
    (run / "config.json").write_text('{"train": {"steps": 30, "batch": 8, "lr": 0.002}}')
    by_name = way(f"{name}:path={run / 'student'},nodes=7")
    assert (by_name.name, by_name.student, by_name.recipe.draft.nodes) == (f"{name}:nodes=7", "my-run", 7)  # type: ignore[union-attr]
    for which in (run, run / "student"):
        found = way(str(which))
        assert (found.name, found.student, family(found.recipe.draft)) == (name, "my-run", kind)
        assert found.training == by_name.training == "30 steps of 8 texts, learning rate 0.002"
    assert str(tmp_path) not in str(found.keys)


def test_recipe_file_of_a_training(tmp_path: Path) -> None:
    """A relative path starts at the recipe's file, whose name is the row's where the recipe has none."""
    (tmp_path / "student").mkdir()
    (tmp_path / "heads.yaml").write_text("version: 1\ndraft:\n  kind: medusa\n  path: student\n")
    found = way(str(tmp_path / "heads.yaml"))
    assert (found.name, found.student, found.training) == ("heads", tmp_path.name, "")


def test_what_drafts_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no student that drafts"):
        way(str(tmp_path))
    with pytest.raises(UsageError, match="drafts nothing"):
        way("h2o")


# --- bars -----------------------------------------------------------------------------------------


def _row(name: str, per: float, when: str = EVERY, **more: Any) -> dict[str, Any]:
    common = {"part": "drafts", "workload": "code", "mode": "greedy", "batch": 1, "n": 4, "family": "text", "allowed": 10}
    return common | {"recipe": name, "tokens_per_forward": per, "drafts_when": when, "speedup_processor": 1.2, "exact_match": 1.0} | more


def _met(rows: list[dict[str, Any]], words: str) -> bool | None:
    (bar,) = [bar for bar in bars(rows) if words in bar.bar]
    return bar.met


def test_more_accepted_at_equal_cost_only() -> None:
    peer = _row("pld", 2.0, control="peer:transformers prompt look-up")
    assert _met([peer, _row("a", 2.1)], "drafts from texts") is True
    assert _met([peer, _row("a", 1.9)], "drafts from texts") is False
    assert _met([peer, _row("a", 3.0, allowed=16)], "drafts from texts") is None, "ours may draft more"
    assert _met([peer, _row("a", 3.0, PACED)], "drafts from texts") is None
    assert _met([peer, _row("a", 3.0, family="model")], "drafts from texts") is None


def test_more_accepted_on_as_many_texts_only() -> None:
    few = [_row("pld", 2.0, control="peer:transformers prompt look-up"), _row("a", 2.1)]
    assert _met([*few, _row("a", 1.0, n=48)], "drafts from texts") is True, "no peer on 48 texts"
    more = [each | {"n": 48, "tokens_per_forward": per} for each, per in zip(few, (2.0, 1.9), strict=True)]
    assert _met([*few, *more], "drafts from texts") is False, "the most texts decide"
    assert _met([few[0], _row("a", 3.0, n=48)], "drafts from texts") is None


def test_never_slower_reads_paced_rows_and_adverse_ones() -> None:
    rows = [_row("a", 2.0, PACED), _row("a", 1.0, PACED, workload="noise", adverse=True, speedup_processor=0.98)]
    assert _met(rows, "never below") is True
    assert _met([*rows, _row("b", 1.0, PACED, speedup_processor=0.9)], "never below") is False
    assert _met([_row("b", 1.0, EVERY, speedup_processor=0.5)], "never below") is None


def test_exactness_caches_and_prefixes() -> None:
    assert _met([_row("a", 2.0), _row("b", 2.0, exact_match=None)], "token for token") is True
    assert _met([_row("a", 2.0, exact_match=0.75)], "token for token") is False
    caches = [{"part": "caches", "recipe": "h2o", "budget": share} for share in (0.1, 0.25, 0.5)]
    assert _met(caches, "perplexity") is True
    assert _met(caches[:2], "perplexity") is False
    shared = {"part": "shared", "prefix": 4096, "batch": 16, "speedup": 3.5, "largest_difference": 1e-6}
    assert _met([shared], "shared by 16 rows") is True
    assert _met([shared | {"speedup": 2.9}], "shared by 16 rows") is False
    assert _met([shared | {"largest_difference": 0.1}], "shared by 16 rows") is False
    assert _met([shared | {"prefix": 256}], "shared by 16 rows") is None
