"""Objectives, which define the loss of a training step: one file each; `objective` has their contract."""
