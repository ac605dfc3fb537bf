"""Which key blocks does a query block read, and what stands in for the rest?

Holds nothing yet. Its place is kept: the plan (one block-mask format), plan builders, a plain-torch reference
and the choice of a kernel go here; kernels themselves go to `sparse_attn/kernels/`.
May import `hasten` core only; never `caching`, `samplers` or `pipelines`.
"""
