"""How good are students? Teacher, training-free solvers and students on the same noise, under the same judge."""
