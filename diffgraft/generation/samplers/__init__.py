"""Samplers and schedules of noise levels by the names that people use.

A sampler takes latents from noise to a picture through a list of noise levels σ, from the largest to 0, in the
convention of Karras et al. 2022 (arXiv:2206.00364): latents are x₀ + σ · ε. It asks a function for the clean latents at
a noise level, and another one for noise. Each step is yielded, so that whoever runs a sampler can show it, or stop.
"""
