"""Drafters: who guesses the next tokens of a causal language model, and how."""
