"""What rankwise finds on this machine, and how far a training step is from the machine's limits."""
