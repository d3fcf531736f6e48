"""Training data: images with prompts, in the order in which steps see them."""
