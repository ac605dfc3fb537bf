"""A finished student as a folder: it loads in plain diffusers and under a recipe, and leaves no trace."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

import hasten
from hasten.distill.export.lora import lora_of, save_network
from hasten.distill.export.student import Student, student_of
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.hint import FlowMap
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines import lora as lora_module
from hasten.pipelines.loading import open_pipeline
from hasten.pipelines.lora import FILE, METADATA, Lora, LowRank
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.seams.adapter import add, put_on
from hasten.recipe import Adapter as RecipeAdapter
from hasten.recipe import Recipe, from_yaml
from hasten.session import Attachment
from tests.distill.toys import trainer
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, saved, small_flux, small_pixart, small_wan

HOSTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "flux": (small_flux, FLUX_CALL), "pixart": (small_pixart, PIXART_CALL),
}  # fmt: skip
PROMPT = "a seven moving left"


def shaken(roles: Roles, name: str = "student", size: float = 0.2) -> None:
    """Weights as if trained."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in roles[name].parameters().values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=g))


def student(which: str, how: Any = "ode", calls: int = 2, pipe: Any = None, base: tuple[str, ...] = (), **more: Any) -> Student:
    """A student of a small pipeline, untrained but changed."""
    make, call = HOSTS[which]
    pipe = pipe or make()
    host, _ = learn(pipe, [PROMPT], **call)
    roles = Roles.on_one_base(host, ("student",), Adapter(rank=3, alpha=6.0), base)
    shaken(roles)
    steps = FewSteps.even(calls, host.path, how)
    return Student(roles["student"], pipe, more.pop("name_of_base", "some/teacher"), steps, call=call, **more)


def picture(pipe: Any, which: str, seed: int = 1, **more: Any) -> Tensor:
    call = HOSTS[which][1] | {"output_type": "pt"} | more
    return torch.as_tensor(pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **call)[0])


def close(one: Tensor, two: Tensor) -> bool:
    """The same but for another order of float32 operations."""
    return bool((one - two).abs().max() <= 1e-4 * two.abs().max())


# --- under a recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "how"), [("wan", "consistency"), ("flux", "ode"), ("pixart", "consistency")])
def test_a_recipe_makes_a_student_of_its_teacher_and_leaves_no_trace(which: str, how: Any, tmp_path: Path) -> None:
    folder = student(which, how, calls=3).save(tmp_path / "student")
    pipe = HOSTS[which][0]()
    network = pipe.transformer
    before, modules, own = picture(pipe, which), dict(network.named_modules()), dict(vars(network))
    wanted = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    kind, scheduler, random = type(pipe), pipe.scheduler, torch.get_rng_state()
    with hasten.accelerate(pipe, str(folder / "recipe.yaml")) as run:
        assert torch.equal(torch.get_rng_state(), random)
        one = picture(pipe, which)
        torch.manual_seed(0)
        assert torch.equal(picture(pipe, which, num_inference_steps=9, guidance_scale=7.0), one)
        assert "student:    3 calls by" in str(run.report())
        assert run.report().nfe == 3
        assert type(pipe).__name__ == kind.__name__
    assert not close(one, before)
    assert torch.equal(picture(pipe, which), before)
    assert list(modules) == [name for name, _ in network.named_modules()]
    assert all(modules[name] is module for name, module in network.named_modules())
    assert vars(network).keys() == own.keys()
    assert wanted == {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert type(pipe) is kind
    assert pipe.scheduler is scheduler


def test_users_adapters_stay_as_they_were(tmp_path: Path) -> None:
    folder = student("wan").save(tmp_path / "student")
    style = adapter(small_wan().transformer, 8)
    pipe = small_wan()
    plain = picture(pipe, "wan")
    pipe.load_lora_weights(str(style.save(tmp_path / "style.safetensors")), adapter_name="style")
    pipe.set_adapters(["style"], [0.7])
    styled = picture(pipe, "wan")
    assert not close(styled, plain)
    keys = list(pipe.transformer.state_dict())
    with hasten.accelerate(pipe, folder / "recipe.yaml"):
        both = picture(pipe, "wan")
    assert torch.equal(picture(pipe, "wan"), styled)
    assert list(pipe.transformer.state_dict()) == keys
    assert pipe.get_active_adapters() == ["style"]
    with hasten.accelerate(small_wan(), folder / "recipe.yaml") as run:
        assert not close(picture(run.host, "wan"), both)
    pipe.fuse_lora()
    with pytest.raises(RefusedError, match="fused into the weights"):
        hasten.accelerate(pipe, folder / "recipe.yaml")


def test_sessions_may_end_in_any_order(tmp_path: Path) -> None:
    first, second = (student("wan", name=name).save(tmp_path / name) for name in ("one", "two"))
    only = [find_recipe(folder / "recipe.yaml").model_copy(update={"sampler": None}) for folder in (first, second)]
    pipe = small_wan()
    before, modules = picture(pipe, "wan"), dict(pipe.transformer.named_modules())
    one, two = (hasten.accelerate(pipe, recipe) for recipe in only)
    one.close()
    assert not close(picture(pipe, "wan"), before)
    two.close()
    assert torch.equal(picture(pipe, "wan"), before)
    assert dict(pipe.transformer.named_modules()) == modules
    with hasten.accelerate(pipe, second / "recipe.yaml"), pytest.raises(RefusedError, match="already"):
        hasten.accelerate(pipe, first / "recipe.yaml")
    assert torch.equal(picture(pipe, "wan"), before)


def test_a_copy_of_a_student_is_a_plain_pipeline(tmp_path: Path) -> None:
    import copy

    folder = student("pixart").save(tmp_path / "student")
    pipe = small_pixart()
    with hasten.accelerate(pipe, folder / "recipe.yaml"):
        assert type(copy.copy(pipe)) is type(small_pixart())


def test_another_model_is_refused(tmp_path: Path) -> None:
    recipe = student("wan").save(tmp_path / "student") / "recipe.yaml"
    with pytest.raises(ModelError, match="belongs on a WanTransformer3DModel, and this is a FluxTransformer2DModel"):
        hasten.accelerate(small_flux(), recipe)
    other = small_wan(layers=3)
    before = picture(other, "wan")
    with pytest.raises(ModelError, match=r"changes 'blocks.3\.\S+', which this WanTransformer3DModel does not have"):
        hasten.accelerate(other, recipe)
    assert torch.equal(picture(other, "wan"), before)
    with pytest.warns(UserWarning, match="trained on other weights"), hasten.accelerate(small_wan(seed=5), recipe):
        pass
    with warnings.catch_warnings(), hasten.accelerate(small_wan(), recipe):
        warnings.simplefilter("error")


def test_recipes_find_their_adapter_beside_them_and_do_not_say_where(tmp_path: Path) -> None:
    recipe = find_recipe(str(student("wan").save(tmp_path / "student") / "recipe.yaml"))
    assert recipe.adapter is not None
    assert str(tmp_path) not in recipe.to_yaml()
    changed = recipe.replace({"adapter.scale": 0.5})
    assert changed.adapter is not None
    assert changed.adapter.place == recipe.adapter.place == tmp_path / "student" / FILE
    assert from_yaml(recipe.to_yaml()).model_dump() == recipe.model_dump()
    (tmp_path / "student" / FILE).unlink()
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        hasten.accelerate(small_wan(), recipe)
    with pytest.raises(ModelError, match="pickles"):
        Lora.load(tmp_path / "x.bin")


def test_a_bundled_student_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student("wan").save(tmp_path / "quick")
    monkeypatch.setattr(lora_module, "BUNDLED", tmp_path)
    with hasten.accelerate(small_wan(), Recipe(adapter=RecipeAdapter(path="quick"))) as run:
        assert "layers changed" in run.trace.facts["adapter"]
    with pytest.raises(ModelError, match="cannot be read"):
        hasten.accelerate(small_wan(), Recipe(adapter=RecipeAdapter(path="quicker")))


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    network = small_flux().transformer
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name.endswith("proj_out")]
    assert len(names) > 2
    low = LowRank(torch.ones(1, network.proj_out.in_features), torch.ones(network.proj_out.out_features, 1), 1.0)
    hold = Attachment()
    put_on(hold, network, Lora("transformer", {"proj_out": low}), 1.0)
    assert [name for name, module in network.named_modules() if hasattr(module, "lora_A")] == ["proj_out"]
    hold.restore()


def test_half_the_scale_is_half_the_change() -> None:
    pipe = small_wan()
    lora = adapter(pipe.transformer, 2)
    name = "blocks.0.attn1.to_q"
    x = torch.randn(1, 5, 24)
    base = pipe.transformer.get_submodule(name)(x)
    wanted = x @ lora.layers[name].change().T
    hold = Attachment()
    put_on(hold, pipe.transformer, lora, 0.5)
    torch.testing.assert_close(pipe.transformer.get_submodule(name)(x) - base, 0.5 * wanted, rtol=1e-4, atol=1e-4)
    hold.restore()
    assert torch.equal(pipe.transformer.get_submodule(name)(x), base)


# --- in plain diffusers ---------------------------------------------------------------------------


def test_a_pipeline_that_cannot_load_a_lora_is_given_it_by_hand(tmp_path: Path) -> None:
    folder = student("pixart").save(tmp_path / "student")
    base = saved(small_pixart(), tmp_path / "base")
    loaded = open_pipeline(str(base), device="cpu", lora=str(folder))
    recipe = find_recipe(folder / "recipe.yaml").model_copy(update={"sampler": None})
    with hasten.accelerate(pipe := small_pixart(), recipe):
        assert torch.equal(picture(loaded, "pixart"), picture(pipe, "pixart"))


@pytest.mark.parametrize(("which", "how"), [("wan", "ode"), ("flux", "consistency"), ("pixart", "ode"), ("pixart", "consistency")])
def test_the_cards_lines_make_the_recipes_pictures(which: str, how: Any, tmp_path: Path) -> None:
    make, _ = HOSTS[which]
    base = saved(make(), tmp_path / "base")
    made = student(which, how, calls=2, name_of_base=str(base))
    folder = made.save(tmp_path / "student")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    *lines, last = code.strip().splitlines()
    assert last.startswith("result = pipe(")
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)  # noqa: S102  # our own lines
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(1, *made.role.host.shape, generator=torch.Generator().manual_seed(4))
    if how == "consistency":  # plain pipelines draw it from torch's own generator: give both the same
        pipe.scheduler.step = drawing(pipe.scheduler.step)
    call = {k: v for k, v in HOSTS[which][1].items() if k != "num_inference_steps"} | {"latents": z, "output_type": "pt"}
    plain = torch.as_tensor(eval(last.removeprefix("result = ").replace('"..."', "PROMPT, **CALL"), names | {"PROMPT": PROMPT, "CALL": call})[0])
    with hasten.accelerate(other := make(), folder / "recipe.yaml"):
        if how == "consistency":
            other.scheduler.step = drawing(other.scheduler.step)
        ours = torch.as_tensor(other(PROMPT, **call)[0])
    assert close(plain, ours)
    assert not close(ours, torch.as_tensor(make()(PROMPT, num_inference_steps=2, **call)[0]))


def drawing(step: Any) -> Any:
    """The scheduler's step with a generator of its own."""
    generator = torch.Generator().manual_seed(6)

    def drawn(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **(kwargs | {"generator": generator}))

    import inspect

    return drawn if "generator" in inspect.signature(step).parameters else step


def test_the_header_is_diffusers_own(tmp_path: Path) -> None:
    made = student("wan", "consistency", calls=4, licence="apache-2.0")
    folder = made.save(tmp_path / "student")
    with safe_open(folder / FILE, "pt") as file:
        head = file.metadata()
    told = {key.removeprefix("transformer."): value for key, value in json.loads(head[METADATA]).items()}
    assert (told["r"], told["lora_alpha"], told["rank_pattern"]) == (3, 6, {})
    sampler = json.loads(head["hasten"])["sampler"]
    assert sampler == json.loads((folder / "sampler.json").read_text())
    assert sampler["scheduler"] == "FlowMatchLCMScheduler"
    assert sampler["sigmas"] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert sampler["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["base_model"] == "some/teacher"
    assert card["license"] == "apache-2.0"
    assert "lora" in card["tags"]


def test_the_table_of_a_card_is_what_was_measured(tmp_path: Path) -> None:
    rows = [{"model": "teacher", "calls": 100, "distance": 2.71828}, {"model": "stu|dent", "calls": 1, "distance": None}]
    text = (student("wan", table=rows).save(tmp_path / "a") / "README.md").read_text()
    assert "| teacher | 100 | 2.718 |" in text
    assert "| stu\\|dent | 1 |  |" in text
    assert "Not measured yet" in (student("wan").save(tmp_path / "b") / "README.md").read_text()


# --- what is written ------------------------------------------------------------------------------


def adapter(network: nn.Module, seed: int, rank: int = 2) -> Lora:
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(rank, m.in_features, generator=g), 0.2 * torch.randn(m.out_features, rank, generator=g), 4.0)
        for name, m in network.named_modules() if isinstance(m, nn.Linear) and "attn1" in name
    }  # fmt: skip
    return Lora("transformer", layers, {"network": type(network).__name__})


def test_a_style_is_kept_by_both_and_exported_apart_or_merged(tmp_path: Path) -> None:
    pipe = small_wan()
    style = adapter(pipe.transformer, 8)
    add(pipe.transformer, style, "style")
    made = student("wan", pipe=pipe, base=("style",))
    alone, merged = lora_of(made.role), Lora.load(Student(**{**vars(made), "merge": True}).save(tmp_path / "merged"))
    for name, low in merged.layers.items():
        want = alone.layers[name].change()
        want = want + style.layers[name].change() if name in style.layers else want
        torch.testing.assert_close(low.change(), want, rtol=1e-5, atol=1e-6, msg=name)
    assert merged.layers["blocks.0.attn1.to_q"].rank == 5
    assert merged.layers["blocks.0.attn2.to_q"].rank == 3
    assert Lora.load(made.save(tmp_path / "alone")).layers.keys() == alone.layers.keys()
    with hasten.accelerate(plain := small_wan(), tmp_path / "merged" / "recipe.yaml"):
        one = picture(plain, "wan")
    plain.load_lora_weights(str(style.save(tmp_path / "style.safetensors")), adapter_name="style")
    with hasten.accelerate(plain, tmp_path / "alone" / "recipe.yaml"):
        assert close(picture(plain, "wan"), one)
    plain.unload_lora_weights()
    plain.load_lora_weights(str(tmp_path / "merged"))  # ranks that differ from layer to layer


def test_other_programs_files_are_written_where_they_do_not_disturb(tmp_path: Path) -> None:
    made = student("wan", also=("comfy", "kohya"), name="quick")
    folder = made.save(tmp_path / "student")
    assert sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.*")) == [
        "README.md", "comfy/quick.safetensors", "kohya/quick.safetensors", FILE, "recipe.yaml", "sampler.json",
    ]  # fmt: skip
    pipe = small_wan()
    pipe.load_lora_weights(str(folder))
    with pytest.raises(UsageError, match="names that ComfyUI has"):
        student("pixart", also=("comfy",)).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_whole_network_is_written_with_its_average(tmp_path: Path) -> None:
    pipe = small_wan()
    host, _ = learn(pipe, [PROMPT], **WAN_CALL)
    roles = Roles.of_copies(host, ("student",))
    weights = {name: value.detach() + 1 for name, value in roles["student"].parameters().items()}
    made = Student(roles["student"], pipe, "some/teacher", FewSteps.even(2, host.path, "ode"), weights, call=WAN_CALL)
    folder = made.save(tmp_path / "student")
    loaded = type(pipe.transformer).from_pretrained(folder / "transformer")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(next(roles["student"].host.network.parameters()) + 1, next(iter(weights.values())))
    assert "from_pretrained(\"FOLDER/transformer\")" in (folder / "README.md").read_text()
    with pytest.raises(UsageError, match="has no adapter of its own"):
        lora_of(roles["student"])
    with pytest.raises(UsageError, match="has no adapter to write"):
        Student(**{**vars(made), "also": ("kohya",)}).save(tmp_path / "x")
    with pytest.raises(RefusedError, match="is no network of diffusers"):
        save_network(trainer(Pairs(), tmp_path / "t", full=True).roles["student"], tmp_path / "y")


def test_the_average_of_a_training_is_what_is_written(tmp_path: Path) -> None:
    done = trainer(Pairs(), tmp_path / "t", average=0.5)
    done.fit()
    made = student_of(done, small_wan(), "some/teacher")
    lora = lora_of(made.role, made.weights)
    average, own = done.players["student"].average, done.players["student"].parameters
    assert torch.equal(lora.layers["first"].up, average["first.lora_B.student.weight"])
    assert not torch.equal(lora.layers["first"].up, own["first.lora_B.student.weight"])
    assert made.training["method"] == "pairs"
    with pytest.raises(UsageError, match="lack those of 'last'"):
        lora_of(made.role, {name: value for name, value in average.items() if name.startswith("first")})


def test_students_with_modules_beside_them_are_refused(tmp_path: Path) -> None:
    done = trainer(Pairs(), tmp_path / "t")
    done.state.heads = lambda role: [("weighting", nn.Linear(1, 1))] if role == "student" else []  # type: ignore[method-assign]
    assert student_of(done, small_wan(), "some/teacher").role is done.roles["student"]  # only trained with
    done.state.student = lambda: FlowMap.__new__(FlowMap)  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match=r"modules beside it \(FlowMap\)"):
        student_of(done, small_wan(), "some/teacher")
