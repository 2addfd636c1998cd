"""One rank, from its options to its last epoch."""
