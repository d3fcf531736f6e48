"""The demo: made-up subjects and a style that the embedded base has never seen, and a short training run."""
