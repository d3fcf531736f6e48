"""What a run does besides its steps: checkpoints, metrics, samples, validation, trackers, EMA, ETA, gradient checks."""
