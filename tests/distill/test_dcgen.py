"""A model moved to a deeper autoencoder: the tokens agree first, each part is trained in its time, plain diffusers opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.loop.draw import Draw
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Facts
from hasten.distill.methods.dcgen import DCGen, TwoSpaces, embedder, head
from hasten.distill.network.host_call import learn
from hasten.distill.network.new_latents import cast_new, moved, open_autoencoder, train_new_latents
from hasten.distill.network.roles import Adapter
from hasten.distill.train_config import load_config
from hasten.errors import HastenError, ModelError, UsageError
from hasten.pipelines import loading
from tests.distill.test_trainer import same, weights

CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 16,
        "use_resolution_binning": False, "clean_caption": False}  # fmt: skip


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained autoencoder with a quarter of the positions of tiny-image's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made: Any = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=6, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False, scaling_factor=2.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deeper")
    made.save_pretrained(folder)
    return folder


def trained(out: Path, vae: Path, stop: int | None = None, resume: bool = False, say: Any = lambda text: None, **more: Any) -> Trainer:
    given = {"model": "tiny-image", "method.autoencoder": str(vae), "method.align": 0.5, "method.head": 0.25, "data.count": 6,
             "data.prompts": ["a seven", "a two"], "data.call.num_inference_steps": 2, "train.batch": 3, "rank": 4,
             "train.steps": 4, "train.lr": 1e-2, "train.warmup": 0, "train.average": 0.0, **more}  # fmt: skip
    return train_new_latents(load_config("dcgen", None, given), out, resume=resume, stop_after=stop, progress=False, say=say)


@pytest.mark.filterwarnings("ignore:hasten. .* weights of role 'student' have not moved")  # halves of adapters, in four steps
def test_from_one_command_to_a_pipeline(deeper: Path, tmp_path: Path) -> None:
    """Parts are trained in turn, a resumed training is the same, and what is written is what was trained."""
    from diffusers import DiffusionPipeline

    said: list[str] = []
    whole = trained(tmp_path / "whole", deeper, say=said.append)
    assert "64 tokens become 16 in every evaluation." in said
    trained(tmp_path / "cut", deeper, stop=2)
    aligned = weights(tmp_path / "cut")
    again = trained(tmp_path / "cut", deeper, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    _changed_in_turn(aligned, weights(tmp_path / "whole"))
    _opens(DiffusionPipeline, tmp_path / "cut" / "student", again)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert ["apart" in row for row in log] == [True, True, False, False]
    assert whole.roles["student"].host.shape == (6, 8, 8)


def _changed_in_turn(aligned: dict[str, torch.Tensor], done: dict[str, torch.Tensor]) -> None:
    """After the first half of the steps only the embedder has moved; in the end everything has."""
    own = {name: value for name, value in aligned.items() if "weights/" in name}
    assert not bool(own["student/weights/heads.head.weight"].any())
    assert not any(bool(value.any()) for name, value in own.items() if "lora_B" in name)
    for name, value in own.items():
        if "lora_B" in name or "heads." in name:
            assert not torch.equal(value, done[name]), name


def _opens(kind: Any, folder: Path, trainer: Trainer) -> None:
    """Plain diffusers makes pictures with it, and its network says what the trained one said."""
    pipe = kind.from_pretrained(folder, use_safetensors=True)
    assert sorted(file.name for file in folder.iterdir() if file.is_file()) == ["README.md", "hasten.json", "model_index.json"]
    assert json.loads((folder / "hasten.json").read_text())["call"]["guidance_scale"] == 1.0  # it is in the pictures already
    assert not any(str(folder.parent) in file.read_text() for file in folder.rglob("*.json"))
    picture = pipe("a seven", **(CALL | {"output_type": "pt"})).images
    assert picture.shape == (1, 3, 32, 32) and bool(picture.isfinite().all())
    role, batch = trainer.roles["student"], trainer.data.batch(torch.arange(2), Draw(0, 0, range(2)))
    x, tau = torch.randn(2, *role.host.shape), torch.tensor([0.3, 1.2], dtype=torch.float64)
    plain = pipe.transformer
    with torch.no_grad():
        wanted = role.answer(x, tau, batch.condition)
        path = role.host.path
        found = plain(**role.host.arguments(x, path.time(tau), batch.condition))
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-4)


def test_the_moved_network_keeps_all_but_two_layers(deeper: Path) -> None:
    pipe = loading.open_pipeline("tiny-image", device="cpu", quiet=True)
    host, _ = learn(pipe, ["a seven"], **CALL)
    new = moved(pipe, host, open_autoencoder(deeper), CALL)
    old, network = pipe.transformer.state_dict(), new.transformer
    odd = {name for name, value in network.state_dict().items() if name not in old or not torch.equal(value, old[name])}
    assert odd == {f"{place}.{end}" for place in ("pos_embed.proj", "proj_out") for end in ("weight", "bias")}
    assert not any(bool(value.any()) for value in head(network).parameters())
    assert embedder(network).in_channels == 6
    # New tokens stand where every second one stood.
    grid = pipe.transformer.pos_embed.pos_embed.view(8, 8, -1)
    torch.testing.assert_close(network.pos_embed.pos_embed.view(4, 4, -1), grid[::2, ::2])
    assert pipe.vae is not new.vae and pipe.transformer.config.in_channels == 4


def test_tokens_that_can_agree_come_to_agree(deeper: Path) -> None:
    """Old latents that are a linear function of the new ones: the best embedder gives exactly the mean of the old tokens."""
    pipe = loading.open_pipeline("tiny-image", device="cpu", quiet=True)
    host, conditions = learn(pipe, ["a seven"], **CALL)
    moved_pipe = moved(pipe, host, open_autoencoder(deeper), CALL)
    new, _ = learn(moved_pipe, ["a seven"], **CALL)
    roles = cast_new(host, new, Adapter(4))
    state = DCGen(autoencoder="x", align=0.5).start(Facts(roles, 100, new.shape))
    g = torch.Generator().manual_seed(0)
    y = torch.randn(64, *new.shape, generator=g)
    mixed = torch.einsum("oc,bchw->bohw", torch.randn(4, 6, generator=g) / 6**0.5, y)
    x = mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = TwoSpaces(conditions.rows(torch.zeros(64, dtype=torch.int64)), conditions, y, None, new.shape, old=x)
    weights = [value for _, module in state.heads("student") for value in module.parameters()]
    adam, apart = torch.optim.Adam(weights, lr=2e-2), []
    for _ in range(120):
        loss = state.loss("student", batch, Draw(0, 0, range(64)), 0, {})
        adam.zero_grad()
        torch.autograd.backward(loss.rows.mean())
        adam.step()
        apart.append(float(loss.metrics["apart"]))
    assert apart[0] > 0.5 and apart[-1] < 1e-2, apart[::20]
    assert not any(value.requires_grad for value in head(new.network).parameters())  # its time comes later


def test_what_cannot_be_moved_is_said(deeper: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[HastenError], str]] = [
        ({"method.autoencoder": ""}, UsageError, "Which autoencoder"),
        ({"full": True}, UsageError, "student.full has no meaning for dcgen"),
        ({"method.autoencoder": str(tmp_path)}, UsageError, "is no folder of an AutoencoderKL"),
        ({"model": "tiny-flux"}, ModelError, "FluxTransformer2DModel has no pos_embed.proj or patch_embed.proj"),
    ]
    for number, (given, kind, words) in enumerate(cases):
        with pytest.raises(kind, match=words):
            trained(tmp_path / str(number), deeper, **given)
    shallow = tmp_path / "same"
    shutil.copytree(Path(loading.__file__).parent / "bundled" / "tiny-image" / "vae", shallow)
    with pytest.raises(ModelError, match="They must be square and smaller"):
        trained(tmp_path / "same-size", shallow)

