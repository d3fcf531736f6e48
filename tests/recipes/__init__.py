"""Recipes of tests, which do not change where those that ship are tuned."""

from pathlib import Path

from diffgraft.adapters.registry import methods

SUBJECT = str(Path(__file__).parent / "subject.yaml")
"""DreamBooth with class images on attention layers: what most tests train"""
ON_PICTURES = sorted(name for name, method in methods().items() if not method.needs_conditions)
"""Methods that train on pictures alone, in all recipes but those of the task `control`"""
