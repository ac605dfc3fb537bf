"""What stands in for blocks that are not read? `compensate` has what all of them are; `recover` corrects the output instead."""
