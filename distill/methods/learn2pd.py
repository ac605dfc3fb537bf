"""A filter that tells which tokens are final already (Learn2PD, arXiv 2509.25188), for masked language models.

The model writes its texts once, one slot per evaluation; the data are what each evaluation said of the slots that were open,
and whether that is what stood there in the end (`text_filter.py`). The loss is binary cross-entropy. When the training is
over, the probability from which on a slot is written is chosen on texts that were held back.

Differs from the paper: `form` "slots" looks at a slot and two neighbours to each side, at confidence, lead, entropy, whether they
are open, where they stand, and how much of the block is open; the paper's form, "block", at the confidences of a block
alone. Texts are the model's own, and unless `oracle` is set the states are those of sequential decoding.

Shapes: B rows of I inputs and O outputs (one slot, or all of a block).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hasten.distill.data.store import Store
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.filter import Told, as_store, check, collect, finished, save_filter
from hasten.distill.text.filter_prompts import Asked
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, TextRole, TextRoles
from hasten.errors import UsageError
from hasten.pipelines.text.filters import FILES
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.filter import INPUTS, FilterNet, Form

SETTINGS = TrainSettings(steps=600, batch=4096, lr=1e-2, weight_decay=1e-3, average=0.0, cooldown=0.9, warmup=0)
"""What `hasten train filter` trains with."""


class Learn2PD(TextMethod):
    """form, oracle: see above. hidden: width of the filter. false_commits: the expected share of a text's slots that may be
    written wrong."""

    kind: ClassVar[str] = "learn2pd"
    trains: ClassVar[tuple[str, ...]] = ()
    recipe: ClassVar[str] = "learned-filter"
    writes: ClassVar[str] = "learned-filter"
    causal: ClassVar[bool] = False
    form: Form = "slots"
    hidden: int = Field(32, ge=1)
    false_commits: float = Field(0.01, gt=0, lt=1)
    oracle: bool = False

    def start(self, facts: Facts) -> MethodState:
        return _FilterState(self, facts)

    def used(self, model: str, student: Path) -> str:
        name = "learned-filter" if self.form == "slots" else "learn2pd"
        return f"hasten generate {model} --prompt TEXT --recipe {name}:weights={student / FILES[self.form]}"

    def depends(self) -> dict[str, object]:
        return {"form": self.form, "oracle": self.oracle}

    def make(self, host: TextHost, tokenizer: Any, asked: Asked, recipe: Recipe, seed: int, say: Told) -> Store:
        check(len(asked.prompts), asked.new, self.false_commits)
        traces = collect(host, asked.prompts, asked.new, recipe, form=self.form, oracle=self.oracle, told=say)
        return as_store(traces, seed)


class _FilterState(TextState):
    def __init__(self, method: Learn2PD, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, device = method, self.learner.call.host.device
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = FilterNet(method.form, method.hidden, seen=INPUTS).to(device)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("filter", self.net)]

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        found = batch.condition.tensors
        if "inputs" not in found:
            raise UsageError(f"A filter learns from states of decoding, and the data has {', '.join(found)}.")
        said, valid = self.net(found["inputs"]), found["valid"].float()
        cross = F.binary_cross_entropy_with_logits(said, found["right"].float(), reduction="none") * valid
        told = ((said > 0) == found["right"]).float() * valid
        return Loss(cross.sum(1) / valid.sum(1).clamp(min=1), {"told": (told.sum() / valid.sum().clamp(min=1)).detach()})

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the filter under the name by which a model's folder has it."""
        assert self.rows is not None
        folder.mkdir(parents=True, exist_ok=True)
        net = self.filter(weights)
        card = {"model": base, **finished(net, self.rows, self.method.false_commits), "oracle": self.method.oracle}
        save_filter(net, card, self.learner.call.network, folder / FILES[self.method.form])

    def filter(self, weights: Mapping[str, Tensor] | None) -> FilterNet:
        """The trained filter, on the CPU. weights: its average, None for none."""
        net = FilterNet(self.net.form, self.method.hidden, seen=INPUTS)
        averaged = {name.removeprefix("heads.filter."): value for name, value in (weights or {}).items()}
        net.load_state_dict({**self.net.state_dict(), **averaged})
        return net.eval().requires_grad_(False)


def train(host: TextHost, rows: Store, method: Learn2PD, settings: TrainSettings = SETTINGS) -> FilterNet:
    """A filter of `rows` (`as_store`), trained in a folder that is gone afterwards."""
    roles = TextRoles(teacher=TextRole("teacher", TextCall(cast(Any, host)), None, (), False))
    chosen = settings.model_copy(update={"batch": min(settings.batch, len(rows))})
    with TemporaryDirectory() as folder:
        trainer = Trainer(method, roles, rows, chosen, Path(folder), (), progress=False)
        trainer.fit()
        return cast(_FilterState, trainer.state).filter(None)


def fit(
    host: TextHost, asked: Asked, recipe: Recipe, out: str | Path, method: Learn2PD, *, seed: int = 0, model: str = "",
    told: Told = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Train a filter for `recipe` on generations behind `asked`, write it to `out`, return its card: `hasten train filter`.

    The recipe's commit rule is replaced by one slot at a time. A third of the prompts is kept for the threshold. model: its
    name, for the card; what binds the filter to it is a stamp of its weights.

    Raises `UsageError` where there are too few prompts for `false_commits`.
    """
    rows = method.make(host, None, asked, recipe, seed, told)
    told(f"learning from {len(rows):,} states")
    net = train(host, rows, method, SETTINGS.model_copy(update={"seed": seed}))
    card = {"model": model, **finished(net, rows, method.false_commits), "oracle": method.oracle, "seed": seed}
    save_filter(net, card, host.model, out)
    return card
