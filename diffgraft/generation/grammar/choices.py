"""Choices between words, drawn by seed: ``{red|blue}``, ``{2$$a|b|c}``, ``{0.5::a|b}`` and ``__wildcard__``.

The syntax is that of the package dynamicprompts. A wildcard is a line of ``wildcard.txt`` in the folder of wildcards;
lines that start with ``#`` are comments.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffgraft.errors import DiffgraftError, did_you_mean, shorten
from diffgraft.rng import numpy_generator

_STREAM = 0x57494C44
"""Stream of random numbers of choices"""
_INNERMOST = re.compile(r"(?<!\\)\{([^{}]*)\}")
WILDCARD = re.compile(r"__([\w/.-]+)__")
"""A wildcard; its group is the name of the list"""
_COUNT = re.compile(r"(?:(\d+)?(-)?(\d+)?\$\$)(?:([^$|]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d*\.?\d+)::")
_MOST_ROUNDS, _MOST_DIGITS = 1000, 6
"""Choices and wildcards that are made at most, as wildcards may name each other, and digits of a number of options"""


def draw_choices(prompt: str, seed: int, wildcards: Path | None = None) -> str:
    r"""Return the prompt with each choice made at random; inner ones are made first. ``\{`` and ``\}`` are text.

    Args:
        prompt: prompt as written.
        seed: seed of the picture; the same seed and prompt give the same words.
        wildcards: folder with the lists of wildcards; None: ``__name__`` is text.

    Raises:
        DiffgraftError: a wildcard has no list, lists name each other in a circle, or a choice has no options.
    """
    rng = numpy_generator(seed, _STREAM)
    for _ in range(_MOST_ROUNDS):
        if choice := _INNERMOST.search(prompt):
            prompt = prompt[: choice.start()] + _choose(choice[0], choice[1], rng) + prompt[choice.end() :]
        elif wildcards is not None and (wildcard := WILDCARD.search(prompt)):
            lines = _lines(wildcard[1], wildcards)
            prompt = prompt[: wildcard.start()] + lines[int(rng.integers(len(lines)))] + prompt[wildcard.end() :]
        else:
            return prompt.replace("\\{", "{").replace("\\}", "}")
    raise DiffgraftError(
        f"The prompt still has choices or wildcards after {_MOST_ROUNDS} were made: use fewer, and see whether lists "
        "of wildcards name each other."
    )


def _choose(source: str, inside: str, rng: np.random.Generator) -> str:
    """Return one option of a choice, or several of them joined."""
    least, most, joint = 1, 1, ", "
    if count := _COUNT.match(inside):
        lowest, dash, highest, given = count.groups()
        if max(len(lowest or ""), len(highest or "")) > _MOST_DIGITS:
            raise DiffgraftError(f"The choice {shorten(source, 60)} has a number that is too large.")
        least = int(lowest) if lowest else (0 if dash else 1)
        most = (int(highest) if highest else len(inside.split("|"))) if dash else least
        joint = joint if given is None else given
        inside = inside[count.end() :]
    options, weights = [], []
    for option in inside.split("|"):
        weight = _WEIGHT.match(option)
        options.append(option[weight.end() :] if weight else option)
        weights.append(float(weight[1]) if weight else 1.0)
    if not 0 < sum(weights) < float("inf") or least > most:
        raise DiffgraftError(
            f"The choice {shorten(source, 60)} has no option that can be drawn: give one a finite weight above 0."
        )
    shares = np.array(weights) / sum(weights)
    drawable = int((shares > 0).sum())
    number = int(rng.integers(min(least, drawable), min(most, drawable) + 1))
    chosen: Sequence[int] = rng.choice(len(options), number, replace=False, p=shares).tolist()
    return joint.join(options[index].strip() if number > 1 else options[index] for index in chosen)


def _lines(name: str, folder: Path) -> list[str]:
    """Return the lines of a wildcard.

    Raises:
        DiffgraftError: there is no list of this name, or it is empty.
    """
    path = folder / f"{name}.txt"
    if not folder.is_dir():
        raise DiffgraftError(f"There is no folder of wildcards {folder}, in which __{name}__ is looked for.")
    if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
        known = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.txt"))
        raise DiffgraftError(f"There is no wildcard __{name}__ in {folder}: {did_you_mean(name, known)}")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DiffgraftError(f"The wildcard {path} cannot be read as UTF-8 text: {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise DiffgraftError(f"The wildcard {path} is empty: write one option in each line.")
    return lines
