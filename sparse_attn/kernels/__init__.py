"""How is an attention plan computed on a GPU? One kernel per file, one function each, all in Triton.

Nothing is imported here, and nothing outside this folder imports triton: `hasten.sparse_attn` works without it.
Callers ask `hasten.sparse_attn.backends.choice` whether kernels can run and import the one they need then.
"""
