"""Which steps, which branches: solvers, guidance and (later) few-step samplers and text-commit policies."""
