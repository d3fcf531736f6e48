"""Evaluation of adapters: pictures drawn at several checkpoints and strengths, measures of them, and a verdict."""
