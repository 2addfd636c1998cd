"""What a run has learned: its network with the trained weights, and how that does on images."""
