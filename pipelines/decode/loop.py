"""The decode loop: prompt, then rounds of drafting, reading, verifying and committing, until every row is finished.

A round waits for the device once: for the accepted path, the new tokens and how close they were. (Where a processor looks
at the prefix, or nobody knows what it remembers, it waits for that, too.)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.pipelines.decode import compat
from hasten.pipelines.decode.call import Call
from hasten.pipelines.decode.laws import Processors, TreeTarget
from hasten.pipelines.decode.ordered import first_path, in_order
from hasten.pipelines.decode.rows import Rows
from hasten.pipelines.decode.steps import MOST_NUMBERS, Steps
from hasten.pipelines.decode.tail import DenseTail, Tail
from hasten.pipelines.decode.told import Told
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.tail import KeptTail
from hasten.rounds import Round
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Facts, Outcome, Prefill, Verdict

if TYPE_CHECKING:
    from hasten.pipelines.decode.session import DecodeSession


class Loop:
    """One call of `generate`, with the parts of a session's recipe."""

    def __init__(self, session: DecodeSession, call: Call) -> None:
        self.session, self.call, self.model = session, call, session.host
        self.forward = compat.forward(self.model, call.config, call.arguments["past_key_values"])
        self.rows = Rows(call.ids, call.mask, call.criteria, call.pad, call.streamer)
        self.processors = Processors(call.processors, bool(call.config.do_sample))
        self.scores: list[list[Tensor]] = [[] for _ in range(self.rows.count)]
        self.logits: list[list[Tensor]] = [[] for _ in range(self.rows.count)]
        self.keeps = call.keeps
        if self.keeps[0]:
            self.rows.scores = self.scores
        self.needs = sorted({int(need.removeprefix("hidden:")) for need in session.drafter.needs})
        self.seen: Outcome | None = None
        self.whole = True

    def run(self) -> Any:
        """The result of `generate`."""
        prefill = self._prompt()
        facts = Facts(
            rows=self.rows.count, vocabulary=prefill.logits.shape[-1], device=prefill.logits.device,
            sampled=self.processors.sampled, warp=self.processors, ends=tuple(self.rows.ends), host=self.model, tail=self.tail,
            kept=self.session.kept, weighs=self.session.drafter.weighs,
        )  # fmt: skip
        self.drafter, self.verifier = self.session.drafter.start(facts), self.session.verifier.start(facts)
        self.pace = self.session.pace_of(facts)
        self.vocabulary = facts.vocabulary
        self._first(prefill)
        while not self.rows.over:
            self._round()
        if self.rows.streamer is not None:
            self.rows.streamer.end()
        aligned = self.whole and len({len(row) for row in self.rows.written}) == 1
        cache = self.tail.finish(aligned) if self.call.config.return_dict_in_generate else None
        return self.call.result(self.rows.result(), self.scores, self.logits, cache)

    # --- the prompt -------------------------------------------------------------------------------

    def _prompt(self) -> Prefill:
        """Read the prompt into the cache, in pieces where the call asks for them."""
        ids, mask, cache = self.call.ids, self.call.mask, self.call.arguments["past_key_values"]
        if compat.grows(cache) and not cache.get_seq_length():
            cache = compat.growing()
        given, position = self.call.arguments.get("attention_mask"), (mask.cumsum(1) - 1).clamp(min=0)
        begin, piece = int(cache.get_seq_length()), getattr(self.call.config, "prefill_chunk_size", None) or ids.shape[1]
        hidden: list[tuple[Tensor, ...]] = []
        for start in range(begin, ids.shape[1], piece):
            stop = min(start + piece, ids.shape[1])
            found = self._call(
                input_ids=ids[:, start:stop], position_ids=position[:, start:stop], past_key_values=cache, use_cache=True,
                attention_mask=None if given is None else given[:, :stop], **compat.last_logits(self.model),
            )  # fmt: skip
            hidden.append(self._hidden(found))
        self.tail = self._tail(cache, mask)
        joined = {f"hidden:{need}": torch.cat([each[at] for each in hidden], 1) for at, need in enumerate(self.needs)}
        return Prefill(ids, mask, found.logits[:, -1], joined)

    def _tail(self, cache: Any, mask: Tensor) -> Tail:
        """What drafts are read behind, of a cache that has read the prompt; mask int64 [B, P]."""
        if isinstance(cache, KVCache):
            return KeptTail(cache)
        config = self.model.config.get_text_config(decoder=True)
        additive = self.model.dtype if compat.ATTENTION.get(config._attn_implementation) else None
        window = getattr(config, "sliding_window", None)
        return DenseTail(cache, mask, compat.layer_kinds(config), window, additive)

    def _first(self, prefill: Prefill) -> None:
        """The token behind the prompt."""
        scores = self.processors.first(self.call.ids, prefill.logits)
        drawn = scores.softmax(-1) / torch.empty_like(scores).exponential_() if self.processors.sampled else scores
        for row, token in enumerate(drawn.argmax(-1).tolist()):
            self.keep(row, prefill.logits[row : row + 1], scores[row : row + 1])
            self.rows.write(row, [token])
        if not self.processors.sampled:
            self.session.lead(scores[:, None], [1] * self.rows.count)
        self.rows.stream()
        self.context = self._context()
        self.drafter.begin(prefill, self.context)

    # --- a round ----------------------------------------------------------------------------------

    def _round(self) -> None:
        """A round with drafts, or some without."""
        began, context = time.perf_counter(), self.context
        asked = self.pace.next(self._most(context))
        steps = self._steps(1 + self.pace.quiet()) if asked == 0 else None
        if steps is not None:
            return self._account(steps.run())
        if self.processors.kind != "alone":
            self.processors.show([self.rows.so_far(row) for row in range(self.rows.count)])
        proposal = self._proposal(context, asked)
        drafted = time.perf_counter()
        steps = self._steps(1) if proposal.size == 1 else None
        if steps is not None:
            return self._account(steps.run(asked, drafted - began))
        return self._account([self._verified(proposal, asked, [began, drafted])])

    def _account(self, rounds: list[Round]) -> None:
        for each in rounds:
            self.pace.learn(each)
        self.session.trace.rounds += rounds

    def _steps(self, most: int) -> Steps | None:
        """Up to `most` rounds without drafts in one go; None where each has to be a round of its own."""
        if self.processors.kind != "alone" and self.rows.level is None:
            return None
        space, logits = self.tail.space(), self.rows.count * self.vocabulary
        most = min(most, self.context.reach + 1, max(1, MOST_NUMBERS // logits), most if space is None else space)
        walk = self.tail.walk(most)
        return None if walk is None else Steps(self, walk, most)

    def _verified(self, proposal: Proposal, asked: int, clock: list[float]) -> Round:
        """Read, verify and commit a proposal. clock: when drafting began, and when it was over."""
        context, reach = self.context, self.context.reach
        logits, hidden = self._read(proposal)
        verdict, scores = self._verdict(proposal, logits, context)
        told = Told.of(proposal, verdict)
        clock.append(time.perf_counter())
        lengths = self._write(context, told, verdict.path, logits, scores)
        self.tail.commit(verdict.path, torch.tensor(lengths), self.longest(), straight=told.straight(lengths))
        self.tell(Outcome(proposal, verdict, told.written(lengths, verdict.path.device), lengths, logits, hidden))
        self.rows.stream()
        clock.append(time.perf_counter())
        ahead = min(max(lengths), max(1, reach - self.context.reach))
        return told.round(asked, context.active, lengths, ahead, clock)

    def tell(self, outcome: Outcome) -> None:
        """Go on behind what was committed; the drafter learns what became of it."""
        self.seen = outcome
        self.context = self._context()
        self.drafter.observe(outcome, self.context)

    def _context(self) -> Context:
        last = torch.tensor([row[-1] for row in self.rows.texts], device=self.call.ids.device)
        return Context(self.rows.texts, last, self.rows.active, self.rows.room, self.seen, self.pace.weigh)

    def _most(self, context: Context) -> int:
        """Drafts that a row can have: what the drafter makes, the cache holds, and the room leaves."""
        space = self.tail.space()
        most = self.session.drafter.nodes if context.reach > 0 else 0
        return most if space is None else min(most, (1 << (space.bit_length() - 1)) - 1)

    def _proposal(self, context: Context, asked: int) -> Proposal:
        if asked == 0:
            return nothing(context.last)
        proposal = self.drafter.propose(context, asked)
        if proposal.size - 1 > asked:
            raise RefusedError(
                f"Drafter {self.session.drafter.kind!r} was asked for {asked} drafts of a row and made {proposal.size - 1}. It has"
                " to stop at `nodes`."
            )
        if self.processors.kind == "order":
            proposal = first_path(proposal)
        if self.tail.space() is None:
            return proposal
        return proposal.widened(1 << (proposal.size - 1).bit_length())  # fixed shapes: a compiled forward has few of them

    def read(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's logits [B, N, V], and the hidden states that the drafter needs, for tokens [B, N]."""
        found = self._call(**inputs)
        return found.logits, {f"hidden:{need}": each for need, each in zip(self.needs, self._hidden(found), strict=True)}

    def _read(self, proposal: Proposal) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's logits [B, N, V] behind every node, and the hidden states that the drafter needs."""
        inputs = self.tail.inputs(proposal)
        with self.drafter.reading(proposal):
            if proposal.vectors is None or proposal.prompt is None:
                return self.read(input_ids=proposal.tokens, **inputs)
            plain = self.model.get_input_embeddings()(proposal.tokens)
            mixed = torch.where(proposal.prompt[..., None], proposal.vectors.to(plain.dtype), plain)
            return self.read(inputs_embeds=mixed, **inputs)

    def _call(self, **inputs: Any) -> Any:
        more = {"output_hidden_states": True} if self.needs else {}
        return self.forward(**inputs, **more, return_dict=True)

    def _hidden(self, found: Any) -> tuple[Tensor, ...]:
        return tuple(found.hidden_states[need] for need in self.needs)

    def _verdict(self, proposal: Proposal, logits: Tensor, context: Context) -> tuple[Verdict, Tensor]:
        """The verdict, and the processed scores behind the nodes (in order: those of its path alone), [B, N, V]."""
        if self.processors.kind == "order":
            return in_order(proposal, logits, self.processors, self.rows.so_far(0), context.room[0], self.rows.ends)
        target = TreeTarget(self.processors, logits, proposal.tokens, proposal.parent)
        return self.verifier.verify(proposal, target), target.scores

    def _write(self, context: Context, told: Told, path: Tensor, logits: Tensor, scores: Tensor) -> list[int]:
        """Write down what was accepted; returns how many tokens each row took."""
        path = path[:, : max(told.count) + 1]
        raw = behind(path, logits) if self.keeps[1] else logits
        scores = behind(path, scores) if self.keeps[0] or not self.processors.sampled else scores
        lengths = []
        for row, active in enumerate(context.active):
            tokens = told.tokens(row) if active else []
            if active and any(self.keeps):
                self.keep(row, raw[row, : len(tokens)], scores[row, : len(tokens)])
            lengths.append(self.rows.write(row, tokens))
        if not self.processors.sampled:
            self.session.lead(scores, lengths)
        return lengths

    def keep(self, row: int, logits: Tensor, scores: Tensor) -> None:
        """Keep what `generate` returns on request: logits, scores [n, V] behind the tokens that are written next."""
        if self.keeps[0]:
            self.scores[row] += scores.unbind(0)
        if self.keeps[1]:
            self.logits[row] += logits.float().unbind(0)

    def longest(self) -> int:
        """Slots of the longest row that still writes: its prompt and all new tokens but the last, which is not read yet. What
        finished rows have behind that is dropped, so that fixed caches have room for the others."""
        lengths = [len(row) for row in self.rows.written]
        open_ = [length for length, active in zip(lengths, self.rows.active, strict=True) if active]
        longest = max(open_ or lengths)
        self.whole = self.whole and max(lengths) == longest
        return self.rows.width + longest - 1


def behind(path: Tensor, each: Tensor) -> Tensor:
    """Of `each` [B, N, V], what belongs to the nodes of `path` int64 [B, D]; node 0 behind its end."""
    return each.gather(1, path.clamp(min=0)[..., None].expand(-1, -1, each.shape[-1]))
