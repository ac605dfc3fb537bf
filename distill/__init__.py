"""Training: few-step students, tiny models from scratch, the data and checkpoints they need."""
