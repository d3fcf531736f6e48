"""What a run does beside its steps: checkpoints, metrics, samples, validation, trackers, an average, an ETA."""
