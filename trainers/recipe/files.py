"""Recipes as files: those that ship and a person's own, with settings laid over them; mistakes are answered."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from diffgraft.errors import DiffgraftError, did_you_mean, one_line, short_repr
from diffgraft.files import write_text
from diffgraft.trainers.recipe.groups import AdapterSettings, Group
from diffgraft.trainers.recipe.recipe import TASKS, ConceptRecipe, Recipe, SubjectRecipe
from diffgraft.trainers.recipe.renamed import with_current_keys
from diffgraft.trainers.recipe.settings import Prior
from diffgraft.trainers.recipe.synonyms import synonym

_LARGEST = 2**20
"""Bytes of a recipe's file"""
ALIASES = {"dreambooth-lora": "subject"}


def recipe_names() -> dict[str, str]:
    """Name of each recipe that ships → its one-line description, the second comment line of its file."""
    folder = files("diffgraft.recipes")
    shipped = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8").splitlines()[1].lstrip("# ") for file in shipped}


def load_recipe(name: str | Path, settings: Mapping[str, Any]) -> Recipe:
    """The recipe called `name` (or the YAML file at that path), with `settings` laid over it.

    Keys of `settings` may be nested with dots (``prior.weight``); values may be text, as a command line gives them.
    What a recipe says under ``methods:`` holds for the method of that name, and lies between the two.

    Raises:
        DiffgraftError: no such recipe or method, an unknown key (the nearest is named), a value of the wrong kind, or
            one that means nothing to the method.
    """
    from diffgraft.adapters.registry import get_method  # brings torch, which listing recipes does without

    values = _read(name)
    is_ours = Path(name).is_file() and is_saved(Path(name))  # a run's recipe has all keys, under the names of its time
    by_method = _by_method(name, values.pop("methods", None) or {})
    values, settings = with_current_keys(values, warn=not is_ours), with_current_keys(settings)
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise DiffgraftError(
            f"The recipe {name} has task {task!r}; its line `task:` must be one of: {', '.join(TASKS)}."
        )
    kind = TASKS[task]
    own_method = values.get("method", kind.model_fields["method"].default)
    method = get_method(str(settings.get("method", own_method)))
    for key in [key for key in values if isinstance(key, str) and "." in key]:
        _lay_over(kind, values, key, values.pop(key))
    given = {**by_method.get(method.name, {}), **settings}
    for key, value in given.items():
        _lay_over(kind, values, key, value)
    lacking = method.unsupported_under(method.read_options(values.get("options") or {}))
    if method.name != own_method:  # what the recipe says for its own method, another one may not have
        said = {key.partition(".")[0] for key in given}
        values = {key: value for key, value in values.items() if key in said or key not in lacking}
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        raise DiffgraftError(_say(error, kind, name)) from error
    if recipe.format not in (formats := adapter_formats()):
        raise DiffgraftError(f"Invalid value format={short_repr(recipe.format)}: must be one of {', '.join(formats)}.")
    known = {"{trigger}", "{subject}"} if isinstance(recipe, SubjectRecipe | ConceptRecipe) else {"{trigger}"}
    _check_templates([recipe.data, *recipe.parts(), recipe.outputs], known)
    for key, reason in lacking.items():
        value = getattr(recipe, key, None)
        off = value in (None, False, "none") or (isinstance(value, Prior) and value.weight == 0)
        if key in recipe.model_fields_set and not off:
            raise DiffgraftError(f"{key} means nothing to {method.name}: {reason}. Leave it out.")
    return recipe


def adapter_formats() -> list[str]:
    """Return the values of `format`: ``auto``, and every dialect whose adapters are one `.safetensors` file."""
    from diffgraft.adapters.registry import written_dialects

    return ["auto", *(name for name, dialect in written_dialects().items() if dialect.is_safetensors)]


def explained(name: str) -> list[tuple[str, str, str]]:
    """Of every key that means something in a recipe: its name, its value as one would write it, and what it means."""
    from diffgraft.adapters.registry import get_method

    values = _read(name)
    values.pop("methods", None)
    task = TASKS.get(str(values.get("task")), Recipe)
    method = get_method(values.get("method", task.model_fields["method"].default))
    lacking = {"task", *method.unsupported_under(method.read_options(values.get("options") or {}))}
    return [row for row in _explained(task, values) if row[0].partition(".")[0] not in lacking]


def _explained(kind: type[BaseModel], values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for key, info in kind.model_fields.items():
        inner, default = info.annotation, None if info.is_required() else info.get_default(call_default_factory=True)
        value = values.get(key, default)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            held = dict(default) if isinstance(default, BaseModel) else {}
            own = {**held, **(value if isinstance(value, Mapping) else {})}
            found += [(f"{key}.{name}", said, meaning) for name, said, meaning in _explained(inner, own)]
        else:
            choices = f" ({', '.join(adapter_formats())})" if key == "format" else _choices(inner)
            found.append((key, _as_typed(value), " ".join((info.description or "").split()) + choices))
    return found


def _choices(annotation: Any) -> str:
    """What a key with a few values may be, in words."""
    known = [one for one in get_args(annotation) if isinstance(one, str)] if get_origin(annotation) is Literal else []
    return f" ({', '.join(known)})" if known else ""


def _as_typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "" if value is None or value == {} else str(value)


def unsupported_keys(adapter: AdapterSettings) -> Mapping[str, str]:
    """Keys of a recipe that have no meaning for the method of its adapter → why."""
    from diffgraft.adapters.registry import get_method

    method = get_method(adapter.method)
    return method.unsupported_under(method.read_options(adapter.options))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe, defaults filled in, so that it can be run again; the output folder is left open.

    A file that says the same already is left alone, as a full disk may have no room for another.
    """
    said = recipe.model_dump(mode="json", exclude={"output", *unsupported_keys(recipe)})
    text = f"{_SAVED} {path.name}\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def is_saved(path: Path) -> bool:
    """Whether a file was written by `save_recipe`, in a run's folder, and no person's own."""
    with path.open("rb") as file:
        first, second = file.readline(200), file.readline(200)
    return first.rstrip() == f"{_SAVED} {path.name}".encode() and not second.startswith(b"#")


_SAVED = "# diffgraft train"
"""How the recipe of a run begins"""


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
        raise DiffgraftError(f"There is no recipe {str(name)!r}: {did_you_mean(str(name), shipped)}")
    values = _parsed(name, text)
    if not isinstance(values, dict):
        raise DiffgraftError(f"The recipe {name} holds no keys; it should be lines of `key: value`.")
    return values


def _text_of(path: Path) -> str:
    """A recipe's text, which is UTF-8: other encodings would change the words in it."""
    if path.stat().st_size > _LARGEST:
        raise DiffgraftError(f"The recipe {path} is larger than {_LARGEST:,} bytes, which no recipe is.")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DiffgraftError(
            f"The recipe {path} is not UTF-8 (line {line}): save it as UTF-8, so that its words stay what they are."
        ) from error


def _parsed(name: str | Path, text: str) -> Any:
    """What a recipe's text says.

    Raises:
        DiffgraftError: it is not YAML, or refers back to its own parts, of which a few lines can make gigabytes.
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise DiffgraftError(
                    f"The recipe {name} refers to *{token.value} (line {token.start_mark.line + 1}); recipes take no "
                    "anchors and aliases: write the value out."
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
    """YAML's safe loader, to which a key that is there twice is a mistake: YAML's own keeps the last, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _by_method(name: str | Path, said: Any) -> dict[str, dict[str, Any]]:
    """What a recipe says under ``methods:``, with the names checked."""
    from diffgraft.adapters.registry import get_method

    if not isinstance(said, dict) or not all(isinstance(own, dict) for own in said.values()):
        raise DiffgraftError(
            f"Under methods: the recipe {name} should say `method: {{key: value}}`, and says "
            f"{one_line(repr(said), 100)}."
        )
    return {get_method(str(method)).name: with_current_keys(own) for method, own in said.items()}


def _lay_over(kind: type[Recipe], values: dict[str, Any], key: str, value: Any) -> None:
    model: type[BaseModel] = kind
    *outer, last = key.split(".")
    field, dot, rest = key.partition(".")
    if dot and field in kind.model_fields and get_origin(kind.model_fields[field].annotation) is dict:
        values[field] = _with(values.get(field), rest, value, deep=field == "options")
        return
    for level in outer:
        inner = model.model_fields[level].annotation if level in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            raise DiffgraftError(_unknown(key, kind))
        if not isinstance(held := values.get(level), dict):
            values[level] = {"use": held} if isinstance(held, bool) else {}
        values, model = values[level], inner
    if last not in model.model_fields:
        raise DiffgraftError(_unknown(key, kind))
    if isinstance(value, str) and model.model_fields[last].annotation == list[str]:
        value = [part.strip() for part in value.split("|")]
    values[last] = None if value == "" and last in ("alpha", "resolution", "layers", "text_encoder_stop") else value


def _with(held: Any, key: str, value: Any, *, deep: bool) -> dict[str, Any]:
    """A mapping with `key` in it, last, for of patterns the last counts; `deep` ones hold mappings under first words.

    The method says what options are, so that their names are not looked at here; other keys may have dots of their own.
    """
    there = dict(held) if isinstance(held, Mapping) else {}
    name, dot, rest = key.partition(".") if deep else (key, "", "")
    before = there.pop(name, None)
    return {**there, name: _with(before, rest, value, deep=False) if dot else value}


def _check_templates(groups: Sequence[Group], known: set[str]) -> None:
    """Refuse a {word} that nothing fills: it would be trained as it stands."""
    keys = ("prompt", "class_prompt", "caption", "sample_prompts")
    for key, value in ((key, getattr(group, key, "")) for group in groups for key in keys):
        for word in re.findall(r"\{\w*\}", " ".join(value) if isinstance(value, list) else value):
            if word not in known | ({"{caption}"} if key == "caption" else set()):
                raise DiffgraftError(f"Nothing fills {word} in {key}={value!r}: {did_you_mean(word, known)}")


def _keys(kind: type[BaseModel]) -> list[str]:
    keys = []
    for name, info in kind.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in _keys(inner)]
        else:
            keys.append(name)
    return keys


def _unknown(key: str, kind: type[Recipe]) -> str:
    """There is no such key; the hint is ours for what other tools call so, else the nearest."""
    known = _keys(kind)
    ours = synonym(key)
    is_here = ours in known or ours.partition(".")[0] in ("options", "lr_scale")
    hint = f"here it is called {ours!r}." if ours and is_here else did_you_mean(key, known)
    return f"There is no setting {key!r} in a {kind.model_fields['task'].default} recipe: {hint}"


def _say(error: ValidationError, kind: type[Recipe], name: str | Path) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(key, kind)
    if first["type"] == "missing":
        return f"The recipe {name} needs a value for {key!r}: add {key}=… ({_meaning(kind, key)})."
    inside = kind.model_fields[key].annotation if key in kind.model_fields else None
    if isinstance(inside, type) and issubclass(inside, BaseModel):
        keys = ", ".join(f"{key}.{name}" for name in inside.model_fields)
        return f"Invalid value {key}={short_repr(first['input'])}: {key} is a group; set one of its keys: {keys}."
    reason = first["msg"].lower().replace("input should be", "must be").removeprefix("value error, ")
    return f"Invalid value {key}={short_repr(first['input'])}: {reason}. Meaning of {key}: {_meaning(kind, key)}."


def _meaning(kind: type[BaseModel], key: str) -> str:
    info = None
    for level in key.split("."):
        info = kind.model_fields.get(level, info)
        inner = info.annotation if info else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            kind = inner
    return " ".join(((info.description if info else None) or "see the recipe's documentation").split())
