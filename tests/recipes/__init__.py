"""Recipes of tests, which do not change where those that ship are tuned."""

from pathlib import Path

SUBJECT = str(Path(__file__).parent / "subject.yaml")
"""DreamBooth with class images on attention layers: what most tests train"""
