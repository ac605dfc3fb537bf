"""Images written row by row: their law, with and without guesses, against the one that is counted out; what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.errors import ModelError, RecipeError, UsageError
from hasten.pipelines.decode_own.token_images import TokenImagePipeline
from hasten.pipelines.masked_codes import Codebook, Words
from hasten.pipelines.recipes.decode_own import speculative_jacobi

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning", "ignore:speculative-jacobi:UserWarning")

WORDS = Words(3, 2, ("ant", "bee"))
SLOTS, SIDE, PATCH = 4, 4, 2
IMAGES = 4000


def small() -> TokenImagePipeline:
    """Four slots of three codes: 81 images, some of them far more probable than others."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=WORDS.size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.4, eos_token_id=None, bos_token_id=None, pad_token_id=WORDS.mask,
        hasten_images={"codes": WORDS.codes, "classes": WORDS.classes, "names": list(WORDS.names)},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return TokenImagePipeline(model, Codebook(torch.rand(WORDS.codes, PATCH**2), SIDE))


@pytest.fixture(scope="module")
def pipe() -> TokenImagePipeline:
    return small()


def law(pipe: TokenImagePipeline, number: int) -> Tensor:
    """The probability of each image of a class, float64 [3 ** 4], in the order of `itertools.product`."""
    images = torch.tensor(list(itertools.product(range(WORDS.codes), repeat=SLOTS)))
    told = torch.full((len(images), 1), WORDS.codes + number)
    logits = pipe.model(torch.cat([told, images], 1)).logits[:, :-1, : WORDS.codes].double()
    return logits.log_softmax(-1).gather(2, images[..., None])[..., 0].sum(1).exp()


def misfit(codes: Tensor, chances: Tensor) -> float:
    """By how many of its standard deviations chi-square is above what is expected where the law is right; rare images together."""
    index = (codes * WORDS.codes ** torch.arange(SLOTS - 1, -1, -1)).sum(1)
    seen, expected = torch.bincount(index, minlength=len(chances)).double(), chances * len(codes)
    rare = expected < 8
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    free = len(seen) - 1
    return float(((seen - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


def test_the_law_that_is_counted_out_is_not_flat(pipe: TokenImagePipeline) -> None:
    chances = law(pipe, 1)
    assert abs(float(chances.sum()) - 1) < 1e-6 and float(chances.max()) > 5 * float(chances.median())


@pytest.mark.parametrize("noise", [None, "fresh", "coupled", "same"])
def test_images_follow_the_models_law(pipe: TokenImagePipeline, noise: Any) -> None:
    """Windows of three places of four: guesses of one round are verified in the next, some taken, some not."""
    recipe = None if noise is None else speculative_jacobi(window=3, row=pipe.row, noise=noise)
    made = pipe([1] * IMAGES, recipe=recipe, seed=5, output_type="pt")
    assert misfit(made.codes, law(pipe, 1)) < 4
    assert misfit(made.codes, law(pipe, 0)) > 20, "of the other class, whose law is another one"
    assert misfit(pipe([1] * IMAGES, recipe=recipe, temperature=0.7, seed=5).codes, law(pipe, 1)) > 20
    if noise is None:
        assert made.report is None and made.forwards == SLOTS
    else:
        assert made.report.lossless and made.report.tokens_per_forward > 1.1


def test_seeds_and_forms(pipe: TokenImagePipeline) -> None:
    """The seed alone decides, and leaves PyTorch's generator where it was."""
    torch.manual_seed(0)
    one = pipe(["a bee", 0], recipe=speculative_jacobi(window=3), seed=1, output_type="np")
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1)) and one.images.shape == (2, SIDE, SIDE, 1)
    assert torch.equal(one.codes, pipe([1, 0], recipe=speculative_jacobi(window=3), seed=1).codes)
    assert pipe(2, seed=1).images[0].size == (SIDE, SIDE), "the class of no class"


@pytest.mark.parametrize(
    ("classes", "more", "says"),
    [
        ([], {}, "classes must be numbers from 0 to 1"),
        ([3], {}, r"got \[3\]"),
        ("a dog", {}, "ant, bee"),
        (1, {"temperature": -1}, "temperature"),
        (1, {"temperature": "warm"}, "temperature"),
        (1, {"top_k": -2}, "top_k"),
        (1, {"output_type": "gif"}, "output_type"),
        (1, {"recipe": "balanced"}, "draft"),
        (1, {"recipe": "speculative-jacob"}, "speculative-jacobi"),
    ],
)
def test_refused(pipe: TokenImagePipeline, classes: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises((UsageError, RecipeError), match=says):
        pipe(classes, **more)


def test_parts_that_do_not_belong_together(pipe: TokenImagePipeline) -> None:
    with pytest.raises(ModelError, match="3 codes and the codebook 5"):
        TokenImagePipeline(pipe.model, Codebook(torch.rand(5, 4), SIDE))
