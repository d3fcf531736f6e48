"""Conversion of other tools' configurations to recipes: kohya's sd-scripts, its GUI, OneTrainer, ai-toolkit, LECO.

Each tool has tables of its keys with their defaults and the recipe keys they map to; keys that have a meaning only
together are converted by small functions. Every key of a file is listed in the `ImportReport`: mapped, dropped with a
reason, or equal to the default.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_write, write_text
from diffgraft.imports import kohya, kohya_gui, onetrainer, sliders
from diffgraft.imports.import_report import ImportReport
from diffgraft.imports.kohya_keys import DEFAULTS
from diffgraft.imports.reading import read_config
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.recipe.recipe import TASKS, Recipe


def convert_config(files: Sequence[Path]) -> ImportReport:
    """Convert a configuration and, optionally, its data set: a dataset_config, concepts, or the prompts of LECO.

    Raises:
        DiffgraftError: a file cannot be read, is of an unknown tool, or is for an unsupported model family.
    """
    configs = {file: read_config(file) for file in files}
    main_files = [file for file, config in configs.items() if not _is_data_set(config)]
    data_files = [file for file in configs if file not in main_files]
    if len(main_files) > 1 or len(data_files) > 1:
        raise DiffgraftError(
            f"{' and '.join(map(str, files))} are not a configuration and its data set: give one of each, or one file."
        )
    file, config = (main_files[0], configs[main_files[0]]) if main_files else (data_files[0], {})
    data_file = data_files[0] if data_files else None
    concepts = configs[data_file] if data_file is not None and isinstance(configs[data_file], list) else None
    if kohya_gui.is_gui(config):
        report = kohya_gui.as_arguments(config)
        kohya.convert(report, file, data_file)
    elif sliders.is_leco(config, concepts):
        report = sliders.convert_leco(config, file, concepts)
    elif sliders.is_ai_toolkit(config):
        report = sliders.convert_ai_toolkit(config, file)
    elif concepts is not None or _is_onetrainer(config):
        report = onetrainer.convert(config, file, concepts)
    else:
        flat = {key: value for name, section in config.items() for key, value in _section_keys(name, section).items()}
        if config and not flat.keys() & DEFAULTS.keys():
            raise DiffgraftError(
                f"{file} is not a known configuration of sd-scripts, kohya_ss, OneTrainer, LECO or ai-toolkit."
            )
        report = ImportReport("sd-scripts", flat, DEFAULTS)
        kohya.convert(report, file, data_file)
    report.finalize(_defaults(report.recipe))
    return report


def write_recipe(report: ImportReport, path: Path, source: str) -> Recipe:
    """Write the report's recipe to `path`, and return it as loaded from there; `source` names the original files.

    Raises:
        DiffgraftError: the file exists, does not end in .yaml or .yml, or the recipe is invalid.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise DiffgraftError(f"{path} should end in .yaml, as recipes do.")
    if path.exists():
        raise DiffgraftError(f"{path} exists already. Choose another name with -o, or remove it.")
    text = yaml.safe_dump(_nested(report.recipe), sort_keys=False, allow_unicode=True, width=120)
    head = f"# diffgraft train {path.name}\n# made of {source} of {report.tool}\n"
    with atomic_write(path) as partial:
        write_text(partial, head + text)
        return load_recipe(partial, {})


def _is_onetrainer(config: dict[str, Any]) -> bool:
    """Whether a configuration is OneTrainer's, whose types of models are in capitals; sd-scripts has a `model_type`."""
    return bool({"training_method", "base_model_name"} & config.keys()) or str(config.get("model_type", "")).isupper()


def _is_data_set(config: Any) -> bool:
    """Whether a configuration is a dataset_config of sd-scripts, or a list: OneTrainer's concepts or LECO's prompts."""
    return isinstance(config, list) or (bool(config) and config.keys() <= {"general", "datasets"})


def _section_keys(name: str, value: Any) -> dict[str, Any]:
    """Keys of a section in a TOML file, whose name sd-scripts ignores; or a top-level key itself."""
    return value if isinstance(value, dict) else {name: value}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Recipe keys with dots as nested groups, in the order of the recipe's fields."""
    order = {name: row for task in TASKS.values() for row, name in enumerate(task.model_fields)}
    nested: dict[str, Any] = {}
    for key in sorted(flat, key=lambda key: order.get(key.partition(".")[0], len(order))):
        outer, dot, inner = key.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = flat[key]
        else:
            nested[outer] = flat[key]
    return nested


def _defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the recipe's task; nested keys have dots."""
    task = TASKS[recipe["task"]]
    required = {"subject": "x"} if recipe["task"] == "subject" else {}
    defaults = task.model_validate(required).model_dump(exclude={"task", "subject"})
    flat: dict[str, Any] = {}
    for key, value in defaults.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
