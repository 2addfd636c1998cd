"""What a run leaves: its record and folder, checkpoints, progress, and trackers."""
