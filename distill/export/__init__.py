"""What comes out of a training: adapters and networks that other programs load, how to sample them, a card, a recipe."""
