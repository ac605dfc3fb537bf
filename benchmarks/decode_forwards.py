"""Tokens per forward of tiny-lm: hasten's look-up beside transformers' prompt look-up and assisted decoding, in one run.

    python benchmarks/decode_forwards.py

Greedy texts, so that all of them write the same. Forwards are counted, not timed: the numbers are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import torch

import hasten
from hasten.pipelines.tiny_models import text

NEW = 96
PROMPTS = {
    "code": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n",
    "prose": '"""This module provides functions to read and write files. The file is opened in binary mode, and',
    "repetitive": "key = 'a'\nvalue = 1\nkey = 'b'\nvalue = 2\nkey = 'c'\nvalue = 3\nkey = 'd'\n",
}


def forwards(model: Any, call: dict[str, Any], **more: Any) -> tuple[torch.Tensor, int]:
    """The text, and how often the model was called, the prompt included (transformers reads it together with the first drafts)."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_pre_hook(count)
    try:
        made = model.generate(**call, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **more)
    finally:
        hook.remove()
    return made, calls


def main() -> None:
    model, tokenizer = text("tiny-lm")
    draft, _ = text("tiny-draft")
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        call = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        plain, _ = forwards(model, call)
        rows: dict[str, tuple[torch.Tensor, int]] = {}
        for recipe in ("look-up:every=true", "look-up:every=true,width=1"):
            with hasten.accelerate(model, recipe):
                rows[recipe] = forwards(model, call)
        rows["transformers, prompt look-up of 10"] = forwards(model, call, prompt_lookup_num_tokens=10)
        rows["transformers, tiny-draft as assistant"] = forwards(model, call, assistant_model=draft)
        for what, (made, number) in rows.items():
            same = "same text" if torch.equal(made, plain) else "another text"
            print(f"{name:<11} {what:<40} {NEW / number:.2f} tokens per forward, {same}", flush=True)


if __name__ == "__main__":
    main()
