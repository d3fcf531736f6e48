"""Mapping of other tools' optimizers to the recipe's, and of their settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffgraft.imports.import_report import ImportReport

NO_CLIPPING = 1e9
"""Maximum gradient norm that is never reached, for tools that do not clip gradients"""


@dataclass(frozen=True)
class OptimizerRule:
    """An optimizer of another tool, and the recipe's optimizer that it is mapped to."""

    name: str
    """The recipe's optimizer"""
    weight_decay: float
    """The tool's default"""
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Other setting → the tool's default, and the fixed value of the recipe's optimizer"""
    remark: str = ""
    """Remark in the report"""


_ADAM = {"betas": ((0.9, 0.999), (0.9, 0.999)), "eps": (1e-8, 1e-8), "amsgrad": (False, False)}
_LION = {"betas": ((0.9, 0.99), (0.9, 0.99))}
_PAGED = "without paged memory"
ADAMW = OptimizerRule("adamw", 0.01, _ADAM)
ADAMW_8BIT = OptimizerRule("adamw8bit", 0.01, _ADAM)
LION = OptimizerRule("lion", 0.0, _LION)
LION_8BIT = OptimizerRule("lion8bit", 0.0, _LION)
_ADAFACTOR = {
    "relative_step": (True, False),
    "scale_parameter": (True, False),
    "warmup_init": (False, False),
    "clip_threshold": (1.0, 1.0),
    "decay_rate": (-0.8, -0.8),
    "beta1": (None, None),
}
ADAFACTOR = OptimizerRule("adafactor", 0.0, _ADAFACTOR)
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
PRODIGY = OptimizerRule("prodigy", 0.0, _PRODIGY)
_FREE = {
    "betas": ((0.9, 0.999), (0.9, 0.999)),
    "eps": (1e-8, 1e-8),
    "r": (0.0, 0.0),
    "weight_lr_power": (2.0, 2.0),
}
SCHEDULE_FREE = OptimizerRule("schedule-free", 0.0, _FREE)


def paged(rule: OptimizerRule) -> OptimizerRule:
    """Return the rule for the paged version of the optimizer that `rule` maps to settings of this project."""
    return OptimizerRule(rule.name, rule.weight_decay, rule.settings, _PAGED)


def map_optimizer(
    report: ImportReport,
    key: str,
    name: str,
    table: Mapping[str, OptimizerRule],
    settings: Mapping[str, Any],
    prefix: str,
) -> str:
    """Translate an optimizer of another tool and its settings; return its name in a recipe.

    Args:
        report: the report to add to.
        key: the tool's key with the optimizer's name.
        name: the optimizer's name.
        table: the tool's name of an optimizer in lower case → how name and settings are translated.
        settings: the optimizer's settings in the file.
        prefix: prefix of the settings' names in the report.
    """
    rule = table.get(name.lower())
    if rule is None:
        finds_lr = "adapt" in name.lower() or "prodigy" in name.lower()
        replacement = "prodigy" if finds_lr else "adamw"
        why = ", which finds the learning rate itself as well" if finds_lr else ""
        report.drop(key, f"not supported; replaced by optimizer={replacement}{why}. Check lr, too.")
        report.recipe["optimizer"] = replacement
        for setting, value in settings.items():
            report.drop_part(prefix + setting, value, "it is a setting of that optimizer.")
        return replacement
    report.map("optimizer", rule.name, key, remark=rule.remark)
    decay, remark = settings.get("weight_decay"), "" if "weight_decay" in settings else f"the default of {report.tool}"
    decay = rule.weight_decay if decay is None else decay
    report.map_part("weight_decay", decay, f"{prefix}weight_decay", decay, remark)
    for setting, (default, fixed) in rule.settings.items():
        value = default if settings.get(setting) is None else settings[setting]
        value = tuple(value) if isinstance(value, list) else value
        if value != fixed:
            text = str(fixed).lower() if isinstance(fixed, bool) else fixed
            report.drop_part(prefix + setting, value, f"fixed at {text} in optimizer={rule.name}.")
    for setting in settings:
        if setting not in rule.settings and setting != "weight_decay":
            report.drop_part(prefix + setting, settings[setting], f"optimizer={rule.name} has no such setting.")
    return rule.name
