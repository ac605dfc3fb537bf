"""Which keys and values does autoregressive decoding keep, how long, and in how many bits?

    slots     one layer's keys and values by physical slot, with the logical place of each and a scratch tail
    packed    what stands behind a store: slots that are not written any more
    codec*    how these are written in fewer bits: int8, int4, fp8, bitmaps
    mass      how much attention each slot got, without the weights of the whole
    score*    what a slot is worth
    amount    how many slots are kept; allot: of which layers and heads
    kept      the policy on a recipe's `kv` axis
    wire      an entropy coder, for contexts that are saved

May import `hasten` core only. Shapes everywhere: B rows (texts), Hq, Hk heads of queries and keys, S slots, N new tokens,
D, Dv head dimensions of keys and values; P is 1 where all key heads of a row hold the same tokens, else Hk.
"""
