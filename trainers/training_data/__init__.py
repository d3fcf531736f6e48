"""Training data: pictures with prompts, in the order in which steps see them."""
