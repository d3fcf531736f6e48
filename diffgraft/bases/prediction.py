"""Prediction type of a base and zero terminal SNR of its noise schedule: detected from files, or set by options.

Single files have no configuration. Some have a header entry (``modelspec.prediction_type``), and files of XL empty
tensors called ``v_pred`` and ``ztsnr``. Files of Stable Diffusion 2 have neither: as in ComfyUI
(``comfy/supported_models.py``), the standard deviation of one bias decides, which is larger in models that predict v.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.diffusion.parameterizations import Parameterization, parameterization
from diffgraft.errors import DiffgraftError, did_you_mean

PREDICTION_KEY = "prediction_type"
"""Key of the prediction type in recipes, headers and schedulers"""
PREDICTIONS = ("epsilon", "v_prediction")
_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_PRED_STD = 0.09
"""Standard deviation of `_BIAS` above which a model of Stable Diffusion 2 predicts v"""
V_PRED_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"


def detect_prediction_type(family: str, file: Any, keys: set[str]) -> dict[str, Any]:
    """Return `prediction_type` and `zero_snr` of a single file, as far as it determines them.

    Args:
        family: name of the file's family.
        file: an open safetensors file.
        keys: names of its tensors.
    """
    header: Mapping[str, str] = file.metadata() or {}
    entry = header.get("modelspec.prediction_type", "")
    options: dict[str, Any] = {"zero_snr": True} if ZERO_SNR_MARKER in keys else {}
    if entry in ("v", "epsilon"):
        options["prediction_type"] = "v_prediction" if entry == "v" else "epsilon"
    elif V_PRED_MARKER in keys:
        options["prediction_type"] = "v_prediction"
    elif family == "sd2" and _BIAS in keys:
        bias: Tensor = file.get_tensor(_BIAS)
        deviation = float(bias.float().std(correction=0))
        options["prediction_type"] = "v_prediction" if deviation > _V_PRED_STD else "epsilon"
    return options


def with_prediction_type(scheduler: Any, prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
    """Return a diffusers scheduler with another prediction type or zero terminal SNR; None leaves either as it is.

    Schedules rescaled to zero terminal SNR (Lin et al. 2023, arXiv:2305.08891, section 3.1) start at the last timestep.

    Raises:
        DiffgraftError: the prediction type does not exist, or is ``epsilon`` with zero terminal SNR.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise DiffgraftError(
            f"Invalid value prediction_type={prediction_type!r}: {did_you_mean(prediction_type, PREDICTIONS)}"
        )
    if prediction_type is None and zero_snr is None:
        return scheduler
    if PREDICTION_KEY not in scheduler.config:
        given = f"zero_snr={zero_snr}" if prediction_type is None else f"prediction_type={prediction_type}"
        raise DiffgraftError(
            f"{given} has no meaning for this base: it predicts the flow, on a schedule that ends in pure noise. Leave "
            "it out."
        )
    options: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    kind = type(scheduler)
    if zero_snr is not None:
        options["rescale_betas_zero_snr"] = zero_snr
        if zero_snr:
            from diffusers import DDIMScheduler

            options["timestep_spacing"] = "trailing"
            if "rescale_betas_zero_snr" not in kind().config:
                kind = DDIMScheduler
    config = {**scheduler.config, **options}
    if config.get("rescale_betas_zero_snr") and config["prediction_type"] == "epsilon":
        raise DiffgraftError(
            "A base that predicts ε cannot have zero_snr=true: pure noise tells nothing about the picture. Set "
            "prediction_type=v_prediction if this base predicts v, else zero_snr=false."
        )
    return kind.from_config(scheduler.config, **options)


def ddpm_parameterization(scheduler: Any) -> Parameterization:
    """Return the prediction and noise schedule of a UNet of Stable Diffusion, from its diffusers `scheduler`.

    Raises:
        DiffgraftError: the scheduler has another prediction type than ``epsilon`` and ``v_prediction``.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(scheduler.config)
    return parameterization(str(scheduler.config.prediction_type), schedule.alphas_cumprod)


def v_pred_markers(family: str, prediction_type: str, zero_snr: bool) -> dict[str, Tensor]:
    """Return the empty tensors that mark v-prediction in a single file of XL; none for other families."""
    if family != "sdxl" or prediction_type != "v_prediction":
        return {}
    return {V_PRED_MARKER: torch.zeros(0), **({ZERO_SNR_MARKER: torch.zeros(0)} if zero_snr else {})}


def prediction_header(prediction_type: str) -> dict[str, str]:
    """Return the header entry of a single file for its prediction type (ModelSpec 1.0.1)."""
    return {"modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon"}
