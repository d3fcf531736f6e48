"""Recipes as files: those that ship and those of users, with settings that override their keys."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from diffgraft.errors import DiffgraftError, did_you_mean, one_line, short_repr
from diffgraft.files import write_text
from diffgraft.trainers.recipe.groups import AdapterSettings, Group
from diffgraft.trainers.recipe.recipe import TASKS, ConceptRecipe, Recipe, SubjectRecipe
from diffgraft.trainers.recipe.renamed import plain_value, with_current_keys
from diffgraft.trainers.recipe.settings import Concept, Prior
from diffgraft.trainers.recipe.synonyms import synonym

if TYPE_CHECKING:  # listing recipes does without torch
    from diffgraft.adapters.method import Method

_LARGEST = 2**20
"""Bytes of a recipe's file"""
ALIASES = {"dreambooth-lora": "subject"}


def recipe_names() -> dict[str, str]:
    """Return the name of each recipe that ships → its description, the second comment line of its file."""
    folder = files("diffgraft.recipes")
    shipped = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8").splitlines()[1].lstrip("# ") for file in shipped}


def load_recipe(name: str | Path, settings: Mapping[str, Any]) -> Recipe:
    """Load the recipe called `name`, or the YAML file at that path, with `settings` overriding its keys.

    Keys of `settings` may be nested with dots (``prior.weight``); values may be text, as on a command line. Keys that
    the recipe has under ``methods:`` apply to the method of that name; `settings` override them as well.

    Raises:
        DiffgraftError: unknown recipe or method, unknown key (the message names the nearest one), invalid value, or a
            key that the method does not support.
    """
    from diffgraft.adapters.registry import get_method  # imports torch, which listing recipes does not need

    values = _read(name)
    # the recipe of a run lists all keys under the names they had: nobody wrote them by hand
    is_of_run = Path(name).is_file() and is_saved(Path(name))
    by_method = _by_method(name, values.pop("methods", None) or {})
    values, settings = with_current_keys(values, warn=not is_of_run), with_current_keys(settings)
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise DiffgraftError(f"Invalid task {task!r} in the recipe {name}: must be one of {', '.join(TASKS)}.")
    kind = TASKS[task]
    default_method = values.get("method", kind.model_fields["method"].default)
    method = get_method(str(settings.get("method", default_method)))
    for key in [key for key in values if isinstance(key, str) and "." in key]:
        _merge_override(kind, values, key, values.pop(key))
    given = {**by_method.get(method.name, {}), **settings}
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):  # mappings first, then single entries
        _merge_override(kind, values, key, value)
    unsupported = method.unsupported_under(method.read_options(values.get("options") or {}))
    if method.name != default_method:  # keys that the recipe has for its default method may be unsupported by another
        overridden = {key.partition(".")[0] for key in given}
        values = {key: value for key, value in values.items() if key in overridden or key not in unsupported}
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        raise DiffgraftError(_validation_message(error, kind, name)) from error
    if recipe.format not in (formats := adapter_formats()):
        raise DiffgraftError(f"Invalid value format={short_repr(recipe.format)}: must be one of {', '.join(formats)}.")
    _check_task(task, method)
    known = {"{trigger}", "{subject}"} if isinstance(recipe, SubjectRecipe | ConceptRecipe) else {"{trigger}"}
    _check_templates([recipe.data, *recipe.parts(), recipe.outputs], known)
    for key, reason in unsupported.items():
        value = getattr(recipe, key, None)
        off = value in (None, False, "none") or (isinstance(value, Prior) and value.weight == 0)
        if key in recipe.model_fields_set and not off:
            raise DiffgraftError(f"{key} is not supported by method={method.name}: {reason}. Remove it.")
    # a run's recipe has no keys without effect, so that those which are off must not differ from their defaults either
    defaults = kind.model_construct()
    changes = {key: getattr(defaults, key) for key in unsupported if key in recipe.model_fields_set}
    return recipe.model_copy(update=changes) if changes else recipe


def _check_task(task: str, method: "Method") -> None:
    """Raise DiffgraftError if the method needs condition pictures and the task has none, or the other way round."""
    has_conditions = "control" in TASKS[task].model_fields
    if method.needs_conditions and not has_conditions:
        raise DiffgraftError(
            f"method={method.name} needs condition pictures, which a {task} recipe does not have: use the recipe "
            "control."
        )
    if has_conditions and not method.needs_conditions:
        raise DiffgraftError(
            f"method={method.name} does not use condition pictures, which a {task} recipe is about: set "
            f"method={TASKS[task].model_fields['method'].default}."
        )


def adapter_formats() -> list[str]:
    """Return the values of `format`: ``auto``, and every dialect whose adapters are one `.safetensors` file."""
    from diffgraft.adapters.registry import written_dialects

    return ["auto", *(name for name, dialect in written_dialects().items() if dialect.is_safetensors)]


def described_keys(name: str) -> list[tuple[str, str, str]]:
    """Return the name, the value as text and the meaning of every key that the recipe `name` and its method support."""
    from diffgraft.adapters.registry import get_method

    values = _read(name)
    values.pop("methods", None)
    task = TASKS.get(str(values.get("task")), Recipe)
    method = get_method(values.get("method", task.model_fields["method"].default))
    unsupported = {"task", *method.unsupported_under(method.read_options(values.get("options") or {}))}
    rows = [row for row in _describe(task, values) if row[0].partition(".")[0] not in unsupported]
    meanings = _meanings_of_options(values.get("loss") or {})
    return [(key, text, meanings.get(key, meaning)) for key, text, meaning in rows]


def _meanings_of_options(loss: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of each option of the objective that a recipe's `loss` names → its meaning."""
    if not (name := loss.get("objective")):
        return {}
    from diffgraft.trainers.objectives.registry import objectives  # imports torch, as `get_method` does

    fields = objectives()[name].options.model_fields
    return {f"loss.options.{key}": " ".join((field.description or "").split()) for key, field in fields.items()}


def _describe(kind: type[BaseModel], values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for key, info in kind.model_fields.items():
        inner, default = info.annotation, None if info.is_required() else info.get_default(call_default_factory=True)
        value = values.get(key, default)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            defaults = dict(default) if isinstance(default, BaseModel) else {}
            inner_values = {**defaults, **(value if isinstance(value, Mapping) else {})}
            rows += [(f"{key}.{name}", text, meaning) for name, text, meaning in _describe(inner, inner_values)]
        elif isinstance(value, Mapping) and value:
            meaning = " ".join((info.description or "").split())
            rows += [(f"{key}.{name}", _as_text(entry), meaning) for name, entry in value.items()]
        else:
            choices = f" ({', '.join(adapter_formats())})" if key == "format" else _allowed_values(inner)
            rows.append((key, _as_text(value), " ".join((info.description or "").split()) + choices))
    return rows


def _allowed_values(annotation: Any) -> str:
    """Return the allowed values of a key, in brackets; empty where any value of its type is allowed."""
    known = (
        [value for value in get_args(annotation) if isinstance(value, str)] if get_origin(annotation) is Literal else []
    )
    return f" ({', '.join(known)})" if known else ""


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "" if value is None or value == {} else str(value)


def unsupported_keys(adapter: AdapterSettings) -> Mapping[str, str]:
    """Return the recipe keys that the method of the adapter does not support → the reason."""
    from diffgraft.adapters.registry import get_method

    method = get_method(adapter.method)
    return method.unsupported_under(method.read_options(adapter.options))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write all keys of a recipe, defaults included, so that it can be run again; `output` is left out.

    A file with the same content is left alone, as a full disk may have no space for another.
    """
    values = recipe.model_dump(mode="json", exclude={"output", *unsupported_keys(recipe)})
    text = f"{_SAVED} {path.name}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def is_saved(path: Path) -> bool:
    """Whether the file at `path` was written by `save_recipe` into the folder of a run."""
    with path.open("rb") as file:
        first, second = file.readline(200), file.readline(200)
    return first.rstrip() == f"{_SAVED} {path.name}".encode() and not second.startswith(b"#")


_SAVED = "# diffgraft train"
"""First words of the recipe of a run"""


def _read(name: str | Path) -> dict[str, Any]:
    if not isinstance(name, str | Path):
        raise DiffgraftError(f"Invalid recipe {short_repr(name)}: must be a name or the path of a YAML file.")
    shipped = recipe_names()
    known = ALIASES.get(str(name), str(name))
    if known in shipped:
        text = (files("diffgraft.recipes") / f"{known}.yaml").read_text("utf-8")
    elif Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        text = _text_of(Path(name))
    else:
        raise DiffgraftError(f"Unknown recipe {str(name)!r}: {did_you_mean(str(name), shipped)}")
    values = _parsed(name, text)
    if not isinstance(values, dict):
        raise DiffgraftError(f"The recipe {name} has no keys: expected lines of `key: value`.")
    return values


def _text_of(path: Path) -> str:
    """Return the text of a recipe, which must be UTF-8: another encoding would change its words."""
    if path.stat().st_size > _LARGEST:
        raise DiffgraftError(
            f"The recipe {path} is larger than {_LARGEST:,} bytes, the largest that a recipe may be: give another file."
        )
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DiffgraftError(f"The recipe {path} is not UTF-8 (line {line}): save it as UTF-8.") from error


def _parsed(name: str | Path, text: str) -> Any:
    """Parse the YAML `text` of the recipe `name`.

    Raises:
        DiffgraftError: invalid YAML, or an alias, with which a few lines can make gigabytes.
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise DiffgraftError(
                    f"The recipe {name} has the alias *{token.value} (line {token.start_mark.line + 1}); recipes "
                    "cannot have anchors and aliases: write the value out."
                )
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f" (line {at.line + 1}, column {at.column + 1})" if at else ""
        what = error.problem or error.context or "it cannot be parsed"
        raise DiffgraftError(f"The recipe {name} is not readable YAML{where}: {one_line(what, 200)}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DiffgraftError(f"The recipe {name} is not readable YAML: {one_line(error, 200)}.") from error


class _Loader(yaml.SafeLoader):
    """The safe loader of YAML, which refuses duplicate keys; the original keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict from a mapping of YAML; raise for a key that occurs twice, which PyYAML accepts."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _by_method(name: str | Path, keys_by_method: Any) -> dict[str, dict[str, Any]]:
    """Return the keys under ``methods:`` by method name, after checking the names."""
    from diffgraft.adapters.registry import get_method

    if not isinstance(keys_by_method, dict) or not all(isinstance(keys, dict) for keys in keys_by_method.values()):
        raise DiffgraftError(
            f"Invalid methods: of the recipe {name}: expected lines of `method: {{key: value}}`, found "
            f"{one_line(repr(keys_by_method), 100)}."
        )
    return {get_method(str(method)).name: with_current_keys(keys) for method, keys in keys_by_method.items()}


def _merge_override(kind: type[Recipe], values: dict[str, Any], key: str, value: Any) -> None:
    model: type[BaseModel] = kind
    last = key
    while "." in last:
        level, _, last = last.partition(".")
        inner = model.model_fields[level].annotation if level in model.model_fields else None
        if get_origin(inner) is dict:
            values[level] = _with_key(values.get(level), last, value, deep=level == "options")
            return
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            raise DiffgraftError(_unknown_key(key, kind))
        if not isinstance(nested := values.get(level), dict):
            values[level] = {"use": nested} if isinstance(nested, bool) else {}
        values, model = values[level], inner
    if last not in model.model_fields:
        raise DiffgraftError(_unknown_key(key, kind))
    if isinstance(value, str) and model.model_fields[last].annotation == list[str]:
        value = [part.strip() for part in value.split("|")]
    values[last] = None if value == "" and last in ("alpha", "resolution", "layers", "text_encoder_stop") else value


def _with_key(previous: Any, key: str, value: Any, *, deep: bool) -> dict[str, Any]:
    """Return the mapping `previous` with `key` set last, as the last of several matching patterns counts.

    A key that already has this value keeps its position. With `deep`, the part of the key before its first dot names a
    nested mapping. Names of options are checked by the method, not here; keys without `deep` may contain dots.
    """
    mapping = dict(previous) if isinstance(previous, Mapping) else {}
    name, dot, rest = key.partition(".") if deep else (key, "", "")
    if not dot and name in mapping and _is_same(mapping[name], value):
        return mapping
    before = mapping.pop(name, None)
    return {**mapping, name: _with_key(before, rest, value, deep=False) if dot else value}


def _is_same(old: Any, new: Any) -> bool:
    """Whether two values are equal once text, as on a command line, is read as YAML."""
    return bool(old == new or plain_value(old) == plain_value(new))


def _check_templates(groups: Sequence[Group], known: set[str]) -> None:
    """Refuse an unknown placeholder such as {word}: it would be trained on literally."""
    keys = {"prompt": "", "class_prompt": "", "caption": "{caption}", "sample_prompts": ""}
    texts = [(key, getattr(group, key, ""), own) for group in groups for key, own in keys.items()]
    priors = [prior for group in groups if (prior := getattr(group, "prior", None)) is not None]
    texts += [("prior.prompts", prior.prompts, "{class_prompt}") for prior in priors]
    for key, value, own in texts:
        for word in re.findall(r"\{\w*\}", " ".join(value) if isinstance(value, list) else value):
            if word not in {*known, own}:
                raise DiffgraftError(f"Unknown placeholder {word} in {key}={value!r}: {did_you_mean(word, known)}")


def _keys(kind: type[BaseModel]) -> list[str]:
    keys = []
    for name, info in kind.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in _keys(inner)]
        else:
            keys.append(name)
    return keys


def _unknown_key(key: str, kind: type[Recipe]) -> str:
    """Return the message for an unknown key, with the key that other tools call so, or the nearest one."""
    if key.startswith("concepts."):
        return (
            f"Unknown setting {key!r}: a concept can have {', '.join(_keys(Concept))}; set others for the whole recipe."
        )
    known = _keys(kind)
    current = synonym(key)
    is_known = current in known or current.partition(".")[0] in ("options", "lr_scale")
    hint = f"in diffgraft it is called {current!r}." if current and is_known else did_you_mean(key, known)
    return f"Unknown setting {key!r} for a {kind.model_fields['task'].default} recipe: {hint}"


_ALTERNATIVES = ("literal[", "constrained-", "function-", "float", "int", "str")
"""Beginnings of what pydantic adds to the place of a value that may be of several types"""


def _validation_message(error: ValidationError, kind: type[Recipe], name: str | Path) -> str:
    first = error.errors()[0]
    named = [str(part) for part in first["loc"] if not str(part).startswith(_ALTERNATIVES)]
    key = ".".join(named)
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, kind)
    if first["type"] == "missing":
        return f"The recipe {name} requires {key!r}: add {key}=… ({_meaning(kind, key)})."
    inside = kind.model_fields[key].annotation if key in kind.model_fields else None
    if first["type"] == "dict_type":
        return f"Invalid value {key}={short_repr(first['input'])}: set its entries, as in {key}.NAME=VALUE."
    if first["loc"][-1] == "[key]":
        return f"Invalid name {first['input']!r} in {first['loc'][0]}: must be text."
    if isinstance(inside, type) and issubclass(inside, BaseModel):
        keys = ", ".join(f"{key}.{name}" for name in inside.model_fields)
        return f"Invalid value {key}={short_repr(first['input'])}: {key} is a group; set one of its keys: {keys}."
    others = [item for item in error.errors() if [str(part) for part in item["loc"]][: len(named)] == named]
    texts = [item["msg"].lower().partition(", unable to parse")[0] for item in others]
    reasons = [text.removeprefix("input should be ").removeprefix("value error, ") for text in texts]
    must = "must be " if first["msg"].startswith("Input should be ") else ""
    reason = must + (" or ".join(dict.fromkeys(reasons)) if len(named) < len(first["loc"]) else reasons[0])
    return f"Invalid value {key}={short_repr(first['input'])}: {reason}. Meaning of {key}: {_meaning(kind, key)}."


def _meaning(kind: type[BaseModel], key: str) -> str:
    info = None
    for level in key.split("."):
        info = kind.model_fields.get(level, info)
        inner = info.annotation if info else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            kind = inner
    return " ".join(((info.description if info else None) or "see the recipe's documentation").split())
