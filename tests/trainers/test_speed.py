"""Other ways to compute give the same losses to rounding, and leave the base as it was."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffgraft.bases import Base, load_base
from diffgraft.bases.quantize import quantized
from diffgraft.bases.unet import unet_arguments
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.runtime import speed
from diffgraft.trainers.runtime.speed import sped_up
from tests.conftest import SHORT
from tests.recipes import SUBJECT

FAST: dict[str, Any] = {**SHORT, "steps": 3, "checkpoint_every": 0, "sample_prompts": "a dog", "prior": {"weight": 0}}


def state(base: Base) -> tuple[Any, ...]:
    """Bits, strides and processors."""
    held = [
        (name, value.stride(), value.clone()) for _, part in base.parts() for name, value in part.named_parameters()
    ]
    return held, {name: id(processor) for name, processor in base.unet.attn_processors.items()}


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[1] == other[1]
    for (name, stride, value), (other_name, other_stride, other_value) in zip(one[0], other[0], strict=True):
        assert (name, stride) == (other_name, other_stride)
        assert torch.equal(value, other_value)


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics]


def changed(**settings: Any) -> Any:
    return load_recipe(SUBJECT, {"subject": "dog", **settings})


@pytest.fixture(scope="module")
def plain_run(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With all that a run may be asked to train: convolutions, and the text encoder."""
    folder = tmp_path_factory.mktemp("plain")
    more = {"method": "locon", "text_encoder": True, "lr": 1e-2}
    return train(SUBJECT, base=base, images=pictures, output=folder / "run", **FAST, **more)


@pytest.mark.parametrize(
    "settings",
    [{"attention": "plain"}, {"attention": "sliced"}, {"channels_last": True}],
    ids=["plain", "sliced", "channels last"],
)
def test_losses_are_the_same_to_rounding(
    settings: dict[str, Any], plain_run: Run, base: Base, pictures: Path, tmp_path: Path
) -> None:
    before = state(base)
    more = {"method": "locon", "text_encoder": True, "lr": 1e-2, **settings}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **{**FAST, **more})
    assert losses(run) == pytest.approx(losses(plain_run), rel=1e-5)
    assert len(set(losses(run))) == 3
    assert_same(state(base), before)


@pytest.mark.parametrize("begun_last", [False, True])
def test_it_is_so_within_the_block_and_as_before_after_it(begun_last: bool) -> None:
    """Also where an error leaves it, and of a base that had its channels last already."""
    base = load_base("tiny")
    if begun_last:
        base.unet.to(memory_format=torch.channels_last)
    before = state(base)
    denoiser = Denoiser(base)
    for kind, named in (("plain", "AttnProcessor"), ("sliced", "SlicedAttnProcessor"), ("default", "AttnProcessor2_0")):
        with suppress(KeyboardInterrupt), sped_up(changed(attention=kind, channels_last=True), base, denoiser):
            assert {type(one).__name__ for one in base.unet.attn_processors.values()} == {named}
            assert base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            raise KeyboardInterrupt
        assert_same(state(base), before)
        assert denoiser.denoiser is base.unet
    assert base.unet.conv_in.weight.is_contiguous() != begun_last


def test_trained_channels_last_is_resumed_to_the_same_bytes(base: Base, pictures: Path, tmp_path: Path) -> None:
    """Where the laid-out weights are the ones that train, and stand in checkpoints."""
    settings = {**FAST, "method": "full", "lr": 1e-4, "channels_last": True, "checkpoint_every": 2, "ema": 0.5}
    whole = train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **settings)
    part = train(SUBJECT, base=base, images=pictures, output=tmp_path / "part", **{**settings, "steps": 2})
    text = (part.folder / "recipe.yaml").read_text("utf-8")
    (part.folder / "recipe.yaml").write_text(text.replace("steps: 2", "steps: 3"), "utf-8")
    part.adapter_file.unlink()
    again = train(base=base, resume=part.folder)
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()


def one_block(folder: Path) -> Base:
    """The base of a folder with a UNet of one block each way, as translating more takes long."""
    base = load_base(folder)
    attention: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None}
    attention |= {"up_block_types": ("CrossAttnUpBlock2D",), "block_out_channels": (16,)}
    torch.manual_seed(5)
    return replace(base, unet=UNet2DConditionModel.from_config({**dict(base.unet.config), **attention}))


# torch makes an instance of the products of quantised layers, and then warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_trains_the_same(
    sdxl_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DoRA over nf4 weights, checkpointed and held to the bare base, for which there is a second graph.

    Traced, and run without the kernels that a compiler would make of it: tests have no time for those.
    """
    from torch._dynamo.utils import counters

    settings: dict[str, Any] = {"gradient_checkpointing": True, "options": {"dora": True}, "quantize": "nf4"}
    settings |= {"prior": {"weight": 1.0, "by": "prediction"}}
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    base = quantized(one_block(sdxl_folder), "nf4")
    # the same UNet was compiled before, with no adapter on it: that must not be what trains
    bare = torch.compile(base.unet, backend="aot_eager")
    bare(torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), **unet_arguments(base.condition(["a dog"] * 2)))
    before = state(base)
    found = {}
    for compiled in (True, False):
        counters.clear()
        more = {**FAST, **settings, "lr": 9e-2, "compile": compiled, "sample_every": 2, "batch": 2}
        folder = tmp_path / str(compiled)
        found[compiled] = train(SUBJECT, base=base, images=pictures, output=folder, **more)
        assert counters["stats"]["unique_graphs"] == 2 * compiled
        assert not counters["graph_break"]
        assert_same(state(base), before)
    assert losses(found[True]) == pytest.approx(losses(found[False]), rel=1e-5)
    for path, (delta,) in found[True].adapter.deltas.items():
        (other,) = found[False].adapter.deltas[path]
        for name, leaf in delta.leaves.items():
            torch.testing.assert_close(leaf, other.leaves[name], rtol=1e-3, atol=1e-4)


def test_pictures_of_many_sizes_are_two_graphs(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the first size, and one for all others."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    base = one_block(sdxl_folder)
    denoiser = Denoiser(base)
    counters.clear()
    with torch.no_grad(), sped_up(changed(compile=True), base, denoiser):
        for height, width in ((16, 24), (24, 16), (32, 8), (8, 40), (16, 24)):
            given = (torch.randn(2, 4, height, width), torch.tensor([20, 700]), ["a dog", "a cat"])
            torch.testing.assert_close(denoiser(*given), Denoiser(base)(*given), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU")
def test_on_a_cpu_nothing_is_compiled_in_bfloat16(base: Base, pictures: Path, tmp_path: Path) -> None:
    """There PyTorch's compiler makes most gradients 0."""
    more = {"compile": True, "precision": "bfloat16"}
    with pytest.raises(DiffgraftError, match="wrong gradients in bfloat16: set compile=false or precision=float32"):
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **FAST, **more)


def test_xformers_is_refused_where_it_cannot_run(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.utils

    settings: dict[str, Any] = {**FAST, "attention": "xformers", "images": pictures, "output": tmp_path / "run"}
    if not diffusers.utils.is_xformers_available():
        with pytest.raises(DiffgraftError, match=r"needs the package xformers, which is not installed"):
            train(SUBJECT, base=base, **settings)
    monkeypatch.setattr(diffusers.utils, "is_xformers_available", lambda: True)
    if not torch.cuda.is_available():
        with pytest.raises(DiffgraftError, match=r"needs an NVIDIA GPU, but this run is on cpu"):
            train(SUBJECT, base=base, **settings)
    assert not (tmp_path / "run").exists()


def test_xformers_is_asked_for_in_diffusers_own_way(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    name = "enable_xformers_memory_efficient_attention"
    monkeypatch.setattr(type(base.unet), name, lambda unet: asked.append(unet))
    before = state(base)
    with sped_up(changed(attention="xformers"), base, Denoiser(base)):
        assert asked == [base.unet]
    assert_same(state(base), before)
