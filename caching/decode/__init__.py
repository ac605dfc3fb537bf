"""Which keys and values does autoregressive decoding keep, how long, and in how many bits?

    slots     one layer's keys and values by physical slot, with the logical place of each and a scratch tail
    packed    what stands behind a store: slots that are not written any more
    view      what attention may read of a store now
    codec*    how these are written in fewer bits: int8, int4, fp8, bitmaps
    low_rank  keys as a thin product, values in a slower memory; turns: how positions turn keys, undone and made again
    mass      how much attention each slot got, without the weights of the whole
    score*    what a slot is worth
    amount    how many slots are kept; allot: of which layers and heads
    kept      the policy on a recipe's `kv` axis
    prompt    which tokens of a prompt are read at all; lazy: by deeper layers, and computed later when they are needed
    wire      an entropy coder, for contexts that are saved

May import `hasten` core only. Shapes everywhere: B rows (texts), Hq, Hk heads of queries and keys, S slots, N new tokens,
D, Dv head dimensions of keys and values; P is 1 where all key heads of a row hold the same tokens, else Hk.
"""
