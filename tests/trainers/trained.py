"""Short trainings of every recipe and method, and what must not change in the files that they leave.

``python -m tests.trainers.trained`` prints the digests of this processor, for `DIGESTS`.
"""

import hashlib
import json
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

import diffgraft as dg
from diffgraft.adapters.registry import methods
from diffgraft.bases import Base
from diffgraft.demo.subject import POODLE

DIGESTS = Path(__file__).parent / "digests.json"
"""Version of PyTorch and vector instructions → run → digests of its adapter file, as `digests` takes them"""
STEPS = 30
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "subject": ("subject", {}),
    "style": ("style", {"prompt": "in the style of sks"}),
    "concept": ("concept", {"trigger": "<sks>"}),
    "dora": ("subject", {"options": {"dora": True}}),
    **{
        name: ("subject", {"method": name})
        for name, method in methods().items()
        if name not in ("lora", "textual-inversion") and method.attach.__module__.startswith("diffgraft.")
    },
}
"""Name → recipe and settings; `subject` trains a LoRA, `concept` a word by textual inversion"""


def kernels() -> str:
    """What bytes depend on beside recipe and seed: version, architecture and vector instructions."""
    return f"torch {torch.__version__.partition('+')[0]} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def adapter_of(name: str, base: Base, folder: Path) -> Path:
    """The adapter file of a run of 30 steps at seed 0, by one thread."""
    recipe, settings = RUNS[name]
    own = {"subject": "dog", "prior": {"images": 4}} if recipe == "subject" else {}
    own |= {"subject": "dog"} if recipe == "concept" else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = dg.train(
            recipe,
            base=base,
            images=POODLE.folder / "learn",
            output=folder / name,
            steps=STEPS,
            seed=0,
            sample_every=0,
            **{**own, **settings},
        )
    finally:
        torch.set_num_threads(threads)
    return run.adapter_file


def digests(file: Path) -> dict[str, str]:
    """``shape``: of names, shapes, dtypes and header without versions; ``values``: of the numbers."""
    shape, values = hashlib.sha256(), hashlib.sha256()
    with safe_open(file, framework="pt") as held:
        for key in sorted(held.keys()):
            tensor = held.get_tensor(key)
            shape.update(f"{key} {list(tensor.shape)} {tensor.dtype}\n".encode())
            values.update(key.encode() + tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
        shape.update(json.dumps(header(held.metadata()), sort_keys=True).encode())
    return {"shape": shape.hexdigest()[:16], "values": values.hexdigest()[:16]}


def header(said: dict[str, str]) -> dict[str, Any]:
    """What a file says of itself, without the versions and the digests of other files."""
    read = {key: json.loads(value) if value[:1] in "{[" else value for key, value in said.items()}
    return _without(read, {"versions", "recipe", "data", "hash", "ss_training_comment"})


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    return value


if __name__ == "__main__":
    base, found = dg.load_base("tiny"), {}
    with TemporaryDirectory() as folder:
        for name in sys.argv[1:] or RUNS:
            found[name] = digests(adapter_of(name, base, Path(folder)))
            print(name, found[name], file=sys.stderr)
    print(json.dumps({kernels(): found}, indent=2))
