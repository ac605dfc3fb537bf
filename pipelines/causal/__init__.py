"""The attention seam to causal language models of transformers."""
