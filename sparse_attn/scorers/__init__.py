"""How much attention is a pair of blocks worth? One idea per file; `scorer` has what all of them are."""
