"""A budget takes the fastest tuned recipe that was kept for this host, and the online controller where there is none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten.errors import OutputError, UsageError
from hasten.pipelines.host import denoisers
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tune import kept
from hasten.pipelines.tune.fingerprint import known_by
from hasten.pipelines.tune.verify import NEEDED
from hasten.recipe import Adapter, Recipe
from hasten.report import Report
from hasten.stamp import Stamp
from tests.hosts import WAN_CALL, small_wan


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tuned"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_wan()


def tuned(pipe: Any, name: str = "balanced", **changes: Any) -> Recipe:
    """A recipe that was tuned on `pipe`, or on what `changes` say."""
    here = known_by(denoisers(pipe)) | {"scheduler": type(pipe.scheduler).__name__, "steps": 6}
    stamp = Stamp(**{
        **here, "model": "small", "budget": "psnr >= 30 dB", "prompts": 4, "kept": 1.0, "speedup": 5.9, "worst": 37.0,
        "date": "2026-11-22", **changes,
    })  # fmt: skip
    return recipe(name).model_copy(update={"name": f"tuned {name}", "tuned": stamp})


def used(pipe: Any, budget: hasten.Budget) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hasten.accelerate(pipe, budget) as run:
            pipe("a seven", output_type="latent", generator=torch.Generator().manual_seed(0), **WAN_CALL)
    return run.report()


def found(pipe: Any, budget: hasten.Budget) -> kept.Found:
    return kept.fitting(denoisers(pipe), pipe.scheduler, budget)


def test_nothing_kept_reads_no_weights(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(models: dict[str, nn.Module]) -> dict[str, Any]:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(kept, "known_by", refuse)
    none = found(pipe, hasten.Budget(psnr=30))
    assert none.recipe is None and "no tuned recipe is kept here" in none.told and not none.skipped


def test_what_is_kept_is_used_and_named(pipe: Any, home: Path) -> None:
    path = kept.keep(tuned(pipe))
    assert path.parent == home and list(home.iterdir()) == [path]
    report = used(pipe, hasten.Budget(psnr=30))
    assert report.recipe is not None and report.recipe.name == "tuned balanced"
    assert "tuned for psnr >= 30 dB on 2026-11-22, 5.9x, worst 37.0 dB on 4 held-out prompts" in str(report)


def test_without_a_match_the_online_controller_is_named(pipe: Any) -> None:
    kept.keep(tuned(pipe, weights="0123456789abcdef"))
    report = used(pipe, hasten.Budget(psnr=30))
    assert report.recipe is not None and report.recipe.name == "auto" and "online controller is at work" in str(report)


@pytest.mark.parametrize(
    ("budget", "fits"),
    [({"psnr": 30}, True), ({"psnr": 29}, True), ({"psnr": 31}, False), ({"latent_error": 0.1}, False), ({"quality": 0.5}, False)],
)
def test_the_same_measure_and_at_least_as_strict(pipe: Any, budget: dict[str, float], fits: bool) -> None:
    kept.keep(tuned(pipe))
    assert (found(pipe, hasten.Budget(**budget)).recipe is not None) is fits


def test_a_slider_means_its_tolerance(pipe: Any) -> None:
    kept.keep(tuned(pipe, budget="latent_error <= 0.05"))
    wider, stricter = hasten.Budget(quality=0.4), hasten.Budget(quality=0.6)
    assert wider.tolerance > 0.05 > stricter.tolerance
    assert found(pipe, wider).recipe is not None and found(pipe, stricter).recipe is None


@pytest.mark.parametrize(
    "other",
    [{"weights": "0123456789abcdef"}, {"scheduler": "Another"}, {"hardware": "cuda: another"}, {"kept": 0.9}, {"kept": None},
     {"speedup": None}, {"budget": "exact_match >= 99 %"}],
)  # fmt: skip
def test_what_was_measured_elsewhere_or_did_not_hold_is_not_used(pipe: Any, other: dict[str, Any]) -> None:
    kept.keep(tuned(pipe, **other))
    assert found(pipe, hasten.Budget(psnr=30)).recipe is None


def test_the_fastest_wins_and_a_new_tuning_replaces_the_old_one(pipe: Any, home: Path) -> None:
    kept.keep(tuned(pipe, "balanced", speedup=2.0))
    kept.keep(tuned(pipe, "fast", speedup=3.0, budget="psnr >= 35 dB"))
    chosen = found(pipe, hasten.Budget(psnr=30)).recipe
    assert chosen is not None and chosen.name == "tuned fast"
    kept.keep(tuned(pipe, "balanced", speedup=4.0))
    chosen = found(pipe, hasten.Budget(psnr=30)).recipe
    assert len(list(home.iterdir())) == 2 and chosen is not None and chosen.tuned is not None and chosen.tuned.speedup == 4.0


def test_files_that_are_none_are_left_alone_and_said_once(pipe: Any, home: Path) -> None:
    kept.keep(tuned(pipe))
    (home / "broken.yaml").write_text("reuse: [")
    (home / "plain.yaml").write_text(recipe("balanced").to_yaml())
    (home / "binary.yaml").write_bytes(b"\xff\x00\xff")
    (home / "notes.txt").write_text("mine")
    here = found(pipe, hasten.Budget(psnr=30))
    assert here.recipe is not None and here.skipped.count("cannot be used") == 1
    assert all(name in here.skipped for name in ("broken.yaml", "plain.yaml: it has no stamp", "binary.yaml")) and "notes" not in here.skipped
    with pytest.warns(UserWarning, match="3 cannot be used"), hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        assert run.recipe.name == "tuned balanced"


def test_files_of_other_weights_are_not_opened(pipe: Any, home: Path) -> None:
    home.mkdir(parents=True)
    (home / "0123456789abcdef-other.yaml").write_text("reuse: [")
    assert found(pipe, hasten.Budget(psnr=30)).skipped == ""


def test_a_kept_recipe_that_cannot_be_put_on_gives_way_and_says_why(pipe: Any, tmp_path: Path) -> None:
    kept.keep(tuned(pipe).model_copy(update={"adapter": Adapter(path=str(tmp_path / "gone.safetensors"))}))
    with pytest.warns(UserWarning, match="cannot be used"), hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        assert run.recipe.name == "auto"
    assert "online controller" in run.trace.facts["budget"]


def test_the_copy_finds_the_adapter_where_it_was(tmp_path: Path, pipe: Any) -> None:
    mine = tuned(pipe).model_copy(update={"adapter": Adapter(path="student.safetensors").beside(tmp_path)})
    kept.keep(mine)
    again = found(pipe, hasten.Budget(psnr=30)).recipe
    assert again is not None and again.adapter is not None and again.adapter.place == tmp_path / "student.safetensors"


def test_only_what_was_tuned_is_kept(tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no stamp"):
        kept.keep(recipe("balanced"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="HASTEN_HOME"):
        kept.keep(tuned(pipe))
    assert found(pipe, hasten.Budget(psnr=30)).recipe is None, "a folder that cannot be is as good as an empty one"


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kept.NEEDED == NEEDED
    monkeypatch.delenv("HASTEN_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.folder() == tmp_path / "hasten" / "tuned"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kept.folder() == Path.home() / ".cache" / "hasten" / "tuned"
