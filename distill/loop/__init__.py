"""How a training runs: steps, roles' weights, processes, log, checkpoints, what it takes and what it costs."""
