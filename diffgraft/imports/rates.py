"""Rates of other tools, one for each part of a base, as one rate and factors on it."""

from collections.abc import Sequence

from diffgraft.imports.account import Account

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def take_rates(
    account: Account,
    rate: tuple[float | None, str],
    texts: tuple[Sequence[float], Sequence[str]],
    optimizer: str,
    *,
    unet_learns: bool = True,
    remark: str = "",
) -> None:
    """Put the rates on the account, and with them whether text encoders learn.

    Args:
        account: where to put them.
        rate: of the UNet, and the key that says it.
        texts: of the text encoders, one for both or one for each, 0 where it does not learn, and the keys that say it.
        optimizer: ours.
        unet_learns: whether the UNet does.
        remark: said beside the rate.
    """
    (lr, key), (own, keys) = rate, texts
    account.take("lr", lr, key, remark=remark)
    if not lr:
        account.ask("lr", "a rate above 0.")
        return
    if any(own):
        account.take("text_encoder", True, *keys)
    parts = {} if unet_learns else {"unet": 0.0}
    factors = [text / lr for text in own] if any(own) else []
    if len(set(factors)) == 1:
        factors = factors[:1]
    if optimizer == "prodigy" and not {*factors} <= {0.0, 1.0}:
        account.lose(keys[0], "prodigy finds one rate for all here.")
        factors = [float(factor > 0) for factor in factors]
    if factors != [1.0]:
        parts |= dict(zip(_TEXT_ENCODERS, factors, strict=False))
    if parts:
        account.take("lr_scale", parts, *keys, remark="factors on lr")
