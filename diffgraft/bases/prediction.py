"""What a base's UNet predicts, and whether its noise schedule ends in pure noise: as files tell, or as one is told.

Single files have no configuration. Some say it in their header (``modelspec.prediction_type``), XL files in empty
tensors called ``v_pred`` and ``ztsnr``. Stable Diffusion 2 says nothing: ComfyUI looks at how far one bias is spread,
which is wider in the models that predict v (``comfy/supported_models.py``), and so do we.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.diffusion.parameterizations import Parameterization, parameterization
from diffgraft.errors import DiffgraftError, did_you_mean

PREDICTION_KEY = "prediction_type"
"""What recipes, headers and schedulers call what a denoiser predicts"""
PREDICTIONS = ("epsilon", "v_prediction")
_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"


def told_by(family: str, file: Any, keys: set[str]) -> dict[str, Any]:
    """`prediction_type` and `zero_snr`, as far as an open safetensors file of that family tells."""
    header: Mapping[str, str] = file.metadata() or {}
    said = header.get("modelspec.prediction_type", "")
    told: dict[str, Any] = {"zero_snr": True} if ZERO_SNR_MARK in keys else {}
    if said in ("v", "epsilon"):
        told["prediction_type"] = "v_prediction" if said == "v" else "epsilon"
    elif V_MARK in keys:
        told["prediction_type"] = "v_prediction"
    elif family == "sd2" and _BIAS in keys:
        bias: Tensor = file.get_tensor(_BIAS)
        spread = float(bias.float().std(correction=0))
        told["prediction_type"] = "v_prediction" if spread > _SPREAD else "epsilon"
    return told


def scheduled(scheduler: Any, prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
    """A diffusers scheduler with another prediction type, or rescaled to end in pure noise; None leaves it as it is.

    Rescaled schedules (Lin et al. 2023, arXiv:2305.08891, section 3.1) are walked through from the very end.

    Raises:
        DiffgraftError: there is no such prediction type, or it cannot go with such a schedule.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise DiffgraftError(
            f"There is no prediction type {prediction_type!r}: {did_you_mean(prediction_type, PREDICTIONS)}"
        )
    if prediction_type is None and zero_snr is None:
        return scheduler
    more: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    kind = type(scheduler)
    if zero_snr is not None:
        more["rescale_betas_zero_snr"] = zero_snr
        if zero_snr:
            from diffusers import DDIMScheduler

            more["timestep_spacing"] = "trailing"
            if "rescale_betas_zero_snr" not in kind().config:
                kind = DDIMScheduler
    whole = {**scheduler.config, **more}
    if whole.get("rescale_betas_zero_snr") and whole["prediction_type"] == "epsilon":
        raise DiffgraftError(
            "A schedule that ends in pure noise cannot go with a UNet that predicts ε: from noise alone it learns "
            "nothing. Set prediction_type=v_prediction, if that is what this base predicts, or else zero_snr=false."
        )
    return kind.from_config(scheduler.config, **more)


def ddpm_parameterization(scheduler: Any) -> Parameterization:
    """What a UNet of Stable Diffusion predicts, on the schedule of its diffusers `scheduler`.

    Raises:
        DiffgraftError: the scheduler names another prediction type than ``epsilon`` and ``v_prediction``.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(scheduler.config)
    return parameterization(str(scheduler.config.prediction_type), schedule.alphas_cumprod)


def v_pred_markers(family: str, predicts: str, zero_snr: bool) -> dict[str, Tensor]:
    """The empty tensors by which a single file of XL tells what it predicts; other families have none."""
    if family != "sdxl" or predicts != "v_prediction":
        return {}
    return {V_MARK: torch.zeros(0), **({ZERO_SNR_MARK: torch.zeros(0)} if zero_snr else {})}


def prediction_header(predicted: str) -> dict[str, str]:
    """The header entry of a single file for what its denoiser predicts (ModelSpec 1.0.1)."""
    return {"modelspec.prediction_type": "v" if predicted == "v_prediction" else "epsilon"}
