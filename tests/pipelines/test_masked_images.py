"""Images on the loop of texts: schedule, noise, guidance, ReCAP's groups, diffusers' scheduler, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AmusedScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.caching.kv_values import ValueDrift
from hasten.canvas import DONE, MASK, Canvas, TextFacts
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.judge import Judge
from hasten.pipelines.masked_codes import Codebook, Words, cut_patches
from hasten.pipelines.masked_images import MaskedImagePipeline
from hasten.pipelines.recipes.text_images import maskgit, recap_tokens
from hasten.recipe import Recipe
from hasten.samplers.commit_images import Annealed, Curve
from hasten.samplers.scores import Draw, Logits, Scores, measure

WORDS = Words(codes=12, classes=3, names=("ant", "bee", "cat"))
SIDE, PATCH = 6, 2
SLOTS = (SIDE // PATCH) ** 2


def model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS.size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
            pad_token_id=WORDS.mask, mask_token_id=WORDS.mask, hasten_diffusion={"kind": "full"},
            hasten_images={"codes": WORDS.codes, "classes": WORDS.classes, "names": list(WORDS.names)},
        )
    ).eval()  # fmt: skip


def book() -> Codebook:
    g = torch.Generator().manual_seed(0)
    return Codebook(torch.rand(WORDS.codes, PATCH**2, generator=g), SIDE)


@pytest.fixture(scope="module")
def pipe() -> MaskedImagePipeline:
    return MaskedImagePipeline(model(), book())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


class TestCodebook:
    def test_codes_come_back(self) -> None:
        codes = torch.randint(WORDS.codes, (5, SLOTS), generator=torch.Generator().manual_seed(1))
        assert torch.equal(book().encode(book().decode(codes)), codes)

    def test_patches_lie_row_by_row(self) -> None:
        image = torch.arange(36.0).view(1, 6, 6)
        assert cut_patches(image, 2)[0, 1].tolist() == [2, 3, 8, 9]
        assert cut_patches(image, 2)[0, 3].tolist() == [12, 13, 18, 19]

    def test_kmeans_finds_groups_and_blank(self) -> None:
        g = torch.Generator().manual_seed(2)
        levels = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (40, 9), generator=g)]
        images = levels.view(40, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
        found = Codebook.fit(images, 8, 2, 300, 5, g)
        assert not found.patches[0].any()
        assert (found.decode(found.encode(images)) - images).abs().max() < 1e-6

    def test_refuses(self) -> None:
        with pytest.raises(UsageError, match="6, 6"):
            book().encode(torch.zeros(1, 8, 8))
        with pytest.raises(UsageError, match=r"\[n, 9\]"):
            book().decode(torch.zeros(2, 8, dtype=torch.int64))
        with pytest.raises(ModelError, match="square"):
            Codebook(torch.zeros(4, 5), 6)
        with pytest.raises(UsageError, match="not blank"):
            Codebook.fit(torch.zeros(3, 6, 6), 4, 2, 10, 1, torch.Generator())


def numbers(rule: Curve, slots: int) -> list[int]:
    """Slots written by each evaluation of one block, as the rule plans them."""
    canvas = Canvas.of([torch.tensor([1])], [slots], TextFacts(1, 9, 8))
    canvas.enter(canvas.open, torch.tensor([[1, 1 + slots]]))
    found = []
    while bool(canvas.masked.any()):
        count = int(rule.start().planned(canvas, 1))
        open_slots = (canvas.status[0] == MASK).nonzero()[:count, 0]
        canvas.status[0, open_slots] = 2
        canvas.since += 1
        found.append(count)
    return found


class TestCurve:
    @pytest.mark.parametrize("steps", [1, 2, 8, 16, 24, 32, 64])
    def test_maskgit(self, steps: int) -> None:
        """MaskGIT's own loop: mask_len = max(1, min(open - 1, floor(m cos))), and all at the last."""
        left, expected = 64, []
        for step in range(steps):
            wanted = math.floor(64 * math.cos(math.pi / 2 * (step + 1) / steps))
            after = 0 if step == steps - 1 else max(1, min(left - 1, wanted))
            expected.append(left - after)
            left = after
        assert numbers(Curve(steps=steps), 64) == expected
        assert sum(expected) == 64 and len(expected) == steps

    def test_power(self) -> None:
        assert numbers(Curve(steps=4, power=1.0), 8) == [2, 2, 2, 2]
        assert numbers(Curve(steps=2, power=2.0), 8) == [2, 6]

    def test_fewer_slots_than_steps(self) -> None:
        assert numbers(Curve(steps=9), 5) == [1] * 5

    @pytest.mark.parametrize("steps", [5, 13])
    def test_several_at_once(self, steps: int) -> None:
        canvas = Canvas.of([torch.tensor([1])], [40], TextFacts(1, 9, 8))
        canvas.enter(canvas.open, torch.tensor([[1, 41]]))
        one = numbers(Curve(steps=steps), 40)
        for evaluations in range(1, 5):
            assert int(Curve(steps=steps).start().planned(canvas, evaluations)) == sum(one[:evaluations])


class TestAnnealed:
    def rank(self, step: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        canvas = Canvas.of([torch.tensor([1])] * 2, [5, 5], TextFacts(1, 9, 8))
        canvas.enter(canvas.open, torch.tensor([[1, 6]] * 2))
        canvas.step += step
        from hasten.samplers.scores import Scores

        scores = Scores.blank(canvas)
        g = torch.Generator().manual_seed(4)
        logits = Logits(torch.randn(2, 5, 9, generator=g), torch.arange(1, 6).expand(2, 5), torch.arange(2))
        state = Annealed(steps=8, temperature=temperature).start()
        measure(logits, state, Draw(torch.tensor([5, 6]), 1.0), torch.tensor([8]), canvas, scores)
        return scores.rank[:, 1:], scores.confidence[:, 1:]

    def test_fades_out(self) -> None:
        rank, known = self.rank(7, 4.5)
        assert torch.allclose(rank, known.log())

    def test_is_noise_of_the_step(self) -> None:
        """The noise is the same law at each step, times what is left of the temperature."""
        first, known = self.rank(0, 4.5)
        half, same = self.rank(0, 2.25)
        assert torch.equal(known, same)
        assert torch.allclose(first - known.log(), 2 * (half - known.log()), atol=1e-5)
        assert (first - known.log()).abs().min() > 1e-3


def known(canvas: Canvas, token: torch.Tensor, probability: torch.Tensor, rule: Annealed) -> Scores:
    """Scores with these tokens and their probabilities at the image's slots, ranked."""
    scores = Scores.blank(canvas)
    scores.token[:, 1:], scores.confidence[:, 1:] = token, probability
    scores.seen = canvas.masked
    scores.rank = rule.start().rank(scores, canvas, Draw(torch.arange(len(token))))
    return scores


class TestAgainstDiffusers:
    """AmusedScheduler's decisions on the same logits and the same drawn tokens."""

    @pytest.mark.parametrize("steps", [1, 2, 5, 8, 12, 24, 32, 64])
    def test_same_slots(self, steps: int) -> None:
        """Each evaluation writes the same slots, but that two thirds through, where the cosine is one half, the float32 of
        diffusers leaves one slot fewer open."""
        theirs, g = AmusedScheduler(mask_token_id=9), torch.Generator().manual_seed(steps)
        theirs.set_timesteps(steps, temperature=(0, 0))
        sample = torch.full((2, 64), 9)
        canvas = Canvas.of([torch.tensor([1])] * 2, [64, 64], TextFacts(1, 9, 9))
        canvas.enter(canvas.open, torch.tensor([[1, 65]] * 2))
        rule, score = Curve(steps=steps), Annealed(steps=steps, temperature=0.0)
        for number, time in enumerate(theirs.timesteps):
            logits = 2 * torch.randn(2, 64, 9, generator=g)
            after = theirs.step(logits, time, sample, generator=g)
            token = after.pred_original_sample
            probability = logits.softmax(-1).gather(-1, token.clamp(max=8)[..., None])[..., 0]
            scores = known(canvas, token, probability, score)
            mine = rule.start().select(scores, canvas)[:, 1:]
            wrote = (sample == 9) & (after.prev_sample != 9)
            odd = 3 * (number + 1) == 2 * steps
            assert not (mine & ~wrote).any()
            assert (wrote.sum(1) - mine.sum(1)).tolist() == ([1, 1] if odd else [0, 0])
            sample = after.prev_sample
            canvas.ids[:, 1:] = sample
            canvas.status[:, 1:] = torch.where(sample == 9, MASK, DONE).to(torch.uint8)
            canvas.step, canvas.since = canvas.step + 1, canvas.since + 1
        assert not canvas.masked.any()

    def test_more_steps_than_slots(self) -> None:
        """Theirs evaluates on with one slot open and writes nothing; here the image is over."""
        theirs, sample, empty = AmusedScheduler(mask_token_id=9), torch.full((1, 5), 9), 0
        theirs.set_timesteps(20, temperature=(0, 0))
        for time in theirs.timesteps:
            after = theirs.step(torch.zeros(1, 5, 9), time, sample, generator=torch.Generator().manual_seed(int(time)))
            empty += int(torch.equal(after.prev_sample, sample))
            sample = after.prev_sample
        assert empty > 0
        assert numbers(Curve(steps=20), 5) == [1] * 5

    def test_noise_fades_otherwise(self) -> None:
        """Theirs falls from 2 to 0 in T - 1 strides; MaskGIT's, here, is 4.5 times what is left after the evaluation."""
        theirs = AmusedScheduler(mask_token_id=9)
        theirs.set_timesteps(8)
        assert torch.allclose(theirs.temperatures, 2 * (1 - torch.arange(8) / 7))
        canvas = Canvas.of([torch.tensor([1])], [64], TextFacts(1, 9, 9))
        half = torch.full((1, 64), 0.5)
        for step in range(8):
            warm, cold = (known(canvas, half.long(), half, Annealed(steps=8, temperature=t)).rank for t in (4.5, 0.0))
            law = known(canvas, half.long(), half, Annealed(steps=1 << 30, temperature=1.0)).rank - cold  # the noise itself
            assert torch.allclose(warm[:, 1:] - cold[:, 1:], 4.5 * (1 - (step + 1) / 8) * law[:, 1:], atol=1e-4)
            canvas.step += 1


class TestPipeline:
    @pytest.mark.parametrize("recipe", [maskgit(steps=4), recap_tokens(steps=6, full=2), recap_tokens(steps=9, full=1, local=2)])
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_alone_and_together(self, pipe: MaskedImagePipeline, recipe, scale: float) -> None:  # type: ignore[no-untyped-def]
        told = [0, 2, WORDS.classes, 1]
        both = pipe(told, recipe=recipe, guidance_scale=scale, generator=seeds(1, 2, 3, 4)).codes
        for row, number in enumerate(told):
            single = pipe(number, recipe=recipe, guidance_scale=scale, generator=seeds(row + 1)).codes
            assert torch.equal(single[0], both[row])
        assert int(both.max()) < WORDS.codes

    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def test_a_batch_changes_no_image(self, pipe: MaskedImagePipeline, data: st.DataObject) -> None:
        """Whoever else is drawn, in whatever order: the same class and seed are the same image."""
        local, full = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
        recipe = recap_tokens(steps=data.draw(st.integers(1, 7)), local=local, full=full)
        scale = data.draw(st.sampled_from([1.0, 3.0]))
        one = (data.draw(st.integers(0, WORDS.classes)), data.draw(st.integers(0, 1 << 40)))
        others = st.lists(st.tuples(st.integers(0, WORDS.classes), st.integers(0, 1 << 40)), max_size=4)
        before, behind = data.draw(others), data.draw(others)
        asked = [*before, one, *behind]
        many = pipe([number for number, _ in asked], recipe=recipe, guidance_scale=scale, generator=seeds(*[s for _, s in asked]))
        alone = pipe(one[0], recipe=recipe, guidance_scale=scale, generator=seeds(one[1]))
        assert torch.equal(many.codes[len(before)], alone.codes[0])
        assert many.tally.tokens[len(before)] == alone.tally.tokens[0]

    def test_guidance_is_what_it_says(self, pipe: MaskedImagePipeline) -> None:
        """In one evaluation: the tokens are the best of without + scale * (with - without)."""
        ids = torch.full((2, SLOTS + 1), WORDS.mask)
        ids[:, 0] = torch.tensor([WORDS.codes + 1, WORDS.nothing])
        sight = torch.zeros(1, 1, SLOTS + 1, SLOTS + 1)
        with torch.no_grad():
            given, without = pipe.model(input_ids=ids, attention_mask=sight).logits[:, 1:, : WORDS.codes]
        expected = (without + 60.0 * (given - without)).argmax(-1)
        found = pipe(1, recipe=maskgit(steps=1), guidance_scale=60.0, temperature=0.0).codes[0]
        assert torch.equal(found, expected)
        assert not torch.equal(expected, given.argmax(-1)), "guidance changes something here"

    def test_recap_computes_less(self, pipe: MaskedImagePipeline) -> None:
        full = pipe([0, 1], recipe=maskgit(steps=8), generator=seeds(1, 2))
        groups = pipe([0, 1], recipe=recap_tokens(steps=8, full=4), generator=seeds(1, 2))
        assert full.tally.evaluations.tolist() == groups.tally.evaluations.tolist() == [8, 8]
        assert full.tally.tokens.tolist() == [80, 80]
        assert (groups.tally.tokens < 80).all()

    def test_recap_with_full_steps_alone_is_maskgit(self, pipe: MaskedImagePipeline) -> None:
        plain = pipe([0, 1], recipe=maskgit(steps=5), generator=seeds(1, 2)).codes
        assert torch.equal(pipe([0, 1], recipe=recap_tokens(steps=5, full=5), generator=seeds(1, 2)).codes, plain)

    @pytest.mark.parametrize("full", [0, 2])
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_recap_without_local_steps_is_maskgit(self, pipe: MaskedImagePipeline, full: int, scale: float) -> None:
        call = {"guidance_scale": scale, "generator": None}
        plain = pipe([0, 1, 2], recipe=maskgit(steps=5), **call | {"generator": seeds(1, 2, 3)})
        groups = pipe([0, 1, 2], recipe=recap_tokens(steps=5, local=0, full=full), **call | {"generator": seeds(1, 2, 3)})
        assert torch.equal(groups.codes, plain.codes) and torch.equal(groups.tally.tokens, plain.tally.tokens)

    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_recap_with_one_group_is_maskgit_where_kept_keys_are_exact(self, scale: float) -> None:
        """One group is all slots: only the class token is kept, whose keys in a network of one layer never change."""
        shallow = MaskedImagePipeline(model(layers=1), book())
        told = [0, 1, 2, 1]
        plain = shallow(told, recipe=maskgit(steps=5), guidance_scale=scale, generator=seeds(1, 2, 3, 4))
        one = recap_tokens(steps=5, local=4, full=0)
        group = shallow(told, recipe=one, guidance_scale=scale, generator=seeds(1, 2, 3, 4))
        assert torch.equal(group.codes, plain.codes)
        assert group.tally.tokens.tolist() == [SLOTS + 1 + 4 * SLOTS] * 4

    def test_prompts_in_words(self, pipe: MaskedImagePipeline) -> None:
        codes = pipe(["a bee", "2", 0, "The Cat and 1"], generator=seeds(1, 2, 3, 4)).codes
        assert torch.equal(codes, pipe([1, 2, 0, 2], generator=seeds(1, 2, 3, 4)).codes)
        for prompt in ("a dog", "3", ""):
            with pytest.raises(UsageError, match="from 0 to 2 or a word: ant, bee, cat"):
                pipe(prompt)

    def test_recipes_by_name(self, pipe: MaskedImagePipeline) -> None:
        named = pipe(0, recipe="recap-tokens:steps=4,full=1", generator=seeds(1)).codes
        assert torch.equal(named, pipe(0, recipe=recap_tokens(steps=4, full=1), generator=seeds(1)).codes)

    def test_open_axes_are_maskgits(self, pipe: MaskedImagePipeline) -> None:
        """A cache alone: in one block, all of which `dual` computes anew, it is exact."""
        plain = pipe([0, 1], recipe="maskgit", generator=seeds(1, 2)).codes
        assert torch.equal(pipe([0, 1], generator=seeds(1, 2)).codes, plain)
        kept = recap_tokens(full=12).kv
        assert torch.equal(pipe([0, 1], recipe=Recipe(kv=kept), generator=seeds(1, 2)).codes, plain)

    def test_outputs(self, pipe: MaskedImagePipeline) -> None:
        made = {form: pipe([0, 1], generator=seeds(1, 2), output_type=form).images for form in ("pil", "np", "pt")}
        assert made["pil"][0].size == (SIDE, SIDE)
        assert made["np"].shape == (2, SIDE, SIDE, 1)
        assert made["pt"].shape == (2, 1, SIDE, SIDE)
        assert torch.equal(torch.from_numpy(made["np"][..., 0]), made["pt"][:, 0])

    def test_refuses(self, pipe: MaskedImagePipeline) -> None:
        for told in ([], [4], [-1]):
            with pytest.raises(UsageError, match="classes"):
                pipe(told)
        with pytest.raises(UsageError, match="guidance_scale"):
            pipe(0, guidance_scale=-1.0)
        with pytest.raises(UsageError, match="guidance_scale"):
            pipe(0, temperature=float("nan"))
        with pytest.raises(UsageError, match="'recap' sets reuse.*recap-tokens"):
            pipe(0, recipe="recap")
        with pytest.raises(RefusedError, match="layer by layer"):
            pipe(0, recipe=Recipe(kv=ValueDrift()), guidance_scale=2.0)
        with pytest.raises(UsageError, match="output_type"):
            pipe(0, output_type="latent")  # type: ignore[arg-type]

    def test_refuses_other_models(self) -> None:
        with pytest.raises(ModelError, match="12 codes and the codebook 3"):
            MaskedImagePipeline(model(), Codebook(torch.zeros(3, 4), SIDE))
        plain = model()
        del plain.config.hasten_images
        with pytest.raises(ModelError, match="hasten_images"):
            MaskedImagePipeline(plain, book())


@pytest.mark.skipif("tiny-mask" not in tiny_models.names(), reason="tiny-mask is not bundled here")
class TestBundled:
    def test_card_matches_the_files(self) -> None:
        card, folder = tiny_models.card("tiny-mask"), tiny_models.path("tiny-mask")
        assert card["kind"] == "masked-image" and card["steps"]["image"] > 0 and all(tiny_models.verify("tiny-mask").values())
        assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}
        assert sum(file.stat().st_size for file in folder.iterdir()) < 3 * 2**20

    def test_draws_what_it_is_asked_for(self) -> None:
        pipe = tiny_models.load("tiny-mask")
        told = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        call = tiny_models.call_defaults(pipe)
        assert call == tiny_models.call_defaults("tiny-mask") and call["guidance_scale"] > 1
        images = pipe(told, recipe="recap-tokens", output_type="np", generator=seeds(*told), **call).images
        read = [reading.digit for reading in Judge.load().read_all([image.repeat(3, -1) for image in images])]
        assert sum(a == b for a, b in zip(read, told, strict=True)) >= 8, read
