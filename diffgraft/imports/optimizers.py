"""Optimisers of other tools, by name, and how far ours are the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffgraft.imports.account import Account

NO_CLIPPING = 1e9
"""A norm of gradients that is never reached, for those who do not clip them"""


@dataclass(frozen=True)
class Peer:
    """One of theirs, and the one of ours that it is."""

    ours: str
    weight_decay: float
    """Theirs, where the file does not say it"""
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Its other settings → what it has by default, and what ours has, which cannot be set"""
    remark: str = ""


_ADAM = {"betas": ((0.9, 0.999), (0.9, 0.999)), "eps": (1e-8, 1e-8), "amsgrad": (False, False)}
_LION = {"betas": ((0.9, 0.99), (0.9, 0.99))}
_PAGED = "its memory is not paged here"
ADAMW = Peer("adamw", 0.01, _ADAM)
ADAMW_8BIT = Peer("adamw8bit", 0.01, _ADAM)
LION = Peer("lion", 0.0, _LION)
LION_8BIT = Peer("lion8bit", 0.0, _LION)
_ADAFACTOR = {
    "relative_step": (True, False),
    "scale_parameter": (True, False),
    "warmup_init": (False, False),
    "clip_threshold": (1.0, 1.0),
    "decay_rate": (-0.8, -0.8),
    "beta1": (None, None),
}
ADAFACTOR = Peer("adafactor", 0.0, _ADAFACTOR)
_PRODIGY = {
    "decouple": (True, True),
    "use_bias_correction": (False, True),
    "safeguard_warmup": (False, True),
    "d_coef": (1.0, 1.0),
    "d0": (1e-6, 1e-6),
    "betas": ((0.9, 0.999), (0.9, 0.999)),
    "beta3": (None, None),
    "eps": (1e-8, 1e-8),
    "growth_rate": (float("inf"), float("inf")),
    "slice_p": (1, 1),
}
PRODIGY = Peer("prodigy", 0.0, _PRODIGY)
_FREE = {
    "betas": ((0.9, 0.999), (0.9, 0.999)),
    "eps": (1e-8, 1e-8),
    "r": (0.0, 0.0),
    "weight_lr_power": (2.0, 2.0),
}
SCHEDULE_FREE = Peer("schedule-free", 0.0, _FREE)


def paged(peer: Peer) -> Peer:
    """The same with paged memory."""
    return Peer(peer.ours, peer.weight_decay, peer.settings, _PAGED)


def take_optimizer(
    account: Account, key: str, name: str, table: Mapping[str, Peer], said: Mapping[str, Any], prefix: str
) -> str:
    """Put an optimiser on the account; returns ours.

    Args:
        account: where to put it.
        key: theirs that names it.
        name: the name.
        table: the names that are known, in small letters.
        said: its settings, as far as the file says them.
        prefix: what their names begin with where they are told of.
    """
    peer = table.get(name.lower())
    if peer is None:
        rate_finder = "adapt" in name.lower() or "prodigy" in name.lower()
        instead = "prodigy" if rate_finder else "adamw"
        why = "which finds the rate itself as well, " if rate_finder else ""
        account.lose(key, f"there is no such optimiser here; {instead}, {why}is written in its place: look at lr, too.")
        account.recipe["optimizer"] = instead
        for setting, value in said.items():
            account.aside(prefix + setting, value, "it is a setting of that optimiser.")
        return instead
    account.take("optimizer", peer.ours, key, remark=peer.remark)
    decay, where = said.get("weight_decay"), "" if "weight_decay" in said else "the default there"
    decay = peer.weight_decay if decay is None else decay
    account.take_part("weight_decay", decay, f"{prefix}weight_decay", decay, where)
    for setting, (theirs, ours) in peer.settings.items():
        value = theirs if said.get(setting) is None else said[setting]
        value = tuple(value) if isinstance(value, list) else value
        if value != ours:
            what = str(ours).lower() if isinstance(ours, bool) else ours
            account.aside(prefix + setting, value, f"{peer.ours} has {what} here, which cannot be set.")
    for setting in said:
        if setting not in peer.settings and setting != "weight_decay":
            account.aside(prefix + setting, said[setting], f"{peer.ours} has no such setting here.")
    return peer.ours
