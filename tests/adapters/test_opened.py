"""Files of PyTorch's own kind: what webui writes is read, and what is hostile or broken gives a sentence."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.hypernetwork import Hypernetwork
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft


def answer(path: Path) -> str:
    with pytest.raises(DiffgraftError) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_words_of_webui(tmp_path: Path) -> None:
    vectors = torch.randn(3, 20)
    held = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "other", "step": 7}
    torch.save(held, tmp_path / "zorp.pt")
    found = load_adapter(tmp_path / "zorp.pt")
    assert found.method == "textual-inversion"
    assert found.metadata["trigger"] == "zorp"
    assert torch.equal(found.tokens["zorp"]["text_encoder"], vectors)
    torch.save({"emb_params": vectors[:1]}, tmp_path / "kohya.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load_adapter(tmp_path / "kohya.bin").tokens["kohya"]["text_encoder"], vectors[:1])
    torch.save({"<zorp>": vectors[0]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(load_adapter(tmp_path / "learned_embeds.bin").tokens["<zorp>"]["text_encoder"], vectors[:1])
    torch.save({"clip_l": vectors, "clip_g": torch.ones(3, 28)}, tmp_path / "xl.pt")
    assert set(load_adapter(tmp_path / "xl.pt").tokens["xl"]) == {"text_encoder", "text_encoder_2"}


def test_pickled_weights_of_kohya(tmp_path: Path) -> None:
    """A plain number as alpha, numbers of 8 bits, and a tensor under two names."""
    down, up = torch.arange(6.0).view(2, 3), torch.ones(5, 2)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    held = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": 1}
    for content in (
        held,
        {key: value.to(torch.float8_e4m3fn) if key[-6:] != ".alpha" else 1.0 for key, value in held.items()},
    ):
        torch.save(content, tmp_path / "x.pt")
        (delta,) = next(iter(load_adapter(tmp_path / "x.pt").deltas.values()))
        assert delta.alpha == 1.0
        assert torch.equal(delta.leaves["lora_down"].float(), down)
    torch.save({"<a>": up, "<b>": up}, tmp_path / "words.pt")
    assert torch.equal(load_adapter(tmp_path / "words.pt").tokens["<b>"]["text_encoder"], up)


def test_the_first_words_of_textual_inversion(tmp_path: Path) -> None:
    vectors = torch.randn(2, 20)
    params = [nn.ParameterDict({"*": nn.Parameter(vectors + number)}) for number in range(2)]
    torch.save({"string_to_param": params[0], "placeholder_string_to_token": params[1]}, tmp_path / "zorp.pt")
    assert torch.equal(load_adapter(tmp_path / "zorp.pt").tokens["zorp"]["text_encoder"], vectors)


def _webui(width: int, structure: list[int], activation: nn.Module | None, last: bool, norm: bool) -> nn.Sequential:
    """The layers in webui's order: linear, activation, layer norm, dropout."""
    layers: list[nn.Module] = []
    for place in range(len(structure) - 1):
        layers.append(nn.Linear(width * structure[place], width * structure[place + 1]))
        if activation is not None and (last or place < len(structure) - 2):
            layers.append(activation)
        if norm:
            layers.append(nn.LayerNorm(width * structure[place + 1]))
        if place == 0 and len(structure) > 3:  # as webui spreads it where a file says no more than that it is used
            layers.append(nn.Dropout(0.3))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("said", "structure", "activation", "last", "norm"),
    [
        ({}, [1, 2, 1], None, True, False),
        ({"layer_structure": [1, 3, 1], "activation_func": "relu"}, [1, 3, 1], nn.ReLU(), True, False),
        (
            {
                "layer_structure": [1, 2, 2, 1],
                "activation_func": "swish",
                "activate_output": False,
                "is_layer_norm": True,
                "use_dropout": True,
                "last_layer_dropout": False,
            },
            [1, 2, 2, 1],
            nn.Hardswish(),
            False,
            True,
        ),
    ],
)
def test_the_hypernetworks_of_webui(
    said: dict[str, Any], structure: list[int], activation: nn.Module | None, last: bool, norm: bool, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    made = {width: [_webui(width, structure, activation, last, norm) for _ in "kv"] for width in (6, 10)}
    held: dict[Any, Any] = {"step": 5, "name": "zorp", "sd_checkpoint": None, "optional_info": "no more", **said}
    for width, pair in made.items():
        held[width] = tuple({f"linear.{k}": v for k, v in network.state_dict().items()} for network in pair)
    torch.save(held, tmp_path / "zorp.pt")
    (found,) = load_adapter(tmp_path / "zorp.pt").networks
    assert isinstance(found, Hypernetwork)
    built = found.build()
    assert sorted(built) == ["10-k", "10-v", "6-k", "6-v"]
    for width, pair in made.items():
        x = torch.randn(2, 5, width)
        for side, network in zip("kv", pair, strict=True):
            torch.testing.assert_close(built[f"{width}-{side}"](x), network(x))


def test_the_oldest_hypernetworks_of_webui(tmp_path: Path) -> None:
    one, two = nn.Linear(6, 12), nn.Linear(12, 6)
    names = {f"linear1.{k}": v for k, v in one.state_dict().items()}
    names |= {f"linear2.{k}": v for k, v in two.state_dict().items()}
    torch.save({6: (names, names), "step": 5, "name": "old"}, tmp_path / "old.pt")
    (found,) = load_adapter(tmp_path / "old.pt").networks
    assert isinstance(found, Hypernetwork)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(found.build()["6-v"](x), two(one(x)))


def test_aesthetic_embeddings_are_kept_and_not_drawn_with(base: Base, tmp_path: Path) -> None:
    torch.save(torch.randn(1, 768).half(), tmp_path / "fantasy.pt")
    found = load_adapter(tmp_path / "fantasy.pt")
    assert found.method == "aesthetic"
    again = load_adapter(found.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.networks[0].tensors["embedding"], found.networks[0].tensors["embedding"])
    with pytest.raises(DiffgraftError, match="needs the projection of CLIP's text encoder"):
        graft(base, {found: 1.0})
    torch.save(torch.randn(3, 768), tmp_path / "rows.pt")
    assert "is a single row of numbers" in answer(tmp_path / "rows.pt")


class _Hostile:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_what_is_hostile_or_broken_gives_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"string_to_param": {"*": _Hostile()}}, path)
    assert "may be code that runs on opening, so it was not opened" in answer(path)
    assert "weights_only" not in answer(path)
    path.write_bytes(pickle.dumps(_Hostile()))
    assert "so it was not opened" in answer(path)
    big: Tensor = torch.zeros(1).expand(100_000, 100_000)
    torch.save({"emb_params": big}, path)
    assert "claims to hold more than its length" in answer(path)
    deep: Any = torch.ones(1)
    for _ in range(12):
        deep = {"a": deep}
    torch.save(deep, path)
    assert "nested more than" in answer(path)
    torch.save({"emb_params": torch.ones(2, 3).to_sparse()}, path)
    assert "only plain tensors are read" in answer(path)
    torch.save({"emb_params": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a readable file" in answer(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    path.write_bytes(buffer.getvalue())
    assert "it is compressed" in answer(path)
    torch.save({6: ({"linear.0.weight": torch.ones(6, 6), "more": torch.ones(1)}, {})}, path)
    assert "unknown key 6.0.more: expected" in answer(path)
    claim = {"linear.0.weight": torch.ones(2, 1), "linear.1.weight": torch.ones(1, 2)}
    torch.save({10**6: (claim, claim)}, path)  # networks of that width would take terabytes
    assert "its network 1000000-k has no first layer" in answer(path)
    path.write_bytes(b"")
    assert "is not a readable .safetensors file" in answer(path)
