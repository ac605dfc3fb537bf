"""Which pairs of blocks are read, given their scores? `selector` has what all of them are."""
