"""Short trainings of every recipe and method, and what must not change in the files that they leave.

``python -m tests.trainers.trained_adapters`` prints the digests of this processor, for `DIGESTS`.
"""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from safetensors import safe_open

import diffgraft as dg
from diffgraft.adapters.registry import methods
from diffgraft.bases import Base
from diffgraft.demo.subject import POODLE
from diffgraft.generation.settings import DrawSettings
from tests.recipes import ON_PICTURES, SUBJECT

DIGESTS = Path(__file__).parent / "digests.json"
"""Version of PyTorch, vector instructions and processor → run → digests of its adapter file, as `digests` takes them.

The first processor's model was not recorded."""
STEPS = 30
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "subject": (SUBJECT, {}),
    "style": ("style", {"prompt": "in the style of sks"}),
    "concept": ("concept", {"trigger": "<sks>"}),
    "dora": (SUBJECT, {"options": {"dora": True}}),
    **{
        name: (SUBJECT, {"method": name})
        for name, method in methods().items()
        if name in ON_PICTURES
        and name not in ("lora", "textual-inversion")
        and method.attach.__module__.startswith("diffgraft.")
    },
}
"""Name → recipe and settings; `subject` trains a LoRA, `concept` a word by textual inversion"""


class ByPipeline:
    """Draws class images by diffusers' pipeline, as when the digests were taken: they tell of training alone."""

    def __init__(self, base: Base) -> None:
        self._pipe = base.pipeline()
        self._pipe.vae.enable_slicing()

    def draw_each(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings,
        _image: None,
        keep: Callable[[int, Image.Image], None],
        _title: str,
    ) -> None:
        """Draw in batches, and hand out each picture."""
        assert settings.size is not None
        assert settings.batch is not None
        width, height = settings.size
        for start in range(0, len(prompts), settings.batch):
            rows = range(start, min(start + settings.batch, len(prompts)))
            drawn = self._pipe(
                [prompts[row] for row in rows],
                num_inference_steps=25,
                guidance_scale=3.0,
                width=width,
                height=height,
                generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
            ).images
            for row, image in zip(rows, drawn, strict=True):
                keep(row, image)
        self._pipe.vae.disable_slicing()


def kernels() -> str:
    """What bytes depend on beside recipe and seed: version, architecture, vector instructions and processor."""
    version, capability = torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()
    return f"torch {version} {platform.machine()} {capability} {processor()}"


def processor() -> str:
    """Vendor, family and model of the processor, by which libraries choose their kernels; its name outside of Linux."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor()
    facts = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", file.read_text("utf-8"), re.MULTILINE))
    return " ".join(facts.values())


def adapter_of(name: str, base: Base, folder: Path) -> Path:
    """The adapter file of a run of 30 steps at seed 0, by one thread."""
    recipe, settings = RUNS[name]
    own: dict[str, Any] = {} if recipe == "style" else {"subject": "dog"}
    own |= {} if recipe == "concept" else {"prior": {"images": 4}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch("diffgraft.data.class_images.Session", ByPipeline):
            run = dg.train(
                recipe,
                base=base,
                images=POODLE.folder / "learn",
                output=folder / name,
                steps=STEPS,
                seed=0,
                previews=False,
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


_VOLATILE = {"versions", "recipe", "data", "hash", "ss_training_comment", "sshs_model_hash", "sshs_legacy_hash"}
"""Parts of a header that hold versions, or hashes of what is compared elsewhere"""
_FORMER = {"token_lr_scale": "word_rate"}
"""Options that were renamed since the digests were taken → the names that they had then"""


def header(said: dict[str, str]) -> dict[str, Any]:
    """Header of a file without versions and hashes, its keys under the names they had when the digests were taken."""
    read = {key: json.loads(value) if value[:1] in "{[" else value for key, value in said.items()}
    return _without(read, _VOLATILE)


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {_FORMER.get(key, key): _without(inner, names) for key, inner in value.items() if key not in names}
    return value


if __name__ == "__main__":
    base, found = dg.load_base("tiny"), {}
    with TemporaryDirectory() as folder:
        for name in sys.argv[1:] or RUNS:
            found[name] = digests(adapter_of(name, base, Path(folder)))
            print(name, found[name], file=sys.stderr)
    print(json.dumps({kernels(): found}, indent=2))
