"""Does it work here? Each backend on this machine, and what hasten promises on any host, tried on one model."""
