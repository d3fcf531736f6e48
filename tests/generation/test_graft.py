"""Grafting: strengths, sums, the very same bits afterwards, and errors that tell what fits."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny_base import verdicts
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import LOW_RANK, low_rank
from diffgraft.adapters.strengths import strengths_of
from diffgraft.bases import Base
from diffgraft.bases.loading import TINY
from diffgraft.bases.registry import part_names
from diffgraft.bases.tiny.judge import load_judge
from diffgraft.bases.tiny.world import Scene
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import Graft, graft
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from diffgraft.trainers.run.folder import Run
from tests.drawing import generate

PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def bits(base: Base) -> str:
    digest = hashlib.sha256()
    for _, part in base.parts():
        for value in part.state_dict().values():
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def lora(seed: int, shape: tuple[int, int] = (128, 64), path: str = PATH, **metadata: Any) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, shape[1], generator=rng), torch.randn(shape[0], 2, generator=rng)
    return Adapter({path: (low_rank(down, up, 3.0),)}, metadata)


def weight(base: Base) -> torch.Tensor:
    found: torch.Tensor = base.unet.get_parameter(PATH.removeprefix("unet.") + ".weight")
    return found.detach().clone()


def test_a_trained_file_changes_the_base_and_leaves_the_very_same_bits(base: Base, short_run: Run) -> None:
    before = bits(base)
    with graft(base, {short_run.adapter_file: 0.8}):
        assert bits(base) != before
    assert bits(base) == before


def test_bits_return_after_an_error_inside_the_block(base: Base) -> None:
    before = bits(base)
    with pytest.raises(ZeroDivisionError), graft(base, {lora(1): 1.0}):
        _ = 1 / 0
    assert bits(base) == before


def test_the_merged_weight_is_the_sum_in_float64(base: Base) -> None:
    first, second = lora(1), lora(2)
    start = weight(base).double().numpy()

    def delta(adapter: Adapter) -> np.ndarray:
        (one,) = adapter.deltas[PATH]
        return 1.5 * one.leaves["lora_up"].double().numpy() @ one.leaves["lora_down"].double().numpy()

    with graft(base, {first: 0.5, second: -1.25}):
        found = weight(base).double().numpy()
    np.testing.assert_allclose(found, start + 0.5 * delta(first) - 1.25 * delta(second), rtol=1e-5, atol=1e-5)


def test_strength_zero_is_the_base_bit_for_bit(base: Base) -> None:
    before = bits(base)
    with graft(base, {lora(1): 0}):
        assert bits(base) == before


def test_set_replaces_and_remove_may_come_twice(base: Base) -> None:
    before = bits(base)
    live = graft(base, {lora(1): 1.0})
    live.set({lora(2): 1.0})
    second = weight(base)
    live.remove()
    live.remove()
    assert bits(base) == before
    with graft(base, {lora(2): 1.0}):
        assert torch.equal(weight(base), second)


def test_grafts_come_off_in_the_order_they_went_on_reversed(base: Base) -> None:
    before = bits(base)
    first = graft(base, {lora(1): 1.0})
    under = bits(base)
    second = graft(base.pipeline(), {lora(2): 1.0})
    both = bits(base)
    for change in (first.remove, lambda: first.set({lora(3): 1.0})):
        with pytest.raises(DiffgraftError, match="applied later change the same modules"):
            change()
        assert bits(base) == both
    second.remove()
    assert bits(base) == under
    first.remove()
    assert bits(base) == before


def test_a_pipeline_a_bare_unet_or_parts_will_do(base: Base) -> None:
    start = weight(base)
    for target in (base.pipeline(), base.unet, SimpleNamespace(unet=base.unet, text_encoder=None)):
        with graft(target, {lora(1): 1.0}):
            assert not torch.equal(weight(base), start)
        assert torch.equal(weight(base), start)
    with pytest.raises(DiffgraftError, match="no part to apply adapters to"):
        graft(SimpleNamespace())


def test_an_adapter_for_another_base_is_refused_whole(base: Base) -> None:
    before = bits(base)
    good = lora(1).deltas[PATH]
    strange = Adapter({PATH: good, "unet.mid_block.attentions.3.to_q": good}, {"base": {"family": "sdxl"}})
    with pytest.raises(
        DiffgraftError, match=r"1 of its 2 modules match.*family sdxl.*attentions\.3\.to_q.*did you mean"
    ):
        graft(base, {strange: 1.0})
    with pytest.raises(DiffgraftError, match=r"another shape.*128 × 64"):
        graft(base, {lora(1, (64, 128)): 1.0})
    assert bits(base) == before


TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def test_each_part_has_its_own_strength(base: Base) -> None:
    text = base.text_encoder.get_parameter(f"{TEXT.removeprefix('text_encoder.')}.weight")
    both = Adapter({**lora(1).deltas, **lora(2, tuple(text.shape), TEXT).deltas})
    bare, bare_text = weight(base), text.detach().clone()
    with graft(base, {lora(1): 0.4}):
        wanted = weight(base)
    with graft(base, {both: {"unet": 0.4, "text_encoder": 0.0}}) as live:
        assert torch.equal(weight(base), wanted)
        assert torch.equal(text, bare_text)
        live.set({both: {"unet": 0.0}})  # a part that is not named has 1
        assert torch.equal(weight(base), bare)
        assert not torch.equal(text, bare_text)
    parts = strengths_of("x", {"text_encoder": 0.5}).parts
    assert parts == {name: 0.5 if name.startswith("text_encoder") else 1.0 for name in part_names()}
    assert strengths_of("x", {"text_encoder": 0.5, "text_encoder_2": 2}).parts["text_encoder_2"] == 2.0
    with pytest.raises(DiffgraftError, match="no part or block is called 'vae'; known are"):
        graft(base, {both: {"vae": 1.0}})


def test_one_file_alone_has_strength_one(base: Base, tmp_path: Path) -> None:
    bare = weight(base).clone()
    file = lora(1).save(tmp_path / "a.safetensors")
    with graft(base, {file: 1.0}):
        wanted = weight(base).clone()
    for given in (file, str(file), lora(1)):
        with graft(base, given):
            assert torch.equal(weight(base), wanted)
    assert torch.equal(weight(base), bare)
    with pytest.raises(DiffgraftError, match="must be a mapping of files to strengths"):
        graft(base, [file])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="does not change OUT11"):
        graft(base, {file: {"OUT11": 0.5}}).remove()


@pytest.mark.parametrize("strength", ["much", None, float("nan"), True])
def test_a_strength_that_is_no_number_is_refused(base: Base, strength: Any) -> None:
    with pytest.raises(DiffgraftError, match="not a number"):
        graft(base, {lora(1): strength})


def test_half_precision_bases_merge_and_return() -> None:
    half = torch.nn.ModuleDict({"proj": torch.nn.Linear(5, 7)}).bfloat16()
    kept = half["proj"].weight.detach().clone()  # type: ignore[operator]
    with graft(SimpleNamespace(unet=half), {lora(3, (7, 5), "unet.proj"): 1.0}):
        assert half["proj"].weight.dtype == torch.bfloat16
        assert not torch.equal(half["proj"].weight, kept)  # type: ignore[arg-type]
    assert torch.equal(half["proj"].weight, kept)  # type: ignore[arg-type]


def test_what_is_drawn_depends_on_seeds_and_not_on_batches(base: Base) -> None:
    def pixels(count: int, batch: int, first: int = 5, **more: Any) -> np.ndarray:
        prompts = [f"a {thing}" for thing in ("dog", "cat", "car")][:count]
        settings = DrawSettings(steps=3, batch=batch, **more)
        images = generate(base, prompts, settings, range(first, first + count))
        return np.stack([np.asarray(image) for image in images]).astype(int)

    together, alone = pixels(3, 3), pixels(3, 1)
    assert np.abs(together - alone).max() <= 1
    assert np.abs(pixels(3, 3, first=6) - together).max() > 20
    assert np.abs(pixels(3, 3, guidance=1.0) - together).max() > 20
    assert np.abs(pixels(3, 3, negative="in the snow") - together).max() > 5
    assert pixels(1, 1, size=(96, 48)).shape == (1, 48, 96, 3)


@pytest.mark.parametrize(
    "name", ["ddim", "euler", "euler a", "heun", "dpm++ 2m", "dpm++ 2m sde", "unipc", "plms", "deis"]
)
def test_samplers_draw_on_the_bases_own_schedule(base: Base, name: str) -> None:
    """A sampler on another schedule leaves noise, or a picture in no setting: the judge would not find the words."""
    scenes = [Scene(thing="teapot", setting=setting) for setting in ("snow", "beach", "night", "jungle")]
    prompts = ["a teapot in the snow", "a teapot on the beach", "a teapot at night", "a teapot in the jungle"]
    images = generate(base, prompts, DrawSettings(steps=25, sampler=name), range(4))
    right = verdicts(load_judge(TINY / "judge"), to_tensor(images), scenes)
    assert right["setting"].all()
    assert right["thing"].sum() >= 3


def test_a_loaded_adapter_does_not_need_its_file_any_more(short_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(short_run.adapter_file.read_bytes())
    adapter = load_adapter(copy)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    for path, (delta,) in short_run.adapter.deltas.items():
        (found,) = adapter.deltas[path]
        assert torch.equal(found.leaves["lora_down"], delta.leaves["lora_down"])


def test_an_adapter_of_another_base_that_fits_is_warned_of(base: Base) -> None:
    with (
        pytest.warns(UserWarning, match="was trained on elsewhere, not on this base"),
        graft(base, {lora(1, base={"name": "elsewhere", "hash": "0" * 64}): 1.0}),
    ):
        pass


def test_an_error_while_merging_leaves_the_target_as_it_was(base: Base) -> None:
    class Breaks(FactorDelta):
        def low_rank_factors(self, strength: float) -> Any:
            raise RuntimeError(f"no memory at strength {strength}")

    before = bits(base)
    other = PATH.replace("to_k", "to_v")
    bad = Adapter(
        {
            **lora(1).deltas,
            other: (Breaks(LOW_RANK, {"lora_down": torch.zeros(2, 64), "lora_up": torch.zeros(128, 2)}, 1.0),),
        }
    )
    with pytest.raises(RuntimeError, match="no memory"):
        graft(base, {bad: 1.0})
    assert bits(base) == before


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (DrawSettings(size=(60, 64)), "multiples of 8. Use 64x64"),
        (DrawSettings(size=(100, 3)), "Use 96x8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(base: Base, settings: DrawSettings, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        generate(base, ["a dog"], settings, [1])


def test_a_pipeline_draws_as_its_base_and_keeps_its_scheduler(base: Base) -> None:
    from diffusers import AutoPipelineForImage2Image

    pipe = base.pipeline()
    wanted = generate(base, ["a dog"], DrawSettings(steps=2), [1])[0]
    for target in (pipe, AutoPipelineForImage2Image.from_pipe(pipe)):
        assert generate(target, ["a dog"], DrawSettings(steps=2), [1])[0].tobytes() == wanted.tobytes()
        assert type(target.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(DiffgraftError, match="is of no known family"):
        generate(torch.nn.Linear(2, 3), ["a dog"], DrawSettings(steps=2), [1])


def test_only_what_changes_is_merged_again(base: Base, short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of a new graft, whatever was merged before."""
    adapter, path = short_run.adapter, short_run.adapter.modules[3]
    other = replace(adapter, deltas={path: adapter.deltas[path]})
    merged: list[str] = []
    real = Graft._merge

    def counted(self: Graft, path: str, *rest: Any) -> None:
        merged.append(path)
        real(self, path, *rest)

    monkeypatch.setattr(Graft, "_merge", counted)
    before = bits(base)
    with graft(base, {adapter: 0.5}) as live:
        assert len(merged) == len(adapter.modules)
        live.set({adapter: 0.5})
        assert len(merged) == len(adapter.modules)
        live.set({adapter: 0.5, other: 2.0})
        assert merged[len(adapter.modules) :] == [path]
        both = bits(base)
        live.set({other: 2.0})
        assert merged[len(adapter.modules) + 1 :] == [path]
        alone = bits(base)
        live.set({})
        assert bits(base) == before
        live.set({adapter: 0.5, other: 2.0})
        assert bits(base) == both
    assert bits(base) == before
    with graft(base, {other: 2.0}):
        assert bits(base) == alone
    assert bits(base) == before


def test_below_a_newer_graft_other_modules_may_change(base: Base, short_run: Run) -> None:
    adapter, path = short_run.adapter, short_run.adapter.modules[3]
    rest = replace(adapter, deltas={key: value for key, value in adapter.deltas.items() if key != path})
    other = replace(adapter, deltas={path: adapter.deltas[path]})
    before = bits(base)
    with graft(base, {rest: 1.0, other: 1.0}) as older, graft(base, {other: 1.0}):
        older.set({rest: 0.5, other: 1.0})
        held = bits(base)
        with pytest.raises(DiffgraftError, match="applied later change the same modules"):
            older.set({rest: 0.25, other: 0.5})
        assert bits(base) == held
    assert bits(base) == before


def test_loras_written_in_place_have_the_bits_of_the_slow_way(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {lora(1): 0.7, lora(2): -1.3}
    with graft(base, adapters) as live:
        fast = weight(base)
        live.set({lora(3): 0.5})
        alone = weight(base)
    monkeypatch.setattr("diffgraft.generation.graft._add_low_rank", lambda *_: False)
    with graft(base, adapters) as live:
        assert torch.equal(weight(base), fast)
        live.set({lora(3): 0.5})
        assert torch.equal(weight(base), alone)
