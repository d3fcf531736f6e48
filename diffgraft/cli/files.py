"""Commands on adapter files: convert, combine, extract, resize, inspect, diff."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffgraft.adapters.listing import format_summaries
from diffgraft.cli.console import say, say_json, warn
from diffgraft.cli.options import COMPONENTS

if TYPE_CHECKING:
    from diffgraft.adapters.lowrank import RankBudget
    from diffgraft.adapters.ops.resize import ReducedAdapter
    from diffgraft.bases.weights import Weights

BASE = typer.Option(
    help="Base of the adapter, if its weights are needed: `tiny`, a diffusers folder or a .safetensors file."
)
RANK = typer.Option(min=1, help="Rank of each module's LoRA.")
ENERGY = typer.Option(
    help="Share of each module's squared norm to keep, such as 0.95; sets each module's rank, up to --rank."
)


def adapter_size(path: Path) -> int:
    """Return the bytes of a file, of the adapter in a run's folder, or of all files in a folder."""
    if (path / "adapter.safetensors").is_file():
        path = path / "adapter.safetensors"
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _device(name: str) -> str:
    """Return the name of a device after checking that it exists."""
    if name != "cpu":
        from diffgraft.devices import device_of

        device_of(name)
    return name


DEVICE = typer.Option(help="Device that computes: cpu, cuda, …", callback=_device)
OUTPUT = typer.Option("--output", "-o", help="Path of the new file.")
FORMAT = typer.Option("--to", help=f"Format of the new file: auto, {', '.join(format_summaries())}.")


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="An adapter in any format, a peft folder, or a checkpoint.")
    ],
    output: Annotated[
        Path, typer.Argument(help="Path of the new file (peft: a folder; hypernetworks for webui: .pt).", metavar="NEW")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Format; auto: of those that can hold the adapter, the one that most programs open. "
            + " ".join(f"{name}: {summary}." for name, summary in format_summaries().items())
        ),
    ] = "auto",
    only: Annotated[str, typer.Option(help="Write only `weights`, only `words`, or only the word of this name.")] = "",
    precision: Annotated[str, typer.Option(help="float16, bfloat16 or float32. [default: unchanged]")] = "",
    rank: Annotated[int | None, RANK] = None,
    energy: Annotated[float | None, ENERGY] = None,
    base: Annotated[str | None, BASE] = None,
    components: Annotated[str | None, COMPONENTS] = None,
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Write an adapter in the format of another tool, and report the error.

    An adapter that the format cannot hold is refused, unless --rank or --energy allow approximating it by LoRAs.
    For example: diffgraft convert dog.safetensors dog-webui.safetensors --to webui

    A whole checkpoint is converted from a diffusers folder to a single file, or back, bit for bit:
    diffgraft convert stable-diffusion-v1-5/ sd15.safetensors
    """
    from diffgraft.bases.checkpoint_files import is_checkpoint

    if is_checkpoint(source):
        _convert_checkpoint(source, output, to, components)
        return

    from diffgraft.adapters.lowrank import RankBudget
    from diffgraft.adapters.ops.convert import convert as change
    from diffgraft.adapters.ops.convert import read_part
    from diffgraft.files import check_new

    check_new(output)
    approximate = RankBudget(rank, energy) if rank is not None or energy is not None else None
    with opened(base) as weights:
        done = change(read_part(source, only, weights), output, to, approximate, weights, device, precision)
    errors = {path: error for path, error in done.comparison.errors.items() if path not in done.dropped}
    kept = {**errors, **done.comparison.others}
    path, error = max(kept.items(), key=lambda item: item[1], default=("–", 0.0))
    say(done.path)
    if done.approximated:
        say(f"approximated: {done.path.name} holds LoRAs in the place of what {to} cannot hold")
    if done.dropped:
        say(f"left out, as LoRA cannot hold it: {len(done.dropped)}, such as {done.dropped[0]}")
    say(f"largest relative error: {error:.2g}" + (f", in {path}" if error else ""))
    if modules := done.comparison.errors:
        say(f"the same to the bit: {sum(value == 0 for value in modules.values())} of {len(modules)} modules")
    for remark in done.remarks:
        say(f"note: {remark}")


def _convert_checkpoint(source: Path, output: Path, to: str, components: str | None) -> None:
    from diffgraft.errors import DiffgraftError

    if to != "auto":
        raise DiffgraftError(
            f"{source} is a whole checkpoint, but --to is for adapters: leave it out. The new checkpoint is a single "
            "file if its name ends in .safetensors, else a diffusers folder."
        )

    from diffgraft.bases import load_base
    from diffgraft.files import check_new
    from diffgraft.generation.merge_checkpoint import merge_checkpoint

    check_new(output)
    say(merge_checkpoint(load_base(source, None, components=components), {}, output))


def combine(
    adapter: Annotated[
        list[str], typer.Argument(help="FILE, FILE:0.7, FILE:unet=0.7,OUT05=0, or FILE:1,0,… by block.")
    ],
    output: Annotated[Path, OUTPUT],
    rank: Annotated[int | None, RANK] = None,
    energy: Annotated[float | None, ENERGY] = None,
    algorithm: Annotated[str, typer.Option(help="How weights are combined: sum, ties, dare or concepts.")] = "sum",
    density: Annotated[float, typer.Option(help="With ties and dare: share of entries to keep, 0 to 1.")] = 0.5,
    seed: Annotated[int, typer.Option(help="With dare: seed for choosing the entries to drop.")] = 0,
    captions: Annotated[
        Path | None, typer.Option(help="With concepts: text file of captions that are to stay the same, one a line.")
    ] = None,
    to: Annotated[str, FORMAT] = "auto",
    base: Annotated[str | None, BASE] = None,
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Combine several adapters of any methods and ranks into one; negative strengths subtract.

    Without --rank and --energy, LoRAs and LoHas are summed exactly, at the sum of their ranks; of other methods 0.999
    of the squared norm is kept. For a small file, give --rank.
    For example: diffgraft combine dog.safetensors:0.8 ink.safetensors:0.5 -o dog-in-ink.safetensors

    Adapters of the method custom are merged so that each keeps its own words, and captions stay as they are:
    diffgraft combine dog.safetensors mug.safetensors -o both.safetensors --algorithm concepts --captions FILE --base B
    """
    from diffgraft.adapters.formats import load_for_base
    from diffgraft.adapters.lowrank import RankBudget
    from diffgraft.adapters.ops.combine import combine as together
    from diffgraft.cli.console import parse_strengths
    from diffgraft.files import check_new

    check_new(output)
    size = RankBudget(rank, energy) if rank is not None or energy is not None else None
    with opened(base) as weights:
        given = [(file, load_for_base(file, weights), strength) for file, strength in parse_strengths(adapter).items()]
        if algorithm == "concepts":
            from diffgraft.adapters.ops.concepts import merge_concepts, open_text

            _save(merge_concepts(given, *open_text(base, captions), size, weights), output, to)
        else:
            _save(together(given, size, algorithm, density, seed, weights, device), output, to)


def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint: a diffusers folder or a .safetensors file.")],
    base: Annotated[str, typer.Argument(help="The checkpoint it was fine-tuned from, in either layout.")],
    output: Annotated[Path, OUTPUT],
    rank: Annotated[int | None, RANK] = None,
    energy: Annotated[float | None, ENERGY] = None,
    method: Annotated[str, typer.Option(help="lora, locon or loha.")] = "locon",
    to: Annotated[str, FORMAT] = "auto",
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Extract the difference between two checkpoints, including text encoders, as an adapter.

    Its size is set by --rank or --energy.
    For example: diffgraft extract dreamboothed/ stable-diffusion-v1-5/ -o dog.safetensors --rank 16
    """
    from diffgraft.adapters.ops.extract import extract as difference
    from diffgraft.adapters.ops.extract import provenance
    from diffgraft.files import check_new

    size = _size(rank, energy)
    check_new(output)
    with opened(tuned) as of_tuned, opened(base) as of_base:
        assert of_tuned is not None
        assert of_base is not None
        _save(difference(of_tuned, of_base, size, method, provenance(tuned, base), device), output, to)


def resize(
    adapter: Annotated[Path, typer.Argument(help="An adapter of any method.")],
    output: Annotated[Path, OUTPUT],
    rank: Annotated[int | None, RANK] = None,
    energy: Annotated[float | None, ENERGY] = None,
    to: Annotated[str, FORMAT] = "auto",
    base: Annotated[str | None, BASE] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List rank and error of each module.")] = False,
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Approximate an adapter of any method, including convolutions, by LoRAs whose size --rank or --energy sets.

    For example: diffgraft resize dog.safetensors -o small-dog.safetensors --energy 0.95
    """
    from diffgraft.adapters.formats import load_for_base
    from diffgraft.adapters.ops.resize import rank_of
    from diffgraft.adapters.ops.resize import resize as smaller
    from diffgraft.files import check_new

    size = _size(rank, energy)
    check_new(output)
    with opened(base) as weights:
        given = load_for_base(adapter, weights)
        most = max((rank_of(delta) for own in given.deltas.values() for delta in own), default=0)
        if rank is not None and 0 < most <= rank:
            warn(f"No module of {adapter} has more than rank {most}, so --rank {rank} makes nothing smaller.")
        found = smaller(given, size, weights, device)
        _save(found, output, to)
    before, after = adapter_size(adapter), adapter_size(output)
    say(f"size: {before / 1000:,.1f} kB before, {after / 1000:,.1f} kB now")
    for path, lost in found.errors.items() if verbose else ():
        own = found.adapter.deltas.get(path)
        say(f"rank {own[0].leaves['lora_down'].shape[0] if own else 0:4}  relative error {lost:.2g}  {path}")


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    figures: Annotated[
        bool, typer.Option("--figures", help="Also compute norms, effective ranks and dead modules from all tensors.")
    ] = False,
    health: Annotated[
        bool,
        typer.Option("--health", help="Instead report how much each block changes, dead modules, and a smaller rank."),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Instead report the loss of every picture in a run with watch_every, and which of them stand out.",
        ),
    ] = False,
    base: Annotated[str | None, BASE] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write all figures of each module as JSON.")] = False,
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Report what an adapter file holds: method, base, ranks, trigger, tags, and how it was trained.

    For example: diffgraft inspect dog.safetensors
    """
    if watch:
        _report_watch(file, as_json)
        return
    if health:
        _report_health(file, base, as_json, device)
        return
    if base is not None:
        from diffgraft.errors import DiffgraftError

        raise DiffgraftError("--base is for --health, which compares changes with the weights of a base: add --health.")

    from diffgraft.adapters.ops.glance import FIGURES_HINT, glance

    held = file / "adapter.safetensors" if (file / "adapter.safetensors").is_file() else file
    short = None if as_json else glance(held)
    if not figures and short is not None:
        for line in (*short, FIGURES_HINT):
            say(line)
        return

    from diffgraft.adapters.formats import load_adapter
    from diffgraft.adapters.ops.inspect import inspect as look
    from diffgraft.adapters.ops.inspect import summary

    report = look(load_adapter(file), device)
    if as_json:
        say_json(report.as_json())
        return
    for line in _with_figures(short or [f"file     {adapter_size(file) / 1000:,.0f} kB"], summary(report)):
        say(line)


def _report_watch(run: Path, as_json: bool) -> None:
    from diffgraft.trainers.hooks.watch_findings import find, table
    from diffgraft.trainers.hooks.watch_record import RECORD_NAME, read_record

    record = read_record((run if run.is_dir() else run.parent) / RECORD_NAME)
    findings = find(record)
    if as_json:
        say_json({**record.model_dump(), "findings": [finding.as_json() for finding in findings]})
        return
    for line in table(record, findings):
        say(line)


def _report_health(file: Path, base: str | None, as_json: bool, device: str) -> None:
    from diffgraft.adapters.formats import load_for_base
    from diffgraft.adapters.ops.health import health

    with opened(base) as weights:
        report = health(load_for_base(file, weights), weights, device)
    if as_json:
        say_json(report.as_json())
        return
    for line in report.lines():
        say(line)


def _with_figures(short: Sequence[str], whole: Sequence[str]) -> list[str]:
    """Return the lines from the header, and those of the full report on other topics.

    A line begins with its topic. Lines on learnt words are in both, as those of the full report name text encoders.
    """
    about = {line[:8].strip() for line in short}
    more = [line for line in whole if line[:8].strip() not in about or line.startswith("word")]
    return list(dict.fromkeys([*short, *more]))


def diff(
    first: Annotated[Path, typer.Argument(help="An adapter file.")],
    second: Annotated[Path, typer.Argument(help="Another adapter file.")],
    base: Annotated[str | None, BASE] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write each module's error as JSON; null if only one file has it.")
    ] = False,
    device: Annotated[str, DEVICE] = "cpu",
) -> None:
    """Report how two adapters differ: their weights by block, words, recipes, base and pictures.

    For example: diffgraft diff dog.safetensors small-dog.safetensors
    """
    from dataclasses import asdict

    from diffgraft.adapters.formats import load_for_base
    from diffgraft.adapters.ops.block_differences import HEAD, block_differences
    from diffgraft.adapters.ops.compare import compare
    from diffgraft.trainers.recipe.differences import metadata_differences

    with opened(base) as weights:
        one, other = (load_for_base(file, weights) for file in (first, second))
        found = compare(one, other, weights, device, with_norms=True)
    blocks, settings = block_differences(found.norms), metadata_differences(one.metadata, other.metadata)
    if as_json:
        say_json({**asdict(found), "blocks": list(map(asdict, blocks)), "settings": settings})
        return
    if found.same:
        say("They do the same, to the bit.")
    alone = {*found.only_first, *found.only_second}
    apart = sorted(((error, path) for path, error in found.errors.items() if error and path not in alone), reverse=True)
    say(f"{len(apart)} of {len(found.errors) - len(alone)} modules that both have differ")
    for line in (HEAD, *(block.line() for block in blocks)) if apart else ():
        say(line)
    for error, path in apart[:10]:
        say(f"{error:8.2g}  {path}")
    for name, paths in ((first, found.only_first), (second, found.only_second)):
        if paths:
            say(f"only in {name}: {len(paths)} modules, such as {paths[0]}")
    if found.words:
        say(f"words that differ: {', '.join(found.words)}")
    if found.networks_differ:
        say("their networks differ")
    for key, (before, after) in settings.items():
        say(f"{key}: {_short(before)} → {_short(after)}")


def _short(value: object) -> str:
    text = "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) < 60 else f"{text[:57]}…"


def _size(rank: int | None, energy: float | None) -> "RankBudget":
    from diffgraft.adapters.lowrank import RankBudget
    from diffgraft.errors import DiffgraftError

    if rank is None and energy is None:
        raise DiffgraftError("The size of the adapter is missing: give --rank 8, or --energy 0.95.")
    return RankBudget(rank, energy)


@contextmanager
def opened(base: str | None) -> "Iterator[Weights | None]":
    """Open the weights of a base for the block; None without a base."""
    from diffgraft.bases.weights import open_weights

    if base is None:
        yield None
        return
    with open_weights(base) as weights:
        yield weights


def _save(found: "ReducedAdapter", output: Path, to: str) -> None:
    """Write the adapter and report its largest error."""
    say(found.adapter.save(output, to))
    path, lost = found.worst
    say(f"largest relative error: {lost:.2g}" + (f", in {path}" if lost else ""))
    if found.dropped:
        why = "as LoRA cannot hold it, or its layer has other inputs"
        say(f"left out, {why}: {len(found.dropped)}, such as {found.dropped[0]}")


COMMANDS = (convert, combine, extract, resize, inspect, diff)
