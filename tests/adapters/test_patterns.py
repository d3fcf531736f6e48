"""Keys that mean modules: parts, blocks and patterns; and ranks and alphas that are set by them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.patterns import check_pattern_keys, last_matching_value
from diffgraft.adapters.registry import get_method, written_dialects
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import load_recipe
from tests.adapters.toys import shake
from tests.conftest import fresh
from tests.recipes import SUBJECT

UP = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
"""OUT05"""
MIDDLE = "unet.mid_block.resnets.0.conv1"
FIRST, SECOND = (f"{part}.encoder.layers.0.mlp.fc1" for part in ("text_encoder", "text_encoder_2"))
PATHS = (UP, MIDDLE, "unet.time_embedding.linear_1", FIRST, SECOND)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"unet": 2}, [2, 2, 2, 1, 1]),
        ({"text_encoder": 2}, [1, 1, 1, 2, 2]),
        ({"text_encoder_2": 3, "text_encoder": 2}, [1, 1, 1, 2, 3]),
        ({"text_encoder": 2, "text_encoder_2": 3}, [1, 1, 1, 2, 3]),
        ({"text_encoder_2": 3}, [1, 1, 1, 1, 3]),
        ({"OUT05": 2, "M00": 3, "BASE": 4}, [2, 3, 4, 4, 4]),
        ({"OUT*": 2, "OUT0[6-9]": 3}, [2, 1, 1, 1, 1]),
        ({"*": 0, "OUT*": 2}, [2, 0, 0, 0, 0]),
        ({"OUT*": 2, "*": 0}, [0, 0, 0, 0, 0]),
        ({"*.attn2.*": 2, "unet.mid_block.*": 3, "*.fc1": 4}, [2, 3, 1, 4, 4]),
        ({"unet": 2, UP: 3}, [3, 2, 2, 1, 1]),
    ],
)
def test_a_key_is_a_part_a_block_or_a_pattern_and_the_last_counts(keys: dict[str, int], wanted: list[int]) -> None:
    assert [last_matching_value(keys, path, 1) for path in PATHS] == wanted
    if keys:
        check_pattern_keys("lr_scale", [key for key in keys if key != "OUT0[6-9]"], PATHS)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("unte", r"lr_scale\.unte matches no trained module: .*did you mean 'unet'"),
        ("OUT06", "did you mean 'OUT05'"),
        ("up_blocks", "known are: BASE, M00, OUT05, text_encoder, text_encoder_2, unet"),
        ("unet.mid_blok.*", r"did you mean 'unet\.mid_block\.\*'"),
        ("*.atn2.*", r"did you mean '\*\.attn2\.\*'"),
        ("*.to_kk", r"did you mean '\*\.to_k'"),
        (f"{UP}k", f"did you mean '{UP}'"),
    ],
)
def test_a_key_that_means_nothing_is_answered_with_the_nearest(key: str, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        check_pattern_keys("lr_scale", ["unet", key], PATHS)


def test_where_no_text_encoder_is_trained_it_says_how() -> None:
    for key in ("text_encoder", "text_encoder_2", "text_encoder.*"):
        with pytest.raises(DiffgraftError, match=r"no text encoder is trained\. .*text_encoder=true"):
            check_pattern_keys("options.ranks", [key], PATHS[:3])


RANKS = {"text_encoder": 1, "*.attn2.*": 4, "OUT*": 5, "text_encoder_2.*.q_proj": 3}
ALPHAS = {"M00": 5.0, "*.to_v": 1.0}


def attached(base: Base, method: str, options: dict[str, Any]) -> Any:
    """Of rank 2, at a scale of 1.5, on layers of all parts."""
    read = get_method(method).read_options(options)
    layers = get_method(method).layers_under(read)
    paths = {part: choose_layers(part, module, layers) for part, module in parts_of(base).items()}
    return get_method(method).attach(base, Spec(paths, 2, 3.0, 0, read))


@pytest.mark.parametrize("method", ["lora", "locon", "loha", "lokr"])
def test_mixed_ranks_go_into_every_format_and_come_back(method: str, folders: Path, tmp_path: Path) -> None:
    base = fresh(folders / "sdxl")
    live = attached(base, method, {"ranks": RANKS, "alphas": ALPHAS})
    shake(live)
    adapter = live.adapter({"method": method, "base": {"family": "sdxl"}})
    live.detach()
    sizes = {}
    for path, (delta,) in adapter.deltas.items():
        assert isinstance(delta, FactorDelta)
        sizes[path] = (delta.rank, delta.alpha)
    unet = "unet.up_blocks.0.attentions.0.transformer_blocks.0"  # OUT00
    for path, size in (
        (f"{unet}.attn1.to_q", (5, 7.5)),
        (f"{unet}.attn2.to_v", (5, 1.0)),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q", (4, 6.0)),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (2, 3.0)),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", (4, 5.0)),
        ("text_encoder.encoder.layers.0.self_attn.q_proj", (1, 1.5)),
        ("text_encoder_2.encoder.layers.0.self_attn.q_proj", (3, 4.5)),
        ("text_encoder_2.encoder.layers.0.self_attn.k_proj", (1, 1.5)),
    ):
        if method != "lokr":  # which splits only where the rank is small beside the sides
            assert sizes[path] == size, path
    assert len({rank for rank, _ in sizes.values()}) > 2
    held = []
    for dialect, format_ in written_dialects().items():
        name = f"{dialect}{format_.suffix(adapter)}"
        try:
            file = adapter.save(tmp_path / name, dialect)
        except DiffgraftError:
            continue
        held.append(dialect)
        again = load_adapter(file)
        assert set(again.modules) == set(adapter.modules)
        for path, (delta,) in adapter.deltas.items():
            (other,) = again.deltas[path]
            assert isinstance(delta, FactorDelta)
            assert isinstance(other, FactorDelta)
            assert other.rank == delta.rank
            if dialect == "diffusers":  # whose layout has the scale in the factors
                up, down = (delta.leaves[f"lora_{side}"].double().flatten(1) for side in ("up", "down"))
                found = other.leaves["lora_up"].double().flatten(1) @ other.leaves["lora_down"].double().flatten(1)
                torch.testing.assert_close(other.scale * found, delta.scale * up @ down, rtol=1e-5, atol=1e-7)
                continue
            assert other.scale == delta.scale, path
            assert all(torch.equal(leaf, other.leaves[name]) for name, leaf in delta.leaves.items())
    assert {"lycoris", "kohya", "webui", "peft", "diffgraft"} <= set(held)
    assert ("diffusers" in held) == (method in ("lora", "locon"))


@pytest.mark.parametrize("method", ["lora", "locon", "loha", "lokr"])
@pytest.mark.parametrize("setting", ["ranks", "alphas"])
def test_a_key_of_no_adapted_layer_is_refused(method: str, setting: str, base: Base) -> None:
    with pytest.raises(
        DiffgraftError, match=rf"options\.{setting}\.\*\.atn2\.\* matches no trained module: .*'\*\.attn2\.\*'"
    ):
        attached(base, method, {setting: {"unet": 3, "*.atn2.*": 16}})


def test_ranks_as_a_command_line_gives_them() -> None:
    def options(method: str, **settings: str) -> Any:
        recipe = load_recipe(SUBJECT, {"subject": "dog", "method": method, **settings})
        return get_method(method).read_options(recipe.options)

    for method in ("lora", "locon", "loha", "lokr"):
        given = {"options.ranks.OUT05": "16", "options.ranks.*.attn2.*": "8", "options.alphas.text_encoder": "0.5"}
        found = options(method, **given)
        assert [*found.ranks.items()] == [("OUT05", 16), ("*.attn2.*", 8)]
        assert found.alphas == {"text_encoder": 0.5}
    inner = options(
        "pivotal", **{"options.weights_options.ranks.OUT05": "16", "options.weights_options.ranks.*.attn2.*": "8"}
    )
    assert get_method("lora").read_options(inner.weights_options).ranks == {"OUT05": 16, "*.attn2.*": 8}
    with pytest.raises(DiffgraftError, match=r"Invalid value options.ranks"):
        options("loha", **{"options.ranks.OUT05": "many"})
    with pytest.raises(DiffgraftError, match="no option 'rnks'"):
        get_method("lora").read_options({"rnks": {"OUT05": 16}})
