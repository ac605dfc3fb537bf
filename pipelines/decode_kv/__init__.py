"""The seam between transformers' causal language models and the caches of `hasten.caching.decode`.

    attention   what the registered attention function computes
    cache       transformers' `Cache`, with logical and physical lengths apart, drafts, and shared prefixes
    layer       one layer of it
    site        one attention module
    lazy        one decoder layer, which computes some of the tokens
    session     what `hasten.accelerate` puts on a model, and how it comes off again
    report      what was held, evicted and packed
    foreign     scores of other libraries (kvpress)
    saved       contexts in files
    shared      what the prompts of a batch have in common
    tail        the same cache under the decode loop
    bench*      what policies cost, and what shared prefixes save
"""
