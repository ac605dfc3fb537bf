"""The decode loop on transformers' causal language models: drafts, verification, and what `generate` expects."""
