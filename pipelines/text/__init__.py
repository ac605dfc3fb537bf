"""How a text is written by diffusion: prompts, the loop, drafts, streams, and the pipelines around them."""
