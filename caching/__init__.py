"""What need not be computed again: reuse = span + signal + rule + forecast.

A span is what may be skipped (the whole network, or the blocks behind the first few), a signal says how
far the computation has moved, a rule (`hasten.drift`, `caching.rules`) turns that into a decision, and a
forecast (`hasten.forecast`) stands in for what was not computed. Policies see tensors and a `Step`,
never a model.
"""
