"""Evaluation of the adapters of a run, or of files: `diffgraft.evaluate` and the command `evaluate`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import LoadOptions
from diffgraft.data.masker import open_masker
from diffgraft.devices import device_of, dtype_of
from diffgraft.errors import DiffgraftError, check_options, short_repr, wrap_system_errors
from diffgraft.evaluation.candidates import Candidate, adapter_paths, read_candidates, run_folder_or_none
from diffgraft.evaluation.drawing import Artist
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evidence import Drawings, Evidence, Figure
from diffgraft.evaluation.held_out import HeldOutLosses
from diffgraft.evaluation.measure import ENCODERS, Measure, get_measure, measures
from diffgraft.evaluation.scoring import Scorer
from diffgraft.evaluation.target import Target, target_of
from diffgraft.evaluation.verdict import Choice, Outcome, pareto_front, recommend
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import Note, emit, phase

STRENGTHS = (0.6, 0.8, 1.0, 1.2)
"""Strengths at which adapters are drawn by default"""
SEEDS = 4
"""Number of pictures of each prompt by default"""
_FIRST_SEED = 60_000
"""Seed of the first picture of each prompt, far from those of class images and samples"""
_MOST_STRENGTH = 20


class EvaluationOptions(TypedDict, total=False):
    """Options of `evaluate`."""

    base: str | Path | Base
    """Base, by name, by path or loaded; by default that of the run or of the file's header"""
    images: str | PathLike[str]
    """Folder with pictures of what was to be learned; by default the training pictures of the run"""
    held_out: str | PathLike[str]
    """Folder with pictures that were not trained on; by default `validation.images` of the run"""
    prompts: str | PathLike[str] | Sequence[str]
    """Prompts, or a .txt file with one on each line; those without the trigger are of the class. By default those of
    the recipe's samples"""
    trigger: str
    """Word that calls what was learned, if neither recipe nor header tells it"""
    subject: str
    """Class noun, if neither recipe nor header tells it"""
    strengths: Sequence[float]
    """Strengths of each adapter; 0.6, 0.8, 1 and 1.2 by default"""
    seeds: int
    """Number of pictures of each prompt; 4 by default"""
    masker: str
    """Hub id or folder of a segmentation model that finds the subject in drawn pictures; without one, patches of the
    references are searched in whole pictures"""
    measures: Sequence[str]
    """Names of measures; by default those that what is known allows"""
    encoders: Mapping[str, str]
    """Task of an encoder → hub id or folder; see `diffgraft.evaluation.measure.ENCODERS`"""
    settings: DrawSettings
    """How pictures are drawn"""
    output: str | PathLike[str]
    """Folder in which pictures are kept; by default `evaluation` in the run's folder, or here"""
    precision: str
    """Dtype of the base; by default float16 on a GPU and float32 on the CPU"""
    device: str
    """Device that draws"""


@dataclass(frozen=True, eq=False)
class Entry:
    """An adapter at a strength, with its pictures and figures."""

    name: str
    """Name of the adapter: ``step 200``, ``final``, or the file's name"""
    step: int | None
    path: Path
    hash: str
    """SHA-256 of the adapter's file"""
    strength: float
    figures: Mapping[str, Figure]
    shares: Outcome
    drawn: Drawings = field(repr=False)

    @property
    def title(self) -> str:
        """Name and strength of the adapter, as tables show them."""
        return f"{self.name} at {self.strength:g}"

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON types, without pictures."""
        return {
            "name": self.name,
            "step": self.step,
            "path": str(self.path),
            "hash": self.hash,
            "strength": self.strength,
            "verdict": self.shares.verdict,
            "reason": self.shares.reason,
            "score": self.shares.score,
            "shares": asdict(self.shares),
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Adapters at several strengths, compared."""

    folder: Path
    """Folder with the pictures"""
    target: Target
    seeds: Sequence[int]
    measures: Sequence[Measure]
    encoders: Mapping[str, str]
    """Task → encoder that the figures are by"""
    likeness: Measure
    """Measure of likeness that the verdicts go by"""
    following: Measure
    """Measure of prompt following that the verdicts go by"""
    ceiling: float
    """Likeness of the references to one another"""
    bare: Mapping[str, Figure]
    """Figures of the base alone"""
    bare_drawn: Drawings = field(repr=False)
    entries: Sequence[Entry] = ()
    choice: Choice = field(default_factory=lambda: Choice(0, ""))
    drawn: int = 0
    """Number of pictures that were drawn; the others were kept from earlier evaluations"""

    @property
    def best(self) -> Entry:
        """The recommended adapter and strength."""
        return self.entries[self.choice.index]

    @property
    def main_measures(self) -> list[Measure]:
        """Measures that the verdicts go by: one of each role, that of composition for styles alone."""
        firsts = {measure.role: measure for measure in reversed(self.measures) if measure.role}
        firsts |= {"likeness": self.likeness, "following": self.following}
        if self.target.is_subject:
            firsts.pop("composition", None)
        return [measure for measure in self.measures if measure in firsts.values()]

    @property
    def front(self) -> list[int]:
        """Places of the entries that no other exceeds in likeness or following without falling short in the other."""
        names = (self.likeness.name, self.following.name)
        return pareto_front([tuple(entry.figures[name].value for name in names) for entry in self.entries])  # type: ignore[misc]

    def as_json(self) -> dict[str, Any]:
        """The evaluation as JSON types, without pictures; numbers that are not known are null."""
        report: dict[str, Any] = _in_json(
            {
                "recommended": {
                    "name": self.best.name,
                    "path": str(self.best.path),
                    "strength": self.best.strength,
                    "verdict": self.best.shares.verdict,
                    "reason": self.choice.reason,
                },
                "base": self.target.base,
                "trigger": self.target.words.trigger,
                "prompts": asdict(self.target.prompts),
                "seeds": list(self.seeds),
                "references": len(self.target.references),
                "encoders": dict(self.encoders),
                "likeness": self.likeness.name,
                "following": self.following.name,
                "ceiling": self.ceiling,
                "bare": {name: asdict(figure) for name, figure in self.bare.items()},
                "front": [self.entries[place].title for place in self.front],
                "entries": [entry.as_json() for entry in self.entries],
            }
        )
        return report


def _in_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _in_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@wrap_system_errors
def evaluate(*sources: str | PathLike[str], **options: Unpack[EvaluationOptions]) -> Evaluation:
    """Draw adapters at several strengths with the same prompts and seeds, measure the pictures, and recommend one.

    Pictures are kept in the folder `output`: another call draws only those that are not there yet.

    Args:
        sources: runs, of which all saved adapters are compared, or adapter files of one target.
        options: options of `EvaluationOptions`.

    Returns:
        Figures of each adapter at each strength, verdicts, and the recommended one.

    Raises:
        DiffgraftError: there is no adapter, it does not fit the base, or something that measures need is missing.
    """
    check_options("evaluate", options, EvaluationOptions)
    given = [fspath(source) for source in sources]
    if not given:
        raise DiffgraftError("There is nothing to evaluate: give the folder of a run, or adapter files.")
    strengths = _strengths(options.get("strengths", STRENGTHS))
    seeds = _seeds(options.get("seeds", SEEDS))
    target = target_of(given[0], _metadata(given[0]), options)
    encoders = _encoders(target, options)
    chosen = choose_measures(options.get("measures"), target, encoders, len(seeds))
    folder = _folder(given, options.get("output"))
    with _session(target, options) as session:
        candidates = read_candidates(given, session.base)
        artist = Artist(session, folder / "pictures", seeds, options.get("settings") or DrawSettings())
        entries, scorer, bare = _compared(artist, candidates, strengths, target, chosen, encoders)
    choice = recommend(
        [entry.title for entry in entries],
        [entry.strength for entry in entries],
        [entry.shares for entry in entries],
    )
    if artist.kept:
        emit(Note(f"{artist.kept} pictures were kept from earlier evaluations, {artist.drawn} were drawn."))
    return Evaluation(
        folder,
        target,
        seeds,
        chosen,
        encoders.sources,
        scorer.likeness,
        scorer.following,
        scorer.ceiling,
        scorer.bare_figures(),
        bare,
        entries,
        choice,
        artist.drawn,
    )


def _compared(
    artist: Artist,
    candidates: Sequence[Candidate],
    strengths: Sequence[float],
    target: Target,
    chosen: Sequence[Measure],
    encoders: Encoders,
) -> tuple[list[Entry], Scorer, Drawings]:
    """Draw and score all adapters at all strengths; return also the scorer, and the pictures of the base alone."""
    losses = None
    if any(measure.needs_losses for measure in chosen):
        losses = HeldOutLosses(artist.session.base, target.held_out, len(artist.seeds))
    pairs = [(candidate, strength) for candidate in candidates for strength in strengths]
    with phase("evaluating", len(pairs) + 1) as tracker:
        bare = artist.draw(target.prompts, None, 0.0)
        start = Evidence(bare, bare, target.prompts, target.references, encoders, _losses(losses, None, 0.0))
        scorer = Scorer(chosen, start, is_subject=target.is_subject)
        tracker.advance()
        entries = []
        for candidate, strength in pairs:
            drawn = artist.draw(target.prompts, candidate, strength)
            found = _losses(losses, candidate, strength)
            evidence = Evidence(drawn, bare, target.prompts, target.references, encoders, found)
            scores = scorer.score(evidence)
            entries.append(
                Entry(
                    candidate.name,
                    candidate.step,
                    candidate.path,
                    candidate.hash,
                    strength,
                    scores.figures,
                    scores.shares,
                    drawn,
                )
            )
            tracker.advance()
    return entries, scorer, bare


def _losses(losses: HeldOutLosses | None, candidate: Candidate | None, strength: float) -> Tensor | None:
    if losses is None:
        return None
    return losses.of(None if candidate is None else candidate.adapter, strength)


def choose_measures(names: Sequence[str] | None, target: Target, encoders: Encoders, seeds: int) -> list[Measure]:
    """Return the measures of some names, or those that are usual and possible.

    Raises:
        DiffgraftError: a name is unknown, a measure cannot be computed, or none tells likeness or prompt following.
    """
    if names is None:
        chosen, sources = [], set()
        for measure in measures().values():
            same = (measure.role, encoders.sources.get(measure.encoder)) if measure.name in ("clip-i", "dino") else None
            is_twice = same is not None and same in sources  # one encoder for both tasks
            if measure.is_default and not is_twice and not _lacking(measure, target, seeds):
                chosen.append(measure)
                sources.add(same)
        return chosen
    chosen = [get_measure(name) for name in dict.fromkeys(names)]
    for measure in chosen:
        if lacking := _lacking(measure, target, seeds):
            raise DiffgraftError(f"The measure {measure.name} cannot be computed: {lacking}.")
    for role in ("likeness", "following"):
        if not any(measure.role == role for measure in chosen):
            usual = ", ".join(measure.name for measure in measures().values() if measure.role == role)
            raise DiffgraftError(f"None of the chosen measures rates {role}, which verdicts need: add one of {usual}.")
    return chosen


def _lacking(measure: Measure, target: Target, seeds: int) -> str:
    """Return what a measure lacks; empty if nothing."""
    if seeds < measure.least_seeds:
        return f"it needs at least {measure.least_seeds} seeds, and there are {seeds}"
    if len(target.references) < measure.least_references:
        return (
            f"it needs at least {measure.least_references} reference pictures, and there are {len(target.references)}"
        )
    if measure.needs_losses and not target.held_out:
        return "there are no held-out pictures: give a folder of them (--held-out)"
    return ""


def _encoders(target: Target, options: Mapping[str, Any]) -> Encoders:
    """Return the encoders; for the embedded base its own small CLIP, unless others are named."""
    given = options.get("encoders", {})
    for task in given:
        if task not in ENCODERS:
            raise DiffgraftError(f"Unknown encoder {short_repr(task)}: must be one of {', '.join(ENCODERS)}.")
    usual = dict.fromkeys(ENCODERS, "tiny") if target.base == "tiny" else dict(ENCODERS)
    sources = {**usual, **{task: str(source) for task, source in given.items()}}
    masker = None
    if options.get("masker"):
        if not target.is_subject:
            raise DiffgraftError("A masker finds a subject by its class noun, but this adapter has none: leave it out.")
        masker = open_masker(target.words.noun, str(options["masker"]))
    return Encoders(sources, masker=masker)


@contextmanager
def _session(target: Target, options: Mapping[str, Any]) -> Iterator[Session]:
    """Yield a session with the base on its device, and the adapter that belongs under the pictures."""
    base = options.get("base")
    if not isinstance(base, Base):
        device = device_of(str(options.get("device", "")))
        dtype = dtype_of(str(options.get("precision", "")), device)
        loading: LoadOptions = target.load_options
        with phase(f"loading {target.base}"):
            base = load_base(target.base, dtype, **loading).to(device)
    with Session(base) as session:
        if target.under is not None:
            session.use(target.under.adapter, target.under.strength, "under")
        yield session


def _metadata(source: str) -> Mapping[str, Any]:
    """Return the metadata of an adapter file; empty for a run, whose recipe tells more."""
    from diffgraft.adapters.formats import load_adapter

    adapter_paths(source)  # raises the error for a missing file
    return {} if run_folder_or_none(source) is not None else load_adapter(source).metadata


def _strengths(values: Sequence[float]) -> list[float]:
    if not isinstance(values, list | tuple) or not values:
        raise DiffgraftError(f"Invalid value strengths={short_repr(values)}: must be a list of numbers.")
    for value in values:
        if not isinstance(value, int | float) or not 0 < abs(value) <= _MOST_STRENGTH:
            raise DiffgraftError(
                f"Invalid value strengths={short_repr(values)}: must be numbers up to {_MOST_STRENGTH}, other than 0, "
                "which is the base alone."
            )
    return list(dict.fromkeys(float(value) for value in values))


def _seeds(count: int) -> list[int]:
    if not isinstance(count, int) or not 1 <= count <= 1000:
        raise DiffgraftError(f"Invalid value seeds={short_repr(count)}: must be a number of pictures, 1 to 1000.")
    return list(range(_FIRST_SEED, _FIRST_SEED + count))


def _folder(sources: Sequence[str], output: str | PathLike[str] | None) -> Path:
    """Return the folder of the evaluation."""
    if output:
        folder = Path(fspath(output)).expanduser()
    else:
        run = run_folder_or_none(sources[0]) if len(sources) == 1 else None
        folder = (run / "evaluation") if run is not None else Path("evaluation")
    if folder.exists() and not folder.is_dir():
        raise DiffgraftError(f"{folder} is a file, but a folder for pictures is needed: choose another output.")
    return folder
