"""Every method trains through the one loop, leaves a file that does what was trained, and leaves the base alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.unet import unet_arguments
from diffgraft.devices import has_bfloat16
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.drawing import generate
from tests.recipes import ON_PICTURES, SUBJECT

FAST: dict[str, Any] = {**SHORT, "steps": 2, "checkpoint_every": 0, "sample_prompts": "a dog", "prior": {"weight": 0}}
FAST["trigger"] = "<zorp>"  # a word that the base does not know, as some of the methods need it


@pytest.mark.parametrize("method", ON_PICTURES)
def test_a_method_trains_and_what_it_leaves_is_what_was_trained(
    method: str, base: Base, pictures: Path, tmp_path: Path
) -> None:
    before = {name: value.clone() for _, part in base.parts() for name, value in part.state_dict().items()}
    lr = 1e-4 if method == "full" else 1e-2
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", method=method, lr=lr, **FAST)
    for _, part in base.parts():
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert run.adapter.metadata["method"] == method
    again = load_adapter(run.adapter_file)

    def draw() -> np.ndarray:
        (image,) = generate(base, ["a <zorp> dog"], DrawSettings(steps=3), [1])
        return np.asarray(image).astype(int)

    bare = draw()
    with graft(base, {again: 1.0}):
        assert np.abs(draw() - bare).max() > 0
    assert np.array_equal(draw(), bare)


def test_the_first_loss_is_the_same_whatever_the_method(base: Base, pictures: Path, tmp_path: Path) -> None:
    """All of them start at the base, or near it, and see the same noise."""
    first = {}
    for method in ON_PICTURES:
        settings = {**FAST, "steps": 1, "method": method}
        run = train(SUBJECT, base=base, images=pictures, output=tmp_path / method, **settings)
        first[method] = run.metrics[0]["loss"]
    for method in ("hypernetwork", "student"):  # with small random weights; without the middle, which does little
        assert first.pop(method) == pytest.approx(first["lora"], rel=1e-2)
    words = [first.pop(method) for method in ("textual-inversion", "pivotal", "custom")]
    assert words == pytest.approx([words[0]] * 3, rel=1e-5)  # theirs starts as another word
    assert list(first.values()) == pytest.approx([first["lora"]] * len(first), rel=1e-5)


def test_up_rate_moves_up_faster(base: Base, pictures: Path, tmp_path: Path) -> None:
    def moved(rate: float) -> float:
        settings = {**FAST, "steps": 1, "options": {"loraplus_ratio": rate}}
        run = train(SUBJECT, base=base, images=pictures, output=tmp_path / str(rate), **settings)
        return max(float(delta.leaves["lora_up"].abs().max()) for (delta,) in run.adapter.deltas.values())

    assert moved(16) == pytest.approx(16 * moved(1), rel=1e-3)


def test_options_that_are_none_are_refused_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(DiffgraftError, match=r"method 'lora' has no option 'tucker'"):
        train(SUBJECT, images=pictures, output=output, subject="dog", options={"tucker": "true"})
    assert not output.exists()


@pytest.mark.parametrize("method", ON_PICTURES)
def test_every_method_on_stable_diffusion_xl(method: str, sdxl_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Two text encoders and what the UNet is told besides; the file does on a fresh base what was trained."""
    base, fresh = load_base(sdxl_folder), load_base(sdxl_folder)
    lr = 1e-3 if method == "full" else 9e-2
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", method=method, lr=lr, **FAST)
    latents, times = torch.randn(2, 4, 16, 16), torch.tensor([20, 700])

    def predict(held: Base) -> torch.Tensor:
        with torch.no_grad():
            told = held.condition(["a <zorp> dog"] * 2)
            prediction: torch.Tensor = held.unet(latents, times, **unet_arguments(told)).sample
            return prediction

    bare = predict(fresh)
    with graft(base, {run.adapter: 1.0}), graft(fresh, {run.adapter_file: 1.0}):
        assert (predict(base) - bare).abs().max() > 1e-4
        assert torch.equal(predict(base), predict(fresh))
    assert torch.equal(predict(fresh), bare)


def test_dropout_is_a_function_of_the_seed_and_the_step(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**FAST, "method": "hypernetwork", "options": {"dropout": [0, 0.3, 0]}, "lr": 1e-2}
    files = []
    for place in range(2):
        torch.manual_seed(place)
        files.append(train(SUBJECT, base=base, images=pictures, output=tmp_path / str(place), **settings).adapter_file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("method", "beside"),
    [
        ("pivotal", ["adapter.zorp.safetensors"]),
        ("custom", ["adapter.zorp.safetensors"]),
        ("textual-inversion", []),
        ("lora", []),
    ],
)
def test_a_word_that_was_trained_with_weights_lies_beside_them_as_well(
    method: str, beside: list[str], base: Base, pictures: Path, tmp_path: Path
) -> None:
    """Other programs read only the weights of a file that holds both."""
    settings: dict[str, Any] = {**FAST, "steps": 1, "method": method, "previews": False}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert sorted(path.name for path in run.folder.glob("adapter.*.safetensors")) == beside
    for name in beside:
        word = load_adapter(run.folder / name)
        assert not word.deltas
        assert set(word.tokens) == {"<zorp>"}
        assert torch.equal(word.tokens["<zorp>"]["text_encoder"], run.adapter.tokens["<zorp>"]["text_encoder"])


def test_pivotal_tuning_adapts_the_layers_of_the_method_it_names(base: Base, pictures: Path, tmp_path: Path) -> None:
    def modules(output: str, **settings: Any) -> list[str]:
        given = {**FAST, "steps": 1, **settings}
        return train(SUBJECT, base=base, images=pictures, output=tmp_path / output, **given).adapter.modules

    found = modules("a", method="pivotal", **{"options.weights": "locon", "options.weights_options.conv_rank": "2"})
    assert found == modules("b", method="locon")
    assert any("conv" in path for path in found)


def test_what_cannot_be_attached_leaves_no_folder(base: Base, pictures: Path, tmp_path: Path) -> None:
    for settings, answer in (
        ({"method": "pivotal", "trigger": "dog"}, "The word 'dog' is already known"),
        ({"method": "hypernetwork", "options": {"dropout": "0.3"}}, "expected 3 probabilities"),
        ({"options": {"ranks": {"*": 0}}}, "Invalid value options.ranks"),
        ({"layers": "context", "text_encoder": True}, "the text_encoder of this base has no such layers. Set text_en"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **{**FAST, **settings})
        assert not (tmp_path / "run").exists()


def test_options_as_a_command_line_gives_them() -> None:
    def read(method: str, **settings: str) -> Any:
        recipe = load_recipe(SUBJECT, {"subject": "dog", "method": method, **settings})
        return get_method(method).read_options(recipe.options)

    for text in ("1,2,1", "[1, 2, 1]"):
        assert read("hypernetwork", **{"options.structure": text}).structure == [1, 2, 1]
    assert read("lora", **{"options.ranks.*.attn2.*": "16"}).ranks == {"*.attn2.*": 16}
    assert read("pivotal", **{"options.weights_options.dora": "true"}).weights_options == {"dora": "true"}


ONE: dict[str, Any] = {"accumulate": 2, "flip": True, "lr_schedule": "cosine", "warmup": 1, "optimizer": "adamw8bit"}
OTHER: dict[str, Any] = {
    "gradient_checkpointing": True,
    "precision": "bfloat16" if has_bfloat16() else "float32",
    "prior": {"weight": 1, "images": 4},
    "text_encoder": True,
    "layers": "attention+feedforward",
    "alpha": 2.0,
}


@pytest.mark.parametrize("options", [ONE, OTHER], ids=["one", "other"])
@pytest.mark.parametrize("method", ON_PICTURES)
def test_every_option_of_the_loop_goes_with_every_method(
    method: str, options: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    """Those that a method is without are left out: with them the recipe is refused."""
    made = get_method(method)
    lacking = made.unsupported_under(made.read_options({}))
    settings = {key: value for key, value in {**FAST, **options}.items() if key not in lacking}
    settings |= {"steps": 3, "batch": 2, "lr": 1e-4 if method == "full" else 1e-2, "method": method}
    run = train(SUBJECT, base="tiny", images=pictures, output=tmp_path / "run", **settings)
    assert [entry["step"] for entry in run.metrics] == [1, 2, 3]
    assert all(np.isfinite(entry["loss"]) for entry in run.metrics)
    assert len({entry["loss"] for entry in run.metrics}) == 3
    assert ("prior" in run.metrics[0]) == ("prior" in options and "prior" not in lacking)
    if options.get("text_encoder") and "text_encoder" not in lacking:
        assert any(path.startswith("text_encoder.") for path in run.adapter.modules)


TOY = '''
import torch
from diffgraft.adapters.factors import FactorDelta, FactorLayer, Factors
from diffgraft.adapters.method import Method
from diffgraft.adapters.patch import AttachedLayers


class Rows(Factors):
    """The same number added to all weights of an output."""

    kind = "rows"

    def init_leaves(self, shape, rank, generator):
        return {"rows": torch.zeros(shape[0])}

    def rank(self, leaves):
        return 1

    def weight(self, leaves, shape):
        return leaves["rows"].view(-1, *[1] * (len(shape) - 1)).expand(shape)


def attach(target, spec):
    return AttachedLayers(target, spec, lambda path, layer, rng: FactorLayer(Rows(), layer, 1, 1.0, rng))


def read(leaves, alpha):
    return FactorDelta(Rows(), leaves, alpha)


METHOD = Method("rows", "one number for each output", attach, read=read)
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "outside-method"
version = "1"
[project.entry-points."diffgraft.methods"]
rows = "outside_method:METHOD"
[tool.setuptools]
py-modules = ["outside_method"]
"""
USE = """
import sys
from pathlib import Path
import torch
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import load_base
from diffgraft.generation.graft import graft
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train

pictures, folder = sys.argv[1:]
base = load_base("tiny")
settings = {"subject": "dog", "steps": 2, "prior": {"weight": 0}, "previews": False, "sample_every": 0}
rows, lora = (
    train("subject", base=base, images=pictures, method=method, output=Path(folder) / method, **settings)
    for method in ("rows", "lora")
)
copy = load_adapter(rows.adapter_file).save(Path(folder) / "copy.safetensors", "diffgraft")
weight = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
start = weight.detach().clone()
with graft(base, {copy: 2.0, lora.adapter_file: 1.0}):
    moved = weight.detach() - start
path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
(row,), (low,) = (run.adapter.deltas[path] for run in (rows, lora))
wanted = 2 * row.delta(start.shape) + low.delta(start.shape)
assert wanted.abs().max() > 0
torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)
assert torch.equal(weight, start)
"""


def test_a_method_of_an_outside_package(pictures: Path, tmp_path: Path) -> None:
    """Installed, it trains, exports, converts, loads and stacks: through the entry point alone."""
    assert len(TOY.splitlines()) < 60
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT, "utf-8")
    (source / "outside_method.py").write_text(TOY, "utf-8")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(site), str(source)], check=True)
    command = [sys.executable, "-W", "ignore", "-c", USE, str(pictures), str(tmp_path / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        subprocess.run(command, check=True)
