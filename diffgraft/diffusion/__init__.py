"""The mathematics of diffusion: what a denoiser predicts, how noise is added, how errors are weighed.

Functions of tensors alone. Nothing here knows a base, a recipe or a file.
"""
