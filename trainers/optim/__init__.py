"""Optimizers, learning-rate schedules and learning-rate scales."""
