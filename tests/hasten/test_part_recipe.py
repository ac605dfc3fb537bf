from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.drift import Drift
from hasten.errors import RecipeError
from hasten.forecast import Forecast
from hasten.pipelines.recipes import catalogue, names, recipe
from hasten.recipe import AXES, MAX_YAML_BYTES, FromFile, Recipe, ReusePolicy, from_yaml, read
from hasten.samplers.guidance import GuidanceInterval
from tests.contract import PartContract, parts


class TestEveryReusePolicy(PartContract):
    family = ReusePolicy

    @pytest.fixture(params=parts(ReusePolicy))
    def part(self, request: pytest.FixtureRequest) -> ReusePolicy:
        return request.param

    def test_what_can_be_changed_says_how(self, part: ReusePolicy) -> None:
        assert (type(part).__doc__ or "").strip()
        assert "start" in dir(part) or part.kind == "routed", "what is chosen by the time alone has no running state"


@pytest.mark.parametrize("name", names())
def test_catalogue_survives_yaml(name: str, tmp_path: Path) -> None:
    original = recipe(name)
    assert original.name == name
    assert from_yaml(original.to_yaml()) == original
    path = tmp_path / "it.yaml"
    path.write_text(original.to_yaml(), encoding="utf-8")
    found = recipe(path)
    assert found == recipe(str(path)) and found.to_yaml() == original.to_yaml()
    named = [axis for axis, part in original.axes.items() if isinstance(part, FromFile) and part.path and not getattr(part, "calls", None)]
    assert found == original or named, "a part that names a file means the one beside the recipe's"
    assert all(getattr(found, axis).place.parent == tmp_path for axis in named)


def test_catalogue_is_documented() -> None:
    entries = catalogue()
    assert len(entries) >= 10 and len({entry.name for entry in entries}) == len(entries)
    assert all(entry.summary.endswith((".", ":")) or len(entry.summary) > 20 for entry in entries)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resue: {kind: network}", "'reuse'"),
        ("reuse: {kind: netwrok}", "'network'"),
        ("reuse: {kind: network, rule: {kind: drift, limt: 1}}", "'limit'"),
        ("reuse: {kind: network, rule: {kind: evry}}", "'every'"),
        ("reuse: {kind: network, forecast: {kind: polynomial, ordr: 1}}", "'order'"),
    ],
)
def test_unknown_word_names_the_nearest(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"Did you mean {said}"):
        from_yaml(text)


def test_message_says_where() -> None:
    with pytest.raises(RecipeError, match=r"my\.yaml.*reuse\.rule\.limit.*-1"):
        from_yaml("reuse: {kind: network, rule: {kind: drift, limit: -1}}", where="my.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "name: &a x\npaper: *a",
        "name: &a x",
        "reuse: {kind: network, rule: {kind: drift, limit: .nan}}",
        "reuse: {kind: network, rule: {kind: drift, limit: .inf}}",
        "reuse: {kind: network, rule: {kind: listed, at: []}}",
        "reuse: {kind: network, rule: {kind: listed, at: [.nan]}}",
        "reuse: {kind: interval}",
        "reuse: {kind: network, rule: {kind: hold}}",
        "reuse: [1]",
        "reuse: network",
        "guidance: {kind: interval, low: 0.9, high: 0.1}",
        "version: 2",
        "name: !!python/object/apply:os.system [ls]",
        "name: !!python/name:os.system",
        "",
        "- a",
        "just a sentence",
        "a: b: c",
        "---\nname: a\n---\nname: b",
        "? [a]\n: 1",
        "name: " + "[" * 300 + "]" * 300,
        "- " * 3000,
        "kind: [1]",
    ],
)
def test_bad_text_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError):
        from_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "name: 2001-99-99",
        "name: " + "9" * 5000,
        "name: !!timestamp x",
        "name: !!float abc",
        "name: !!int x",
        "name: !!bool x",
        "reuse: {kind: {a: 1}}",
        "reuse: {kind: [network]}",
        "name: \ud800",
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_values_that_break_the_yaml_reader_are_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError):
        from_yaml(text)


def test_size_limit() -> None:
    with pytest.raises(RecipeError, match="at most 256 KiB"):
        from_yaml("#" * (MAX_YAML_BYTES + 1))
    assert from_yaml("name: a\n#" + " " * (MAX_YAML_BYTES - 20)).name == "a"


@pytest.mark.parametrize("opening", ["{", "[", "- ", "? "])
def test_deep_nesting_is_refused_quickly(opening: str) -> None:
    """Without a limit on depth PyYAML needs 40 s for 5 kB of this, and its time grows with the square."""
    began = time.process_time()  # of this process alone: other work on the machine is not the reader's fault
    with pytest.raises(RecipeError):
        from_yaml(opening * 50_000)
    assert time.process_time() - began < 5


def test_size_limit_counts_bytes() -> None:
    with pytest.raises(RecipeError, match="at most 256 KiB"):
        from_yaml("# " + "\u20ac" * (MAX_YAML_BYTES // 2))


WORDS = (
    "name paper models reuse guidance sampler rule forecast kind network stack drift every listed at limit order"
    " version null true 1 -1 0.5 .nan .inf 2001-01-01 2001-99-99 0o7 1_000 1:60 !!int !!float !!bool !!binary !!set"
    " !!omap !!str !!python/none << = ~ x"
)
PIECES = st.sampled_from(sorted(WORDS.split()))


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Text that is nearly a recipe: words and punctuation of YAML in any order."""
    marks = st.sampled_from([": ", "\n", "\n  ", "- ", "{", "}", "[", "]", ", ", "? ", "'", '"', "|", ">", "#", " "])
    return "".join(draw(st.lists(st.one_of(PIECES, marks), max_size=30)))


def gives_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        found = from_yaml(text)
    except RecipeError as error:
        assert str(error)
    else:
        assert from_yaml(found.to_yaml()) == found


@settings(max_examples=150, deadline=None)
@given(documents())
def test_near_recipes_never_raise_anything_else(text: str) -> None:
    gives_a_recipe_or_a_recipe_error(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
@example("\x00")
@example("\ufeffname: a")
@example("%YAML 3.0\n---\nname: a")
def test_any_text_never_raises_anything_else(text: str) -> None:
    gives_a_recipe_or_a_recipe_error(text)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(PIECES, st.integers(0, 3)), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([*AXES, "name", "models", "version", "kind", "other"]), VALUES, max_size=4))
def test_any_mapping_never_raises_anything_else(data: dict[str, object]) -> None:
    gives_a_recipe_or_a_recipe_error(yaml.safe_dump(data, allow_unicode=True))


def test_join_takes_disjoint_axes() -> None:
    both = recipe("easycache") | recipe("adaptive-guidance")
    assert set(both.axes) == {"reuse", "guidance"} and both.name == "easycache+adaptive-guidance"
    assert "2507.02860" in both.paper and "2312.12487" in both.paper
    assert recipe("easycache+adaptive-guidance") == both


def test_join_refuses_the_same_axis_twice() -> None:
    with pytest.raises(RecipeError, match=r"both set reuse|Both recipes set reuse"):
        recipe("easycache") | recipe("balanced")
    with pytest.raises(RecipeError):
        recipe("easycache+easycache")


def test_join_with_plain_changes_nothing() -> None:
    assert (recipe("easycache") | recipe("plain")).axes == recipe("easycache").axes


def test_replace_with_dotted_keys() -> None:
    original = recipe("easycache")
    changed = original.replace({"reuse.rule.limit": 0.2, "reuse.correct": True})
    assert isinstance(changed.reuse, NetworkReuse) and isinstance(changed.reuse.rule, Drift)
    assert changed.reuse.rule.limit == 0.2 and changed.reuse.correct
    assert changed.replace({"reuse.rule.limit": 0.05, "reuse.correct": False}) == original
    assert recipe("easycache").reuse == original.reuse, "the original was changed"
    swapped = original.replace({"reuse.rule": {"kind": "every", "interval": 3}})
    assert isinstance(swapped.reuse, NetworkReuse) and swapped.reuse.rule == Every(interval=3)
    assert original.replace({"reuse": None}).axes == {}


@pytest.mark.parametrize(
    "assignment",
    [
        {"reuse.rule.limt": 1},
        {"reuse.nothing.here": 1},
        {"guidance.low": 1},
        {"reuse.rule.limit.x": 1},
        {"": 1},
        {"reuse.rule.limit": "much"},
        {"reuse.rule.kind": "every"},
    ],
)
def test_replace_refuses_what_is_not_there(assignment: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        recipe("easycache").replace(assignment)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'easycache'"):
        recipe("easycahce")
    assert recipe(" Adaptive_Guidance ").name == "adaptive-guidance"


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(RecipeError, match="Cannot read recipe"):
            read(path)


def test_parts_stay_as_given() -> None:
    assert GuidanceInterval(low=0.2, high=0.2).low == 0.2
    assert Recipe(models=("a", "b")).models == ("a", "b")
    assert not {"network", "stack"} & set(Forecast.members())
