"""The seam between transformers' causal language models and the caches of `hasten.caching.decode`.

    attention   what the registered attention function computes
    cache       transformers' `Cache`, with logical and physical lengths apart, drafts, and shared prefixes
    session     what `hasten.accelerate` puts on a model, and how it comes off again
    report      what was held, evicted and packed
    foreign     scores of other libraries (kvpress)
    saved       contexts in files
"""
