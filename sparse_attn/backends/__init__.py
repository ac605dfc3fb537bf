"""Which code runs a plan? `choice` says which and why; kernels in Triton are in `hasten.sparse_attn.kernels`."""
