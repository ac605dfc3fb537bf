"""Measures, on a network that computes everything, what each block does from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from hasten.caching.spans import Piece
from hasten.caching.stack_signals import BlockInput, Evidence, StackSignalState, token_norms
from hasten.drift import relative_l1
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.pipelines.seams.stack_gate import StackGates
from hasten.pipelines.seams.structure import BlockCall, Stack
from hasten.pipelines.seams.writes import twin
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate

QUERIES = 64
"""Attention is judged by this many queries at most, evenly spread over the tokens."""


@dataclass(slots=True)
class StepFacts:
    """What one step of one run showed, against the step before; 0-d tensors until `numbers` is called.

    blocks: relative L1 change of what each block adds to its longest stream. ratio: mean over tokens (and lists)
    of |R_t| / |R_(t-1)|, R what a whole list adds. input: `BlockInput`'s change. output: relative L1 change of the
    network's output.
    """

    index: int
    blocks: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    input: Tensor | None = None
    output: Tensor | None = None

    def numbers(self) -> list[float]:
        """[input, output, ratio, *blocks], NaN for what was not seen; one host synchronisation."""
        nan = torch.tensor(math.nan, device=self.blocks[0].device if self.blocks else None)
        ratio = torch.stack(self.ratios).mean() if self.ratios else nan
        known = [self.input if self.input is not None else nan, self.output if self.output is not None else nan]
        found: list[float] = torch.stack([*known, ratio, *self.blocks]).float().tolist()
        return found


class ProfileSeam(ReuseSeam):
    """Computes every call, and measures the blocks on one branch: the first that this network evaluates in a run.

    runs: per run, step index -> what `StepFacts.numbers` gives, for steps behind another one of this network. called: steps
    at which it ran. reason: why nothing could be measured.
    foreground: per block, the share of attention that falls on salient tokens over their share of all tokens, or why
    it is unknown.
    """

    def __init__(self, gate: DenoiserGate) -> None:
        super().__init__(gate)
        self.gates = StackGates(gate.model)
        self.runs: list[dict[int, list[float]]] = []
        self.called: set[int] = set()
        self.reason = "the whole network is one compiled function" if is_whole_compiled(gate.model) else ""
        self.foreground: list[float] | str = "no attention was seen"
        self._memory = Memory()
        self._facts: StepFacts | None = None
        self._output: Tensor | None = None
        self._branch: int | None = None
        if not self.reason:
            self.gates.attach()

    def begin_run(self, times: Sequence[float]) -> None:
        self.runs.append({})
        self._memory, self._output, self._branch = Memory(), None, None

    def compute(self, step: Step, call: Call, share: float) -> Any:
        def forward() -> Any:
            return self.gate.evaluate(call)

        self.called.add(step.index)
        self._branch = step.branch if self._branch is None else self._branch
        if self.reason or step.branch != self._branch or not self.runs:
            return super().compute(step, call, share)
        if not self.gates.stacks:
            spare = twin(call)
            self.gates.watch(lambda: self.gate.evaluate(spare))
            if not self.gates.stacks:
                self.reason = "; ".join(self.gates.refused.values())
                return super().compute(step, call, share)
            self.gates.restrict()
        self._facts = StepFacts(step.index)
        # The step in the middle of the run counts, or the one of this network that is nearest to it.
        looks = len(self.runs) == 1 and (step.index <= step.total // 2 or isinstance(self.foreground, str))
        look = AttentionLook() if looks else None
        walk = Watch(self.gates.stacks, step, self._memory, self._facts, look)
        result = self.gate.timed(step, lambda: self.gates.run(forward, walk), share=share)
        if look is not None:
            self.foreground = look.foreground(walk.saliency, sum(self.gates.sizes))
        return result

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        facts, self._facts = self._facts, None
        if facts is None:
            return outputs
        if self._output is not None and self._output.shape == outputs[0].shape:
            facts.output = relative_l1(outputs[0], self._output)
            self.runs[-1][facts.index] = facts.numbers()
        self._output = outputs[0].clone()
        return outputs

    def release(self) -> None:
        self.gates.detach()


class Memory:
    """What the step before left behind, for one branch of one run."""

    def __init__(self) -> None:
        self.residuals: dict[tuple[int, int], Tensor] = {}
        self.norms: dict[Piece, Tensor] = {}
        self.signal: StackSignalState = BlockInput().start()


class Watch:
    """One computed pass: what each block, and each whole list, adds to its longest stream."""

    def __init__(
        self, stacks: list[Stack], step: Step, memory: Memory, facts: StepFacts, look: AttentionLook | None
    ) -> None:
        self.sites = {stack.name: (site, stack) for site, stack in enumerate(stacks)}
        self.step, self.memory, self.facts, self.look = step, memory, facts, look
        self.path: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.saliency: Tensor | None = None

    def block(self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.sites:
            return block(*args, **kwargs)
        site, stack = self.sites[name]
        streams = stack.inputs(args, kwargs)
        now = streams[0]
        if site == 0 and index == 0:
            inner = {id(stream) for stream in streams}
            tensors = BlockCall(index, args, kwargs, None).tensors().values()
            others = [t for t in tensors if t.is_floating_point() and id(t) not in inner]
            change = self.memory.signal.measure(self.step, Evidence(streams, [], now, others))
            self.facts.input = change if isinstance(change, Tensor) else None
        before = self.before.get(site)
        if index == 0:
            self.path[site] = now
        elif before is not None and now is not before:
            self.path[site] = self.path[site] + (now - before)
        out = self._run(site, index, now, block, args, kwargs)
        after = stack.outputs(out)[0]
        self._measure(site, index, after - now)
        self.before[site] = after
        if index == stack.num - 1:
            self._measure_list(Piece(site, 0, stack.num), after - self.path[site])
            self.saliency = (after - after.mean(1, keepdim=True)).float().norm(dim=-1) if after.ndim == 3 else None
        return out

    def _run(
        self, site: int, index: int, now: Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.look is None or now.ndim != 3:
            return block(*args, **kwargs)
        with self.look.at((site, index), now.shape[1]):
            return block(*args, **kwargs)

    def _measure(self, site: int, index: int, residual: Tensor) -> None:
        old = self.memory.residuals.get((site, index))
        if old is not None and old.shape == residual.shape:
            self.facts.blocks.append(relative_l1(residual, old))
        self.memory.residuals[site, index] = residual

    def _measure_list(self, piece: Piece, residual: Tensor) -> None:
        norms = token_norms(residual)
        old = self.memory.norms.get(piece)
        if old is not None and old.shape == norms.shape:
            self.facts.ratios.append((norms / old).mean())
        self.memory.norms[piece] = norms


class AttentionLook(TorchFunctionMode):
    """Sees the queries and keys of torch's own attention inside a block: how much attention each token receives.

    Active only within `with look.at(...)`, in this thread. Only attention of a stream to itself is judged; other
    back ends than torch's are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[tuple[int, int], Tensor] = {}
        self._where, self._num = (0, 0), 0

    def at(self, where: tuple[int, int], num: int) -> AttentionLook:
        """The next block is `where` (list, index) and has a stream of `num` tokens."""
        self._where, self._num = where, num
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is scaled_dot_product_attention and self._where not in self.received:
            query = args[0] if args else given["query"]
            key = args[1] if len(args) > 1 else given["key"]
            if query.shape[-2] == key.shape[-2] == self._num and query.shape[1] == key.shape[1]:
                picked = query[..., :: max(1, self._num // QUERIES), :]
                scores = (picked @ key.transpose(-1, -2)).float() * (given.get("scale") or query.shape[-1] ** -0.5)
                self.received[self._where] = scores.softmax(-1).mean(dim=(0, 1, 2))
        return func(*args, **given)

    def foreground(self, saliency: Tensor | None, num: int) -> list[float] | str:
        """Per block: attention on salient tokens over their share of the tokens (1: none is preferred); else why not.

        saliency: [batch, tokens], how far each token's last stream is from the mean token's. Salient: above its mean.
        """
        if saliency is None or len(self.received) != num:
            return f"self-attention of torch was seen in {len(self.received)} of {num} blocks"
        weight = saliency.mean(0)
        salient = (weight > weight.mean()).float()
        lifts = [(received @ salient) / salient.mean() for _, received in sorted(self.received.items())]
        found: list[float] = torch.stack(lifts).tolist()
        return found
