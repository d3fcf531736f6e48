"""The mathematics of diffusion: parameterizations, the forward process, noise and losses.

These are functions of tensors, which know no base, recipe or file.
"""
