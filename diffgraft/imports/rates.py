"""Conversion of learning rates for each part of a base to one learning rate and scales."""

from collections.abc import Sequence

from diffgraft.imports.import_report import ImportReport

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def map_rates(
    report: ImportReport,
    rate: tuple[float | None, str],
    texts: tuple[Sequence[float], Sequence[str]],
    optimizer: str,
    *,
    unet_learns: bool = True,
    remark: str = "",
) -> None:
    """Map learning rates, and whether the text encoders train.

    Args:
        report: the report to add to.
        rate: learning rate of the UNet, and its key.
        texts: learning rates of the text encoders (one for both, or one for each; 0 if frozen), and their keys.
        optimizer: the recipe's optimizer.
        unet_learns: whether the UNet trains.
        remark: remark on the learning rate in the report.
    """
    (lr, key), (text_rates, keys) = rate, texts
    report.map("lr", lr, key, remark=remark)
    if not lr:
        report.todo("lr", "a learning rate above 0.")
        return
    if any(text_rates):
        report.map("text_encoder", True, *keys)
    scales = {} if unet_learns else {"unet": 0.0}
    text_scales = [text / lr for text in text_rates] if any(text_rates) else []
    if len(set(text_scales)) == 1:
        text_scales = text_scales[:1]
    if optimizer == "prodigy" and not {*text_scales} <= {0.0, 1.0}:
        report.drop(keys[0], "prodigy finds one learning rate for all parameters.")
        text_scales = [float(scale > 0) for scale in text_scales]
    if text_scales != [1.0]:
        scales |= dict(zip(_TEXT_ENCODERS, text_scales, strict=False))
    if scales:
        report.map("lr_scale", scales, *keys, remark="factors on lr")
