"""How far a prediction is from what it should be, and how much each timestep counts."""

import torch
from torch import Tensor

from diffgraft.trainers.settings import Loss


def distances(prediction: Tensor, target: Tensor, times: Tensor, alphas: Tensor, settings: Loss) -> Tensor:
    """The error at each number, in the shape of `prediction` [n, c, h, w]; `times` [n], `alphas` ᾱ of every timestep.

    ``huber`` is the pseudo-Huber loss 2δ(√(d² + δ²) − δ): squared near zero, and proportional to the distance far from
    it, so that damaged pictures count less. Its δ may shrink on the way to pure noise (Khrapov et al. 2024,
    arXiv:2403.16728).
    """
    apart = prediction - target
    if settings.kind == "squared":
        return apart.square()
    share = times.float() / len(alphas)
    if settings.schedule == "exponential":
        delta = settings.delta**share
    elif settings.schedule == "snr":
        signal = alphas[times].float()
        spread = ((1 - signal) / signal.clamp_min(1e-8)).sqrt()
        delta = (1 - settings.delta) / (1 + spread) ** 2 + settings.delta
    else:
        delta = torch.full_like(share, settings.delta)
    delta = delta.view(-1, 1, 1, 1)
    return 2 * delta * ((apart.square() + delta.square()).sqrt() - delta)


def weights(times: Tensor, alphas: Tensor, settings: Loss, predicts: str) -> Tensor:
    """What each sample's loss is multiplied with, [n]; `times` [n], `alphas` ᾱ of every timestep, SNR = ᾱ / (1 − ᾱ).

    Min-SNR-γ (Hang et al. 2023, arXiv:2303.09556): min(SNR, γ) / SNR where ε is predicted, and min(SNR, γ) / (SNR + 1)
    for v. Debiased estimation (Yu et al. 2023, arXiv:2310.08442): 1 / √SNR for ε, with SNR at most 1000, and
    1 / (SNR + 1) for v.
    """
    found = torch.ones(len(times), device=times.device)
    signal = alphas[times].double()
    snr = signal / (1 - signal).clamp_min(1e-12)
    if settings.snr_gamma is not None:
        least = snr.clamp_max(settings.snr_gamma)
        found = found * (least / (snr + 1) if predicts == "v_prediction" else least / snr.clamp_min(1e-12)).float()
    if settings.debiased:
        found = found * (1 / (snr + 1) if predicts == "v_prediction" else snr.clamp(1e-12, 1000).rsqrt()).float()
    return found
