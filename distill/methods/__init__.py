"""The ways of training, a file each: losses on roles, without loop or optimiser."""
