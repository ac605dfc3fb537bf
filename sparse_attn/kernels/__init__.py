"""How is an attention plan computed on one kind of device? One kernel per file, one function each.

Holds nothing yet. This is the only folder that may import triton, and it does so lazily: importing
`hasten.sparse_attn` works without a GPU and without triton.
"""
