"""Thousands of damaged and doctored files: each is read, or refused in one sentence; nothing else happens."""

import io
import json
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load, save, save_file

from benchmarks.formats import samples, transformer_samples
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.ops.inspect import inspect, summary
from diffgraft.errors import DiffgraftError

FILES = 4_200
RETYPED = 300
"""Files of either test; `DIFFGRAFT_FUZZ` in the environment asks for more"""
SECONDS = 5
"""For one file; a healthy one takes a few milliseconds"""
MEGABYTES = 100


def small_files(folder: Path) -> list[Path]:
    """One healthy file of every dialect and container, a few kilobytes each."""
    folder.mkdir()
    found: list[Path] = []
    flux = {f"{name} for FLUX": adapter for name, adapter in transformer_samples().items()}
    for place, (name, adapter) in enumerate({**samples(), **flux}.items()):
        little = {
            path: tuple(delta for delta in own if sum(leaf.numel() for leaf in delta.leaves.values()) < 40_000)
            for path, own in adapter.deltas.items()
        }
        kept = {path: own for path, own in little.items() if own}
        if not kept and not adapter.tokens:
            continue
        few = Adapter(kept, adapter.metadata, tokens=adapter.tokens)
        for dialect in ("auto", "diffgraft", "lycoris", "comfyui"):
            try:
                found.append(few.save(folder / f"{place}-{dialect}.safetensors", dialect))
            except DiffgraftError:
                assert dialect != "auto", name
    tensors = {"unet:0:up": torch.ones(4, 1), "unet:0:down": torch.ones(1, 3), "<word>": torch.ones(5)}
    save_file(tensors, folder / "counted.safetensors", {"<word>": "<embed>"})
    old = {f"unet.mid_block.a.processor.to_q_lora.{leaf}.weight": torch.ones(3, 3) for leaf in ("up", "down")}
    save_file(old, folder / "old.safetensors")
    linear = {"linear.0.weight": torch.ones(8, 4), "linear.0.bias": torch.ones(8)}
    linear |= {"linear.1.weight": torch.ones(4, 8), "linear.1.bias": torch.ones(4)}
    network = {4: (linear, linear), "layer_structure": [1, 2, 1], "name": "x", "step": 3}
    word = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 6)}, "name": "x"}
    custom = {"a.attn1.processor": {}, "a.attn2.processor.to_k_custom_diffusion.weight": torch.ones(3, 2)}
    for name, held in (("network", network), ("word", word), ("custom", custom), ("list", [torch.ones(4, 1)] * 2)):
        for new in (True, False):
            path = folder / f"{name}-{new}.pt"
            torch.save(held, path, _use_new_zipfile_serialization=new)
            found.append(path)
    return [*found, folder / "counted.safetensors", folder / "old.safetensors"]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content`, damaged in one of the ways in which files are, or doctored."""
    held = bytearray(content)
    way = chance.randrange(7)
    if way == 0:
        return bytes(held[: chance.randrange(len(held))])
    if way == 1:
        return bytes(held) + chance.randbytes(chance.randrange(1, 400))
    if way == 2:
        for _ in range(chance.randrange(1, 20)):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
    elif way == 3:
        at = chance.randrange(len(held))
        held[at : at + 8] = chance.choice([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\x00\x00\x00\x7f" * 2])
    elif way == 4:  # the front, where lengths and names stand
        held[chance.randrange(min(len(held), 300))] = chance.randrange(256)
    elif way == 5:
        one, two = sorted(chance.randrange(len(held)) for _ in range(2))
        del held[one:two]
    else:
        return doctored(content, chance)
    return bytes(held)


def doctored(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header was rewritten: other names, shapes, kinds, offsets or metadata."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, UnicodeDecodeError):
        return content[::-1]
    name = chance.choice(sorted(header))
    entry = header[name]
    odd = chance.choice(
        [None, -1, 2**63, 1e400, "x", [], {}, [[]], True, "\ud83d\ude00" * 20, {"a": {"b": [1]}}, "NaN", "[" * 3000]
    )
    if name == "__metadata__":
        key = chance.choice(sorted(entry) or ["a"])
        header[name] = {**entry, key: odd if isinstance(odd, str) else json.dumps(odd)}
    else:
        key = chance.choice(["dtype", "shape", "data_offsets", "name"])
        if key == "name":
            left = chance.randrange(len(name) + 1)
            header[name[:left] + chance.choice(["", ".", "_", "up", "9" * 30, "\u0000", "é"]) + name[left:]] = (
                header.pop(name)
            )
        elif key == "shape":
            shape = list(entry["shape"])
            header[name] = {
                **entry,
                "shape": chance.choice([shape[::-1], [1, *shape], [*shape, 1], [-1], [2**62, 4], shape[:1]]),
            }
        elif key == "dtype":
            header[name] = {**entry, "dtype": chance.choice(["F16", "I64", "BOOL", "F8_E4M3", "U8", "X"])}
        else:
            header[name] = {**entry, "data_offsets": odd}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def retyped(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with tensors of another kind or number of axes, or fields of another type in its header."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    tensors = load(content)
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    way = chance.randrange(9)
    if way == 0:
        dtypes = [torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
        tensors[name] = value.to(chance.choice(dtypes))
    elif way == 1:
        axes = chance.choice([5, 8, 60])
        tensors[name] = value.reshape(*value.shape, *[1] * (axes - value.ndim))
    elif way == 2:
        tensors[name] = value.flatten()
    elif way == 3:
        tensors[name] = value[:0] if value.ndim else torch.zeros(0)
    elif way == 4:
        tensors[name] = torch.full_like(value, 3e38 if value.dtype == torch.float32 else 6e4)
    elif way == 5:
        tensors[name] = value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value.repeat(2)
    else:
        odd = chance.choice([None, -1, 2**70, 1.5, True, "x", "\u001b]0;x\u0007", [], {}, [[1]], {"a": [1]}])
        listed = [key for key, text in metadata.items() if text[:1] in "{["]
        key = chance.choice(listed or ["diffgraft"])
        metadata[key] = json.dumps(replaced(json.loads(metadata.get(key, "{}")), odd, chance))
    return save(tensors, metadata)


def replaced(held: Any, odd: Any, chance: random.Random) -> Any:
    """`held` with something else in the place of one of the values in it."""
    keys = sorted(held) if isinstance(held, dict) else list(range(len(held))) if isinstance(held, list) else []
    if not keys or chance.random() < 0.1:
        return odd
    key = chance.choice(keys)
    inner = dict(held) if isinstance(held, dict) else list(held)
    inner[key] = replaced(inner[key], odd, chance) if chance.random() < 0.7 else odd
    return inner


def repickled(content: bytes, chance: random.Random) -> bytes:
    """A file of PyTorch's whose containers and values are others than a tool writes."""
    held = torch.load(io.BytesIO(content), weights_only=True)
    odd = chance.choice(
        [
            None,
            0,
            -1,
            2**60,
            1.5,
            True,
            "x" * 50,
            [],
            {},
            torch.ones(2, 3, dtype=torch.int32),
            torch.zeros(0, 4),
            torch.ones([1] * 40),
            torch.ones(3).bool(),
            torch.ones(1).expand(10**6, 10**3),
            {"a": {"b": torch.ones(2)}},
        ]
    )
    out = io.BytesIO()
    torch.save(swapped(held, odd, chance), out, _use_new_zipfile_serialization=chance.random() < 0.5)
    return out.getvalue()


def swapped(held: Any, odd: Any, chance: random.Random) -> Any:
    if isinstance(held, tuple):
        return tuple(swapped(list(held), odd, chance))
    if isinstance(held, dict | list) and held and chance.random() < 0.9:
        inner = dict(held) if isinstance(held, dict) else list(held)
        key = chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))
        inner[key] = swapped(inner[key], odd, chance) if chance.random() < 0.7 else odd
        return inner
    return odd


def used(adapter: Adapter) -> None:
    """What `inspect` makes of an adapter: lines and JSON; of those of a base's own shapes it would take seconds."""
    if any(delta.weight_shape is None for own in adapter.deltas.values() for delta in own):
        return
    report = inspect(adapter)
    summary(report)
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.filterwarnings("ignore")  # of odd values
def test_other_types_and_structures_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """What bytes turned over hardly ever hit: fields, dtypes, axes and containers; what is read can be inspected."""
    healthy = small_files(tmp_path / "healthy")
    contents = [(path.suffix, path.read_bytes()) for path in healthy]
    files = int(os.environ.get("DIFFGRAFT_FUZZ", RETYPED))
    chance = random.Random(files)
    refused = 0
    for number in range(files):
        suffix, content = contents[number % len(contents)]
        path = tmp_path / f"x{suffix}"
        path.write_bytes((retyped if suffix == ".safetensors" else repickled)(content, chance))
        try:
            with at_most(SECONDS):
                used(load_adapter(path))
        except DiffgraftError as error:
            said = str(error)
            refused += 1 if "\n" not in said and len(said) < 1200 and "pydantic" not in said else -files
        except BaseException as error:
            kept = tmp_path / f"bad{suffix}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"file {number}, of {healthy[number % len(contents)].name}: {error!r}") from error
    assert refused > files // 4


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")  # PyTorch says things about odd pickles
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    healthy = small_files(tmp_path / "healthy")
    for path in healthy:
        if path.stem not in ("counted",) and "list" not in path.stem:
            load_adapter(path)
    contents = [(path.suffix, path.read_bytes()) for path in healthy]
    assert max(len(content) for _, content in contents) < 2**20
    files = int(os.environ.get("DIFFGRAFT_FUZZ", FILES))
    chance = random.Random(5)
    read = refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(files):
        suffix, content = contents[number % len(contents)]
        path = tmp_path / f"x{suffix}"
        path.write_bytes(mutated(content, chance))
        try:
            with at_most(SECONDS):
                assert isinstance(load_adapter(path), Adapter)
            read += 1
        except DiffgraftError as error:
            refused += 1 if "\n" not in str(error) else files
        except BaseException as error:
            kept = tmp_path / f"bad{suffix}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"file {number}, of {healthy[number % len(contents)].name}: {error!r}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert read + refused == files
    assert refused > files // 3
    assert read > 100  # a flipped bit in a weight is no reason to refuse
    assert grown < MEGABYTES
