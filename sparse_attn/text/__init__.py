"""How does a causal language model read its cache? `causal` is the policy, `reader` what all readers are, `decode` the work."""
