"""sd-scripts' arguments for FLUX.1 and Stable Diffusion 3: networks, timesteps, and the files of a base's parts.

Names and defaults as in `flux_train_network.py`, `sd3_train_network.py`, `library/flux_train_utils.py` and
`library/sd3_train_utils.py`.
"""

from typing import Any

from diffgraft.imports.flow import drop_meaningless
from diffgraft.imports.import_report import ImportReport, KeyRule, defaults_of, map_table, unsupported

NETWORKS = {"networks.lora_flux": "FLUX.1", "networks.lora_sd3": "Stable Diffusion 3"}
"""Network module → family"""
_OF_ONE_PART = ("clip_l", "clip_g", "t5xxl", "ae")
_T5 = {"FLUX.1": "text_encoder_2", "Stable Diffusion 3": "text_encoder_3"}
"""Family → name of its T5 encoder"""

TABLE: dict[str, KeyRule] = {
    **unsupported("the parts are read from `components`.", **dict.fromkeys(_OF_ONE_PART)),
    **unsupported("prompts are encoded up to the length of the family's pipeline.", t5xxl_max_token_length=None),
    **unsupported(
        "padded tokens are masked as in the family's pipeline.", apply_t5_attn_mask=False, apply_lg_attn_mask=False
    ),
    **unsupported(
        "encoders are not dropped one by one: set caption_dropout.",
        clip_l_dropout_rate=0.0,
        clip_g_dropout_rate=0.0,
        t5_dropout_rate=0.0,
    ),
    **unsupported("positions are not cropped.", pos_emb_random_crop_rate=0.0, enable_scaled_pos_embed=False),
    **unsupported("only FLUX.1 is supported, and not Chroma.", model_type="flux"),
    **unsupported("control networks are not loaded in training.", controlnet_model_name_or_path=None),
}
"""Arguments of these scripts that are dropped"""
_IDLE: dict[str, Any] = {
    **dict.fromkeys(("blocks_to_swap", "text_encoder_batch_size", "t5xxl_device", "t5xxl_dtype")),
    **dict.fromkeys(("save_clip", "save_t5xxl", "split_mode"), False),
}
"""Arguments that affect memory and files, but not the result"""
_APART: dict[str, Any] = {
    **{"guidance_scale": 3.5, "timestep_sampling": "sigma", "sigmoid_scale": 1.0, "discrete_flow_shift": 3.0},
    **{"model_prediction_type": "sigma_scaled", "training_shift": 1.0},
    **{"weighting_scheme": "uniform", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29},
}
"""Arguments that are mapped together with others"""
DEFAULTS = {**defaults_of(TABLE), **_IDLE, **_APART}
"""Every argument that these scripts have and those for other families do not → its default"""


def family_of(report: ImportReport) -> str:
    """Return the family of flow matching that the network is for; empty for Stable Diffusion 1.x, 2.x and XL."""
    module = report.text("network_module")
    is_lycoris = module == "lycoris.kohya"
    named = "FLUX.1" if report.values.get("ae") else "Stable Diffusion 3" if report.values.get("t5xxl") else ""
    return NETWORKS.get(module, named if is_lycoris else "")


def map_flow(report: ImportReport, family: str, *, trains_text: bool) -> None:
    """Map the arguments of scripts for flow matching; what means nothing to it is dropped from the recipe.

    Args:
        report: a report with method, rates, loss and noise.
        family: a value of `NETWORKS`.
        trains_text: whether text encoders are trained.
    """
    map_table(report, TABLE)
    drop_meaningless(report)
    if report.recipe.get("loss.schedule") == "snr":
        report.withdraw("loss.schedule", "flow matching has no such schedule: delta is constant.")
    report.todo("components", "a diffusers folder or hub id with the text encoders and the VAE.")
    if trains_text and "train_t5xxl=true" not in str(report.get("network_args")).lower().replace(" ", ""):
        report.recipe["lr_scale"] = {**report.recipe.get("lr_scale", {}), _T5[family]: 0.0}  # only the CLIPs are
    if family == "FLUX.1":
        _map_flux(report)
    else:
        _map_scheme(report, toward_noise=1.0)
        _map_shift(report, "training_shift")


def _map_flux(report: ImportReport) -> None:
    kind = report.text("timestep_sampling")
    if kind == "sigma":
        _map_scheme(report, toward_noise=-1.0)  # its timesteps are listed from noise to picture
        _map_shift(report, "discrete_flow_shift")
    elif kind == "uniform":
        report.map("timesteps.distribution", "uniform", "timestep_sampling")
    else:
        report.map("timesteps.distribution", "logit-normal", "timestep_sampling")
        report.map("timesteps.mean", 0.0, "timestep_sampling")
        report.map("timesteps.std", report.number("sigmoid_scale"), "sigmoid_scale")
        if kind == "shift":
            _map_shift(report, "discrete_flow_shift")
        elif kind == "flux_shift":
            report.map("timesteps.shift", "size", "timestep_sampling")
    if report.text("model_prediction_type") != "raw":
        report.drop("model_prediction_type", "the loss is that of the velocity, which sd-scripts calls raw.")
    if report.number("guidance_scale") != 1.0:
        report.drop("guidance_scale", "FLUX.1 dev is trained at an embedded guidance of 1.")


def _map_shift(report: ImportReport, key: str) -> None:
    if (shift := report.number(key)) != 1.0:
        report.map("timesteps.shift", shift, key)


def _map_scheme(report: ImportReport, toward_noise: float) -> None:
    """Map the density of timesteps; `toward_noise` is −1 where a larger drawn number means less noise."""
    scheme = report.text("weighting_scheme")
    if scheme == "logit_normal":
        report.map("timesteps.distribution", "logit-normal", "weighting_scheme")
        mean = report.number("logit_mean") or 0.0
        remark = "larger numbers mean less noise in this script" if toward_noise < 0 and mean else ""
        report.map("timesteps.mean", toward_noise * mean + 0.0, "logit_mean", remark=remark)
        report.map("timesteps.std", report.number("logit_std"), "logit_std")
        return
    report.map("timesteps.distribution", "uniform", "weighting_scheme")
    if scheme == "mode":
        report.drop("weighting_scheme", "not supported: set timesteps.mean with distribution=logit-normal.")
    elif scheme in ("sigma_sqrt", "cosmap"):
        report.drop("weighting_scheme", "all timesteps have the same weight in the loss.")
