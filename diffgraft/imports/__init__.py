"""Recipes made of other tools' configurations: kohya's sd-scripts, its GUI, and OneTrainer.

Each tool has tables of its keys with their defaults and what they are called here; what one key alone does not say is
converted by small functions. Every key of a file ends up on the `Account`: taken, without a counterpart and why, or
saying only the default.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_write, write_text
from diffgraft.imports import kohya, kohya_gui, onetrainer
from diffgraft.imports.account import Account
from diffgraft.imports.kohya_keys import DEFAULTS
from diffgraft.imports.reading import read_config
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.recipe.recipe import TASKS, Recipe


def convert(files: Sequence[Path]) -> Account:
    """The configuration in one file, or in a tool's two (sd-scripts' arguments and data set; OneTrainer's concepts).

    Raises:
        DiffgraftError: it cannot be read, is of no tool that is known, or for models that are not known here.
    """
    read = {file: read_config(file) for file in files}
    main = [file for file, said in read.items() if not _is_part(said)]
    parts = [file for file in read if file not in main]
    if len(main) > 1 or len(parts) > 1:
        raise DiffgraftError(
            f"{' and '.join(map(str, files))} are no configuration and its data set: give one of each, or one alone."
        )
    file, said = (main[0], read[main[0]]) if main else (parts[0], {})
    part = parts[0] if parts else None
    concepts = read[part] if part is not None and isinstance(read[part], list) else None
    if kohya_gui.is_gui(said):
        account = kohya_gui.as_arguments(said)
        kohya.convert(account, file, part)
    elif concepts is not None or {"training_method", "model_type", "base_model_name"} & said.keys():
        account = onetrainer.convert(said, file, concepts)
    else:
        flat = {key: value for name, one in said.items() for key, value in _sections(name, one).items()}
        if said and not flat.keys() & DEFAULTS.keys():
            raise DiffgraftError(
                f"{file} is no configuration of sd-scripts, kohya_ss or OneTrainer that is known here."
            )
        account = Account("sd-scripts", flat, DEFAULTS)
        kohya.convert(account, file, part)
    account.settle(_defaults(account.recipe))
    return account


def write_recipe(account: Account, path: Path, source: str) -> Recipe:
    """Write the account's recipe, made of `source`, and read it again.

    Raises:
        DiffgraftError: there is such a file already, or the recipe is invalid.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise DiffgraftError(f"{path} should end in .yaml, as recipes do.")
    if path.exists():
        raise DiffgraftError(f"{path} is there already. Choose another name with -o, or remove it.")
    text = yaml.safe_dump(_nested(account.recipe), sort_keys=False, allow_unicode=True, width=120)
    head = f"# diffgraft train {path.name}\n# made of {source} of {account.tool}\n"
    with atomic_write(path) as partial:
        write_text(partial, head + text)
        return load_recipe(partial, {})


def _is_part(said: Any) -> bool:
    """Whether it is a dataset_config of sd-scripts, or OneTrainer's concepts."""
    return isinstance(said, list) or (bool(said) and said.keys() <= {"general", "datasets"})


def _sections(name: str, said: Any) -> dict[str, Any]:
    """A section of a TOML file, which sd-scripts takes for its keys alone."""
    return said if isinstance(said, dict) else {name: said}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys with dots as groups, in the order in which recipes list them."""
    order = {name: row for kind in TASKS.values() for row, name in enumerate(kind.model_fields)}
    found: dict[str, Any] = {}
    for key in sorted(flat, key=lambda key: order.get(key.partition(".")[0], len(order))):
        outer, dot, inner = key.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = flat[key]
        else:
            found[outer] = flat[key]
    return found


def _defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe of the task has by default, nested keys with dots."""
    kind = TASKS[recipe["task"]]
    needed = {"subject": "x"} if recipe["task"] == "subject" else {}
    whole = kind.model_validate(needed).model_dump(exclude={"task", "subject"})
    flat: dict[str, Any] = {}
    for key, value in whole.items():
        flat |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    return flat
