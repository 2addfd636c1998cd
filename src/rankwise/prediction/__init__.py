"""Predicting epochs: from a short run here to any number of ranks, on a network that need not be there."""
