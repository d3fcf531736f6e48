"""Optimizer that trains the inner weight matrices with Muon and all other weights with AdamW.

Muon updates a weight matrix by its orthogonalized momentum (Jordan et al. 2024, "Muon: an optimizer for hidden layers
in neural networks"), scaled to the size of AdamW's update (Liu et al. 2025, arXiv:2502.16982, equation 4), so that both
optimizers use the same learning rate. The denoiser needs fewer pictures with Muon than with AdamW alone.
"""

from typing import Any

import torch
from torch import nn

EDGES = (
    "conv_in.weight",
    "conv_out.weight",
    "patch_embedding.weight",
    "token_embedding.weight",
    "pos_embed.proj.weight",
)
"""Ends of the names of first and last layers' weights, which Muon's authors advise to train with AdamW."""
LAST = "proj_out.weight"
"""Name of the last layer's weight in transformers; blocks of UNets have layers that end in it"""


class MuonAndAdamW:
    """Muon and AdamW behind one interface, with the methods of `torch.optim.Optimizer` that a training loop needs."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = dict(model.named_parameters())
        inner = {name for name, p in named.items() if p.ndim in (2, 4) and not name.endswith(EDGES) and name != LAST}
        # PyTorch's Muon accepts matrices only, so a convolution's weight is viewed as [out, in · height · width]
        self._views = [(named[name], nn.Parameter(named[name].detach().flatten(1))) for name in sorted(inner)]
        others = [p for name, p in named.items() if name not in inner]
        matrices = [matrix for _, matrix in self._views]
        self._muon = torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self) -> None:
        for weight, matrix in self._views:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()

    def zero_grad(self) -> None:
        for weight, matrix in self._views:
            weight.grad = matrix.grad = None
        self._adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
