"""Objectives: what the loss of a training step is, one file each; `objective` is their contract and template."""
