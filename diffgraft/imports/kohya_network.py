"""Mapping of sd-scripts' and LyCORIS' network modules and their arguments to methods and options."""

from collections.abc import Mapping

from diffgraft.errors import DiffgraftError
from diffgraft.imports.import_report import ImportReport, KeyRule, as_number, parse_pairs, unsupported
from diffgraft.imports.kohya_flow import NETWORKS as FLOW_NETWORKS

NETWORK = {
    "network_module": KeyRule(),
    "network_dim": KeyRule(4, kind=int),
    "network_alpha": KeyRule(1, kind=float),
    "network_args": KeyRule(),
    "network_weights": KeyRule(None, "init_from"),
    "dim_from_weights": KeyRule(False, kind=bool),  # as init_from does
    **unsupported(
        "merge them into the base first: diffgraft merge FILE:STRENGTH --into BASE -o NEW, then set base=NEW.",
        base_weights=None,
        base_weights_multiplier=None,
    ),
    **unsupported("adapters have no dropout.", network_dropout=None),
    **unsupported("norms of weights are not limited; max_grad_norm clips gradients.", scale_weight_norms=None),
}
"""Arguments of sd-scripts that define the network"""

_OTHER_FAMILIES = ("lumina", "hunyuan", "anima")
_NO_DROPOUT = "adapters have no dropout."
_BLOCKS = "blocks are set by name: lr_scale.IN04=0.5 for a learning-rate scale, options.ranks.IN04=8 for a rank."
_LORA = {"rank_dropout": _NO_DROPOUT, "module_dropout": _NO_DROPOUT}
_LORA |= dict.fromkeys(
    (
        *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
        *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    ),
    _BLOCKS,
)
_LORA |= dict.fromkeys(("network_reg_dims", "network_reg_lrs", "include_patterns", "exclude_patterns"), _BLOCKS)
_FLOW = {
    **dict.fromkeys(("rank_dropout", "module_dropout"), _NO_DROPOUT),
    **dict.fromkeys(("conv_dim", "conv_alpha"), "these transformers have no convolutions."),
    **dict.fromkeys(
        (
            *("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim"),
            *("single_mod_dim", "in_dims", "emb_dims", "context_attn_dim", "context_mlp_dim", "context_mod_dim"),
            *("x_attn_dim", "x_mlp_dim", "x_mod_dim", "network_reg_dims"),
        ),
        "ranks of layers are set by patterns of their paths: options.ranks.PATTERN=8.",
    ),
    **dict.fromkeys(
        (
            *("train_blocks", "train_double_block_indices", "train_single_block_indices", "train_block_indices"),
            "network_reg_lrs",
        ),
        "learning rates of layers are set by patterns of their paths: lr_scale.PATTERN=0 excludes them.",
    ),
    **dict.fromkeys(("ggpo_beta", "ggpo_sigma"), "this perturbation of weights is not supported."),
    "split_qkv": "queries, keys and values are layers of their own, as in diffusers.",
    "train_t5xxl": "",  # read with the rates of the encoders
    "verbose": "",
}
"""Network argument of FLUX.1 and Stable Diffusion 3 without a counterpart → reason; empty: read elsewhere"""
_LYCORIS = {
    **_LORA,
    "rank_dropout_scale": _NO_DROPOUT,
    "use_scalar": "not supported; training starts from the same adapter without it.",
    "train_norm": "norm layers are trained only with method=full.",
    "bypass_mode": "it changes how a layer is computed, but not its result.",
    "unbalanced_factorization": "not supported; the factorization is the balanced one.",
    "wd_on_output": "DoRA magnitudes are learned per output, as by default in LyCORIS.",
    "block_size": "it belongs to a method that is not supported.",
    "unit": "it belongs to a method that is not supported.",
    "constraint": "it belongs to a method that is not supported.",
    "rescaled": "it belongs to a method that is not supported.",
    "train_on_input": "it belongs to a method that is not supported.",
}
"""Network argument without a counterpart → reason"""
_DEFAULT_TEXTS = {"", "None", "False", "0", "0.0", "-1"}
"""Values equal to the default; that of `wd_on_output` is True"""

_PRESETS = {
    "full": ("all", True),
    "full-lin": ("attention+feedforward", True),
    "attn-mlp": ("attention+feedforward", True),
    "attn-only": ("attention", True),
    "unet-only": ("all", False),
    "unet-transformer-only": ("attention+feedforward", False),
}
"""Preset of LyCORIS → the recipe's layers, and whether the text encoder is adapted"""
_ALGORITHMS = {"lora": "locon", "locon": "locon", "loha": "loha", "lokr": "lokr", "full": "full"}
"""Algorithm of LyCORIS → method"""
_MODULES = {
    "networks.lora": "lora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
    **dict.fromkeys(FLOW_NETWORKS, "lora"),
}
"""Network module of sd-scripts → method"""


def map_network(report: ImportReport) -> tuple[str, bool]:
    """Map the network; return the method, and whether the text encoder is adapted.

    Raises:
        DiffgraftError: it is for a model family that recipes do not train.
    """
    module = report.text("network_module")
    if any(name in module for name in _OTHER_FAMILIES):
        raise DiffgraftError(
            f"network_module={module} is for another model family: only Stable Diffusion 1.x, 2.x, 3 and XL, and "
            "FLUX.1 are supported."
        )
    words = report.get("network_args") or []
    arguments = parse_pairs(words if isinstance(words, list) else str(words).split(), report.file_key("network_args"))
    if module == "lycoris.kohya":
        return _lycoris(report, arguments)
    method = _MODULES.get(module, "")
    if not method:
        report.drop("network_module", "this network is not supported; replaced by method=lora.")
    is_flow = module in FLOW_NETWORKS
    conv = 0.0 if is_flow else _number(arguments.pop("conv_dim", ""))  # transformers have no convolutions
    layers = "all" if conv or is_flow else "attention+feedforward"
    method = "locon" if conv and method == "lora" else method or "lora"
    if module in _MODULES:
        report.map("method", method, "network_module", remark=f"on layers={layers}")
    report.recipe["layers"] = layers
    alpha = _number(arguments.pop("conv_alpha", "1")) or conv
    _sizes(report, method, conv, alpha)
    _arguments(report, method, arguments, _FLOW if is_flow else _LYCORIS if method in ("loha", "lokr") else _LORA)
    return method, True


def _lycoris(report: ImportReport, arguments: dict[str, str]) -> tuple[str, bool]:
    algorithm, preset = arguments.pop("algo", "lora").lower(), arguments.pop("preset", "full")
    method = _ALGORITHMS.get(algorithm, "")
    if method:
        report.map("method", method, "network_module", remark=f"algo={algorithm}")
    else:
        report.drop_part("network_args algo", algorithm, "this algorithm is not supported; replaced by method=lora.")
    layers, text = _PRESETS.get(preset, ("all", True))
    if preset not in _PRESETS:
        report.drop_part("network_args preset", preset, "not supported; replaced by layers=all.")
    elif layers == "all" and method != "full":
        why = "layers=all does not adapt the first and last convolution and the time embedding."
        report.drop_part("network_args preset", preset, why)
    elif preset == "full-lin":
        report.drop_part("network_args preset", preset, "the time embeddings of residual blocks are not adapted.")
    named = arguments.pop("conv_dim", "")
    conv = _number(named) or (0.0 if named else float(report.integer("network_dim") or 4))
    if layers == "all" and not conv:  # LyCORIS does not adapt convolutions then
        layers = "attention+feedforward"
    alpha = _number(arguments.pop("conv_alpha", "")) or report.number("network_alpha") or conv
    if method == "full":
        report.drop_part(
            "network_args algo", "full", "method=full trains every weight, including norms and time embeddings."
        )
    else:
        report.map_part("layers", layers, "network_args preset", preset)
        _sizes(report, method or "lora", conv if layers == "all" else 0, alpha)
    _arguments(report, method or "lora", arguments, _LYCORIS)
    return method or "lora", text


def _sizes(report: ImportReport, method: str, conv: float, conv_alpha: float) -> None:
    """Map rank and alpha, also those of convolutions if they are adapted."""
    rank = report.integer("network_dim") or 4
    alpha = report.number("network_alpha") or float(rank)  # 0 means the rank in sd-scripts
    report.map("rank", rank, "network_dim")
    report.map("alpha", alpha, "network_alpha")
    if not conv:
        return
    plain = conv == rank and conv_alpha == alpha
    if not plain and method in ("locon", "loha"):
        report.map_part("options.conv_rank", int(conv), "network_args conv_dim", int(conv))
    if method == "locon" and not plain:
        report.map_part("options.conv_alpha", conv_alpha, "network_args conv_alpha", conv_alpha)
    elif conv_alpha / conv != alpha / rank:
        report.drop_part(
            "network_args conv_alpha", conv_alpha, f"method={method} has one scale, alpha / rank, for all layers."
        )
    if method == "lokr" and conv != rank:
        report.drop_part("network_args conv_dim", int(conv), "method=lokr has one rank for all layers.")


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
"""Method → boolean network argument → option"""
_ALL_OPTIONS = {name for options in _OPTIONS.values() for name in options}
_PLUS = ("loraplus_unet_lr_ratio", "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio")


def _arguments(report: ImportReport, method: str, arguments: dict[str, str], known: Mapping[str, str]) -> None:
    """Map the other network arguments."""
    options = _OPTIONS.get(method, {})
    ratios = {name: value for name in _PLUS if (value := _number(arguments.pop(name, "")))}
    if ratios and method in ("lora", "locon"):
        name, value = next(iter(ratios.items()))
        report.map_part("options.loraplus_ratio", value, f"network_args {name}", value)
    for name, ratio in ratios.items():
        if method not in ("lora", "locon") or ratio != next(iter(ratios.values())):
            report.drop_part(
                f"network_args {name}",
                ratio,
                "only options.loraplus_ratio of lora and locon is supported, a single ratio.",
            )
    if method == "lokr" and (factor := _number(arguments.pop("factor", ""))) not in (0, -1):
        report.map_part("options.factor", int(factor), "network_args factor", int(factor))
    for name, text in arguments.items():
        if text in _DEFAULT_TEXTS or (name, text) == ("wd_on_output", "True"):
            continue
        if name in options and text.lower() in ("true", "1"):
            report.map_part(f"options.{options[name]}", True, f"network_args {name}", text)
        elif name in known and not known[name]:
            continue
        elif name in known:
            report.drop_part(f"network_args {name}", text, known[name])
        elif name in _ALL_OPTIONS | {"factor"}:
            report.drop_part(f"network_args {name}", text, f"method={method} has no such option.")
        else:
            report.drop_part(f"network_args {name}", text, "not a known network argument.")


def _number(text: str) -> float:
    """A network argument as a number; 0 if it is empty."""
    return as_number("a number in network_args", text or None) or 0.0
