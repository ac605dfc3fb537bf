"""Sparse attention end to end on a bundled model: every recipe alone, and with a cache. A table of docs/attention-bench.md.

    python benchmarks/attention_end_to_end.py --model tiny-video --json FILE

Four prompts, one seed each, of the sixteen that other tables use. The bundled models have 64 to 576 tokens, so every recipe
is run with blocks and clusters that fit them, and with `min_tokens=0`: left to itself it declines, because at these sizes
planning costs more than attention. So the times say what planning costs; what counts is how near the result stays at a
density, whether prompts are still met, and that recipes compose.
"""

from __future__ import annotations

import argparse
import sys
import warnings

from hasten.cli.bench import own_prompts
from hasten.cli.output import Output
from hasten.pipelines.bench.measure import bench_recipes
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.generate import makes_video
from hasten.pipelines.recipes import attention, recipe
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe


def recipes(video: bool) -> dict[str, Recipe]:
    """Every recipe of sparse attention at sizes that fit a few hundred tokens, by its name."""
    tile = (1, 2, 2)
    found = {
        "semantic": attention.semantic(q_size=16, k_size=4, min_tokens=0),
        "semantic, recall 0.8": attention.semantic(recall=0.8, q_size=16, k_size=4, min_tokens=0),
        "semantic-tree": attention.semantic_tree(block=4, min_tokens=0),
        "svg2": attention.svg2(q_size=16, k_size=4, min_tokens=0),
        "svg-ear": attention.svg_ear(q_size=16, k_size=4, min_tokens=0),
        "sol-attention": attention.sol_attention(block=8, min_tokens=0),
        "adaspa": attention.adaspa(block=8, min_tokens=0),
        "grat": attention.grat(group=tile, min_tokens=0),
        "re-ttention": attention.re_ttention(block=8, min_tokens=0),
        "neighbourhood": attention.neighbourhood(window=(3, 5, 5) if video else (5, 5), min_tokens=0),
        "sliding-tile": attention.sliding_tile(tile=tile, min_tokens=0),
        "hyper-attention": attention.hyper_attention(block=16, samples=32, min_tokens=0),
        "routing": attention.routing(size=16, min_tokens=0),
        "linear-branch": attention.linear_branch(share=0.3, q_size=16, k_size=4, min_tokens=0),
        "sparge": attention.sparge(block=8, min_tokens=0),
        "xattention": attention.xattention(block=8, stride=4, min_tokens=0),
        "last-queries": attention.last_queries(block=8, queries=16, min_tokens=0),
    }
    if video:  # these are about time
        found["sparse-videogen"] = attention.sparse_videogen(block=8, min_tokens=0)
        found["radial"] = attention.radial(least=8, block=8, min_tokens=0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--cache", default="balanced", help="recipe that each is joined with")
    parser.add_argument("--count", type=int, default=4, help="prompts")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    call, texts = call_defaults(pipe), own_prompts(makes_video(pipe))[: options.count]
    alone = recipes(makes_video(pipe))
    joined = {f"{name} + {options.cache}": each | recipe(options.cache) for name, each in alone.items()}
    output = Output("attention_end_to_end", options.json)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = bench_recipes(
            pipe,
            call,
            [Sample(text, 0) for text in texts],
            {options.cache: recipe(options.cache)} | alone | joined,
            model=options.model,
            converged_steps=call["num_inference_steps"],
            with_oracle=False,
            with_peers=False,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    output.table(rows)
    output.finish(rows, prompts=texts)


if __name__ == "__main__":
    main()
