"""Networks of kohya's sd-scripts and of LyCORIS: modules, their arguments, and the methods here that do the same."""

from collections.abc import Mapping

from diffgraft.errors import DiffgraftError
from diffgraft.imports.account import Account, Key, as_number, nothing, pairs

NETWORK = {
    "network_module": Key(),
    "network_dim": Key(4, kind=int),
    "network_alpha": Key(1, kind=float),
    "network_args": Key(),
    "network_weights": Key(None, "init_from"),
    "dim_from_weights": Key(False, kind=bool),  # as init_from does
    **nothing(
        "merge them into the base first: diffgraft merge FILE:STRENGTH --into BASE -o NEW, and base=NEW.",
        base_weights=None,
        base_weights_multiplier=None,
    ),
    **nothing("there is no dropout inside adapters here.", network_dropout=None),
    **nothing("norms are not held down here; max_grad_norm clips gradients.", scale_weight_norms=None),
}
"""Keys of sd-scripts that say what is trained"""

_OTHER_FAMILIES = ("flux", "sd3", "lumina", "hunyuan", "anima")
_NO_DROPOUT = "there is no dropout inside adapters here."
_BLOCKS = "blocks go by their names here: lr_scale.IN04=0.5 for a rate, options.ranks.IN04=8 for a rank."
_LORA = {"rank_dropout": _NO_DROPOUT, "module_dropout": _NO_DROPOUT}
_LORA |= dict.fromkeys(
    (
        *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
        *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    ),
    _BLOCKS,
)
_LORA |= dict.fromkeys(("network_reg_dims", "network_reg_lrs", "include_patterns", "exclude_patterns"), _BLOCKS)
_LYCORIS = {
    **_LORA,
    "rank_dropout_scale": _NO_DROPOUT,
    "use_scalar": "there is no such scalar here; without it training starts from the same adapter.",
    "train_norm": "norms are trained with method=full alone.",
    "bypass_mode": "it changes how a layer is computed, and not what it is.",
    "unbalanced_factorization": "factors are those of the plain division here.",
    "wd_on_output": "lengths are learnt per output here, as there by default.",
    "block_size": "there is no such method here.",
    "unit": "there is no such method here.",
    "constraint": "there is no such method here.",
    "rescaled": "there is no such method here.",
    "train_on_input": "there is no such method here.",
    "train_t5xxl": "there is no such text encoder here.",
}
"""Arguments of networks without a counterpart → why"""
_SAY_NOTHING = {"", "None", "False", "0", "0.0", "-1"}
"""Values that only say the default; of `wd_on_output` that is True"""

_PRESETS = {
    "full": ("all", True),
    "full-lin": ("attention+feedforward", True),
    "attn-mlp": ("attention+feedforward", True),
    "attn-only": ("attention", True),
    "unet-only": ("all", False),
    "unet-transformer-only": ("attention+feedforward", False),
}
"""LyCORIS' presets → our layers, and whether the text encoder is adapted"""
_ALGORITHMS = {"lora": "locon", "locon": "locon", "loha": "loha", "lokr": "lokr", "full": "full"}
"""LyCORIS' algorithms → our methods"""
_MODULES = {"networks.lora": "lora", "networks.loha": "loha", "networks.lokr": "lokr"}
"""sd-scripts' own modules → our methods"""


def take_network(account: Account) -> tuple[str, bool]:
    """Put the network on the account; returns the method, and whether the text encoder is adapted with it.

    Raises:
        DiffgraftError: it is for models that are none of Stable Diffusion 1.x, 2.x and XL.
    """
    module = account.text("network_module")
    if any(name in module for name in _OTHER_FAMILIES):
        raise DiffgraftError(
            f"network_module={module} is for another kind of model: here are Stable Diffusion 1.x, 2.x and XL alone."
        )
    words = account.get("network_args") or []
    said = pairs(words if isinstance(words, list) else str(words).split(), account.name("network_args"))
    if module == "lycoris.kohya":
        return _lycoris(account, said)
    method = _MODULES.get(module, "")
    if not method:
        account.lose("network_module", "nothing here trains such a network; lora is written in its place.")
    conv = _number(said.pop("conv_dim", ""))
    layers = "all" if conv else "attention+feedforward"
    method = "locon" if conv and method == "lora" else method or "lora"
    if module in _MODULES:
        account.take("method", method, "network_module", remark=f"on layers={layers}")
    account.recipe["layers"] = layers
    alpha = _number(said.pop("conv_alpha", "1")) or conv
    _sizes(account, method, conv, alpha)
    _arguments(account, method, said, _LYCORIS if method in ("loha", "lokr") else _LORA)
    return method, True


def _lycoris(account: Account, said: dict[str, str]) -> tuple[str, bool]:
    algorithm, preset = said.pop("algo", "lora").lower(), said.pop("preset", "full")
    method = _ALGORITHMS.get(algorithm, "")
    if method:
        account.take("method", method, "network_module", remark=f"algo={algorithm}")
    else:
        account.aside("network_args algo", algorithm, "nothing here trains it; lora is written in its place.")
    layers, text = _PRESETS.get(preset, ("all", True))
    if preset not in _PRESETS:
        account.aside("network_args preset", preset, "layers cannot be chosen so here; layers=all is written.")
    elif layers == "all" and method != "full":
        why = (
            "as there but for the first and last convolution and the embedding of time, which layers=all leaves alone."
        )
        account.aside("network_args preset", preset, why)
    elif preset == "full-lin":
        account.aside("network_args preset", preset, "the residual blocks' embedding of time is not adapted here.")
    named = said.pop("conv_dim", "")
    conv = _number(named) or (0.0 if named else float(account.whole("network_dim") or 4))
    if layers == "all" and not conv:  # convolutions are left alone there
        layers = "attention+feedforward"
    alpha = _number(said.pop("conv_alpha", "")) or account.number("network_alpha") or conv
    if method == "full":
        account.aside("network_args algo", "full", "every weight trains here, norms and embeddings of time as well.")
    else:
        account.take_part("layers", layers, "network_args preset", preset)
        _sizes(account, method or "lora", conv if layers == "all" else 0, alpha)
    _arguments(account, method or "lora", said, _LYCORIS)
    return method or "lora", text


def _sizes(account: Account, method: str, conv: float, conv_alpha: float) -> None:
    """Rank and alpha, of convolutions as well where they are adapted."""
    rank = account.whole("network_dim") or 4
    alpha = account.number("network_alpha") or float(rank)  # which 0 means, there
    account.take("rank", rank, "network_dim")
    account.take("alpha", alpha, "network_alpha")
    if not conv:
        return
    plain = conv == rank and conv_alpha == alpha
    if not plain and method in ("locon", "loha"):
        account.take_part("options.conv_rank", int(conv), "network_args conv_dim", int(conv))
    if method == "locon" and not plain:
        account.take_part("options.conv_alpha", conv_alpha, "network_args conv_alpha", conv_alpha)
    elif conv_alpha / conv != alpha / rank:
        account.aside("network_args conv_alpha", conv_alpha, f"{method} has one scale, alpha / rank, for all layers.")
    if method == "lokr" and conv != rank:
        account.aside("network_args conv_dim", int(conv), "lokr has one rank for all layers.")


_OPTIONS = {
    "lora": {"rs_lora": "rslora", "dora_wd": "dora"},
    "locon": {
        "rs_lora": "rslora",
        "dora_wd": "dora",
        "use_tucker": "tucker",
        "use_cp": "tucker",
        "use_conv_cp": "tucker",
    },
    "loha": {"use_tucker": "tucker", "use_cp": "tucker", "use_conv_cp": "tucker"},
    "lokr": {
        "use_tucker": "tucker",
        "use_cp": "tucker",
        "decompose_both": "decompose_both",
        "full_matrix": "full_matrix",
    },
}
"""Method → arguments that say yes or no, and our options"""
_ALL_OPTIONS = {name for options in _OPTIONS.values() for name in options}
_PLUS = ("loraplus_unet_lr_ratio", "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio")


def _arguments(account: Account, method: str, said: dict[str, str], known: Mapping[str, str]) -> None:
    """The other arguments."""
    options = _OPTIONS.get(method, {})
    ratios = {name: value for name in _PLUS if (value := _number(said.pop(name, "")))}
    if ratios and method in ("lora", "locon"):
        name, value = next(iter(ratios.items()))
        account.take_part("options.loraplus_ratio", value, f"network_args {name}", value)
    for name, ratio in ratios.items():
        if method not in ("lora", "locon") or ratio != next(iter(ratios.values())):
            account.aside(
                f"network_args {name}", ratio, "there is one such factor, options.loraplus_ratio of lora and locon."
            )
    if method == "lokr" and (factor := _number(said.pop("factor", ""))) not in (0, -1):
        account.take_part("options.factor", int(factor), "network_args factor", int(factor))
    for name, text in said.items():
        if text in _SAY_NOTHING or (name, text) == ("wd_on_output", "True"):
            continue
        if name in options and text.lower() in ("true", "1"):
            account.take_part(f"options.{options[name]}", True, f"network_args {name}", text)
        elif name in known:
            account.aside(f"network_args {name}", text, known[name])
        elif name in _ALL_OPTIONS | {"factor"}:
            account.aside(f"network_args {name}", text, f"{method} has no such option here.")
        else:
            account.aside(f"network_args {name}", text, "no argument of networks that is known here.")


def _number(text: str) -> float:
    """0 where there is none."""
    return as_number("a number in network_args", text or None) or 0.0
