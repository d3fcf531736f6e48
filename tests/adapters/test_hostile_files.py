"""Small files that would take much memory, or hold something else than they should: each is refused, or cheap."""

import json
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.combine import combine
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.ops.glance import glance
from diffgraft.adapters.ops.inspect import _largest_entry, inspect
from diffgraft.adapters.ops.resize import resize
from diffgraft.adapters.registry import read_delta
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft

PATH = "unet.mid_block.attentions.0.proj_in"


def answer(path: Path) -> str:
    with pytest.raises(DiffgraftError) as caught:
        load_adapter(path)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1000
    return said


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "as bool"),
        (torch.ones(1, 1, dtype=torch.bool), "as bool"),
        (torch.ones(2, 3, dtype=torch.int64), "as int64"),
        (torch.ones(2, 3, *[1] * 60), "axes"),
        (torch.ones(0, 3), "[0, 3]"),
    ],
)
def test_tensors_that_no_adapter_has(value: torch.Tensor, said: str, tmp_path: Path) -> None:
    key = f"{PATH}.lora_A.weight"
    save_file({key: value, f"{PATH}.lora_B.weight": torch.ones(5, max(1, value.shape[0]))}, tmp_path / "x.safetensors")
    assert said in answer(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "said",
    [
        *({"base": {name: 3}} for name in ("family", "name", "hash", "prediction_type")),
        *({name: 1} for name in ("method", "trigger", "dora", "base", "recipe")),
        *({"recipe": "text"}, {"rank": "8"}, {"alpha": []}, {"alpha": float("nan")}, {"foreign": {"a": 1}}),
    ],
)
def test_fields_of_another_type(said: dict[str, Any], tmp_path: Path) -> None:
    tensors = {f"{PATH}.lora_A.weight": torch.ones(2, 3), f"{PATH}.lora_B.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"diffgraft": json.dumps(said)})
    assert next(iter(said)) in answer(tmp_path / "x.safetensors")


def test_words_are_lists_of_vectors(tmp_path: Path) -> None:
    header = {"diffgraft_tokens": json.dumps(["<a>"])}
    save_file({"token.0.text_encoder": torch.ones(5)}, tmp_path / "x.safetensors", header)
    assert "the word <a> has [5] for text_encoder; expected embeddings [n, width]" in answer(tmp_path / "x.safetensors")


def test_pickles_that_ask_for_gigabytes(tmp_path: Path) -> None:
    path, before = tmp_path / "x.pt", megabytes()
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R.")
    assert "may be code" in answer(path)
    path.write_bytes(b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x70\x85R.")
    assert "only plain tensors are read" in answer(path)
    one: list[Any] = [0] * 100
    for _ in range(5):
        one = [one] * 100  # ten thousand million entries in a few hundred bytes
    torch.save({"a": one}, path)
    assert "claims to hold more than its length" in answer(path)
    torch.save({"a": ["x" * 5000] * 5000}, path)
    assert "claims to hold more than its length" in answer(path)
    torch.save({"emb_params": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    six = content.index(b"K\x06")
    path.write_bytes(content[:six] + b"J" + struct.pack("<i", 2**30) + content[six + 2 :])
    assert "claims to hold more than its length" in answer(path)
    assert megabytes() - before < 200


def test_an_archive_with_two_tables_of_contents(tmp_path: Path) -> None:
    """PyTorch must not read another one than was looked at."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"emb_params": torch.full((2, 3), value)}, tmp_path / f"{name}.pt")
    both = (tmp_path / "a.pt").read_bytes() + (tmp_path / "b.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(both)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert any(item.filename.startswith("b/") for item in archive.infolist())
    ((word, vectors),) = load_adapter(tmp_path / "x.pt").tokens.items()
    assert word == "x"
    assert (vectors["text_encoder"] == 2).all()


def test_an_archive_whose_entries_claim_more_than_its_length_together(tmp_path: Path) -> None:
    """Each alone would fit, as both would where their bytes lie over each other."""
    path = tmp_path / "x.pt"
    torch.save({"emb_params": torch.ones(40, 30), "step": torch.ones(50, 20)}, path)
    content = bytearray(path.read_bytes())
    for name in (b"x/data/0", b"x/data/1"):
        entry = content.rindex(b"PK\x01\x02", 0, content.rindex(name))  # in the table of contents
        content[entry + 24 : entry + 28] = struct.pack("<I", len(content) - 99)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert sorted(item.file_size for item in archive.infolist())[-2:] == [len(content) - 99] * 2
    assert "claims to hold more than its length" in answer(path)


def wide(side: int, seed: int, by: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(1, side + 3, generator=generator), torch.randn(side, 1, generator=generator) * by
    return Adapter({PATH: (low_rank(down, up, 1.0),)}, {"base": {"family": "sd1"}})


def test_norms_come_from_the_factors() -> None:
    """A ΔW of 25,000 × 25,003 would take 2.5 GB."""
    big, before = wide(25_000, 1, by=30.0), megabytes()
    (module,) = inspect(big).modules
    leaves = big.deltas[PATH][0].leaves
    up, down = leaves["lora_up"].double(), leaves["lora_down"].double()
    assert module.norm == pytest.approx(float(up.norm() * down.norm()), rel=1e-6)
    assert module.effective_rank == pytest.approx(1.0)
    errors = compare(big, wide(25_000, 1, by=33.0)).errors
    assert errors[PATH] == pytest.approx(0.1, rel=1e-5)
    assert megabytes() - before < 300


def test_the_spectrum_of_lokr_is_that_of_its_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    leaves = {"lokr_w1": torch.randn(3, 2, generator=generator), "lokr_w2_a": torch.randn(5, 2, generator=generator)}
    leaves["lokr_w2_b"] = torch.randn(2, 7 * 9, generator=generator)
    delta = read_delta("lokr", leaves, 3.0)
    shape = (15, 14, 3, 3)
    matrix = delta.delta(shape).flatten(1).double()  # type: ignore[attr-defined]
    path = "unet.mid_block.resnets.0.conv1"
    from diffgraft.adapters.ops.singular_values import squared_singular_values

    found = squared_singular_values(path, [(delta, 1.0)], shape).sqrt().sort(descending=True).values[:6]  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix)[:6], rtol=1e-5, atol=1e-5)


def test_what_a_base_cannot_hold_is_not_written_into_it(base: Base) -> None:
    weight = base.unet.mid_block.attentions[0].proj_in.weight
    before = weight.clone()
    down, up = torch.full((1, *weight.shape[1:]), 1e20), torch.full((weight.shape[0], 1, 1, 1), 1e20)
    huge = Adapter({PATH: (low_rank(down, up, 1.0),)}, {})
    with pytest.raises(DiffgraftError, match="overflows float32"):
        graft(base, {huge: 1.0})
    assert torch.equal(weight, before)
    (module,) = inspect(huge).modules
    text = json.dumps(inspect(huge).as_json(), allow_nan=False)
    assert PATH in text
    assert module.norm is not None


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        (
            {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (7, 2), "hada_w2_b": (2, 8)},
            "and [7, 8]",
        ),
        (
            {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 3), "hada_w2_b": (2, 8)},
            "which cannot be multiplied",
        ),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (1, 2)}, "not for a weight of one shape"),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (2, 4), "lokr_w2": (3, 2)}, "not for a weight of one shape"),
        ({"lokr_w1": (4,), "lokr_w2": (3, 2)}, "the factors of a LoKr must be matrices"),
    ],
)
def test_factors_that_do_not_fit_each_other(leaves: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    """They alone do not tell the shape of their layer, but that no layer is meant."""
    save_file({f"{NAME}.{name}": torch.ones(shape) for name, shape in leaves.items()}, tmp_path / "x.safetensors")
    assert said in answer(tmp_path / "x.safetensors")


@pytest.mark.parametrize("rank", [2, 9])
def test_what_is_beyond_float32_comes_near_nothing(rank: int) -> None:
    adapter = Adapter({PATH: (low_rank(torch.full((rank, 5), 3e38), torch.full((7, rank), 3e38)),)})
    assert json.dumps(inspect(adapter).as_json(), allow_nan=False)
    with pytest.raises(DiffgraftError, match="exceeds the range of float32"):
        resize(adapter, RankBudget(rank=1))


def test_scales_of_eight_bits_and_long_names(tmp_path: Path) -> None:
    down = torch.arange(6.0).view(2, 3)
    tensors = {
        f"{NAME}.lora_down.weight": down.to(torch.float8_e4m3fn),
        f"{NAME}.lora_down.weight_scale": torch.tensor(2.0).to(torch.float8_e5m2),
        f"{NAME}.lora_up.weight": torch.ones(5, 2),
        f"{NAME}.dora_scale": torch.tensor([[0.5, 1.0, 2.0]]).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    (delta,) = next(iter(load_adapter(tmp_path / "x.safetensors").deltas.values()))
    assert torch.equal(delta.leaves["lora_down"], 2 * down)
    assert torch.equal(delta.leaves["dora_scale"].float(), torch.tensor([[0.5, 1.0, 2.0]]))
    save_file({"A" * 3000: torch.ones(2), "B" * 3000: torch.ones(3)}, tmp_path / "long.safetensors")
    assert len(answer(tmp_path / "long.safetensors")) < 600
    header = {"diffgraft": json.dumps({"method": "lora"})}
    flat = {f"{NAME}.lora_down.weight": torch.tensor(1.0), f"{NAME}.lora_up.weight": torch.ones(5, 2)}
    save_file(flat, tmp_path / "flat.safetensors", header)
    assert glance(tmp_path / "flat.safetensors") is None


def test_small_files_that_stand_for_vast_matrices(tmp_path: Path) -> None:
    """What needs the whole matrix refuses it; what works on the factors goes on."""
    far = 25_000
    one = "lora_unet_mid_block_resnets_0_conv1"
    kron = {"lokr_w1": torch.ones(100, 99), "lokr_t2": torch.ones(1, 1, 3, 3)}
    kron |= {"lokr_w2_a": torch.ones(1, 80), "lokr_w2_b": torch.ones(1, 80)}
    save_file({f"{one}.{name}": leaf for name, leaf in kron.items()}, tmp_path / "kron.safetensors")
    before = megabytes()
    adapter = load_adapter(tmp_path / "kron.safetensors")
    for attempt in (lambda: resize(adapter, RankBudget(rank=1)), lambda: combine([("a", adapter, 1.0)])):
        with pytest.raises(DiffgraftError, match="larger than the layers of any known base"):
            attempt()
    sparse = {"lora_down.weight": torch.ones(1, far), "lora_up.weight": torch.ones(far, 1)}
    sparse |= {"bias_indices": torch.zeros(2, 1).long(), "bias_values": torch.ones(1)}
    sparse |= {"bias_size": torch.tensor([far, far])}
    save_file({f"{NAME}.{name}": leaf for name, leaf in sparse.items()}, tmp_path / "sparse.safetensors")
    assert "its sparse remainder has shape [25000, 25000]" in answer(tmp_path / "sparse.safetensors")
    both = {f"{NAME}.{name}": sparse[name] for name in ("lora_down.weight", "lora_up.weight")}
    other = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    both |= {f"{other}.lokr_w1": torch.ones(200, 200), f"{other}.lokr_w2": torch.ones(125, 125)}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(DiffgraftError, match="larger than the layers of any known base"):
        load_adapter(tmp_path / "both.safetensors").save(tmp_path / "new.safetensors", "kohya")
    assert megabytes() - before < 500


def test_the_largest_entry_of_lokr_is_that_of_its_matrix() -> None:
    """Of 25,000 × 25,000 entries, none of which is formed."""
    one, two = torch.full((250, 250), 3.0), torch.full((100, 100), 2e5)
    one[3, 5] = -7.0
    before = megabytes()
    (delta,) = (read_delta("lokr", {"lokr_w1": one, "lokr_w2": two}, None),)
    assert _largest_entry(delta, (25_000, 25_000)) == 1.4e6
    assert megabytes() - before < 100


def test_commands_to_terminals_in_names_are_written_out(tmp_path: Path) -> None:
    for key in ("diffusion_model.\x1b[31mdouble.lora_A.weight", f"{NAME}.\x1b]0;x\x07", "\x1b[2Jx.y"):
        save_file({key: torch.ones(2, 3)}, tmp_path / "x.safetensors")
        assert answer(tmp_path / "x.safetensors").isprintable()
