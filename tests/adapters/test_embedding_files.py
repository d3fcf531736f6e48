"""Files of words, by every tool that writes them: the word, its vectors, and the text encoder they are for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.errors import DiffgraftError

ONE, TWO = torch.randn(2, 20, generator=torch.Generator().manual_seed(1)), torch.arange(56.0).view(2, 28)
BIG = torch.arange(2560.0).view(2, 1280)
FIRST, SECOND = "text_encoder", "text_encoder_2"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"emb_params": ONE}, {"zorp": {FIRST: ONE}}),
        ({"emp_params": ONE}, {"zorp": {FIRST: ONE}}),
        ({"*": ONE}, {"zorp": {FIRST: ONE}}),
        ({"clip_l": ONE, "clip_g": TWO}, {"zorp": {FIRST: ONE, SECOND: TWO}}),
        ({"clip_l": ONE}, {"zorp": {FIRST: ONE}}),
        ({"clip_g": TWO}, {"zorp": {SECOND: TWO}}),
        ({"<dog>": BIG}, {"<dog>": {SECOND: BIG}}),
        ({"emb_params": BIG}, {"zorp": {SECOND: BIG}}),
        ({"text_encoders_0": ONE, "text_encoders_1": TWO}, {"zorp": {FIRST: ONE, SECOND: TWO}}),
        ({"text_encoders_1": TWO}, {"zorp": {SECOND: TWO}}),
        ({"<dog>": ONE}, {"<dog>": {FIRST: ONE}}),
        ({"<dog>": ONE, "<cat>": ONE[:1] + 1}, {"<dog>": {FIRST: ONE}, "<cat>": {FIRST: ONE[:1] + 1}}),
        ({"dog": ONE[0]}, {"dog": {FIRST: ONE[:1]}}),
        ({"bundle_emb.<dog>.emb_params": ONE}, {"<dog>": {FIRST: ONE}}),
        ({"bundle_emb.a.b.clip_l": ONE, "bundle_emb.a.b.clip_g": TWO}, {"a.b": {FIRST: ONE, SECOND: TWO}}),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_words_are_read_with_their_text_encoders(
    held: dict[str, Tensor], words: dict[str, dict[str, Tensor]], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"zorp.{suffix}"
    if suffix == "pt":
        torch.save(held, path)
    else:
        save_file(held, path)
    found = load_adapter(path)
    assert not found.deltas
    assert found.metadata["trigger"] in words
    assert {word: set(own) for word, own in found.tokens.items()} == {word: set(own) for word, own in words.items()}
    for word, own in words.items():
        for part, value in own.items():
            assert torch.equal(found.tokens[word][part], value)


@pytest.mark.parametrize(
    ("held", "word"),
    [
        ({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": ONE}}, "zorp"),
        ({"string_to_token": {"*": 265}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(ONE)})}, "zorp"),
        ({"string_to_token": {"<dog>": 1}, "string_to_param": {"<dog>": ONE}}, "<dog>"),
        (
            {
                **{"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}, "string_to_param_dict": {}},
                **{"placeholder_string_to_token": {"*": torch.tensor(265)}, "name": "other", "step": 8000},
            },
            "zorp",
        ),
    ],
    ids=["an id in a tensor", "ParameterDict", "under a word", "more ids"],
)
def test_words_of_older_tools_in_pickles(held: dict[str, Any], word: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "zorp.pt")
    found = load_adapter(tmp_path / "zorp.pt")
    assert set(found.tokens) == {word}
    assert torch.equal(found.tokens[word][FIRST], ONE)
    assert not found.tokens[word][FIRST].requires_grad


def test_words_that_an_adapter_file_brings_along(tmp_path: Path) -> None:
    start = "lora_unet_mid_block_attentions_0_proj_in"
    weights = {f"{start}.lora_down.weight": torch.ones(2, 6), f"{start}.lora_up.weight": torch.ones(4, 2)}
    for key in ("string_to_param.*", "emb_params", "emp_params", "clip_l"):
        save_file({**weights, f"bundle_emb.<my.dog>.{key}": ONE}, tmp_path / "bundle.safetensors")
        found = load_adapter(tmp_path / "bundle.safetensors")
        assert found.method == "pivotal"
        assert torch.equal(found.tokens["<my.dog>"][FIRST], ONE)
    save_file({**weights, "bundle_emb.x.clip_m": ONE}, tmp_path / "odd.safetensors")
    with pytest.raises(DiffgraftError, match=r"bundle_emb\.x\.clip_m ends in clip_m; keys of words in adapters end in"):
        load_adapter(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"emp_params": ONE, "emp_params_out": ONE + 1}, "emp_params_out holds embeddings for the output of a text"),
        ({"clip_l_out": ONE, "clip_g_out": TWO}, "holds embeddings for the output of a text encoder"),
        ({"emb_params": ONE, "emp_params": ONE + 1}, "is a second set of embeddings of the word 'zorp' for text_"),
        (
            {"emb_params": ONE[None]},
            r"emb_params has shape \[1, 2, 20\] and dtype torch.float32; expected float embeddings \[n, width\]",
        ),
        ({"emb_params": ONE.long()}, "holds emb_params as int64"),
        ({"clip_l": ONE, "clip_g": TWO, "t5small": ONE + 1}, "unknown key t5small: beside clip_g, the known keys are"),
        ({"emb_params": ONE, "unet.conv": ONE + 1}, "the key unet.conv is not one of textual inversion files"),
    ],
)
def test_what_is_no_word_is_refused(held: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    save_file(held, tmp_path / "zorp.safetensors")
    with pytest.raises(DiffgraftError, match=reason):
        load_adapter(tmp_path / "zorp.safetensors")


@pytest.mark.parametrize("parts", [{FIRST: ONE}, {FIRST: ONE, SECOND: TWO}, {SECOND: TWO}])
@pytest.mark.parametrize("dialect", ["embedding", "webui", "kohya"])
def test_a_word_is_written_as_each_tool_reads_it(parts: dict[str, Tensor], dialect: str, tmp_path: Path) -> None:
    adapter = Adapter({}, {}, tokens={"<Zorp>": parts})
    path = adapter.save(tmp_path / "zorp.safetensors", dialect)
    one = "<Zorp>" if dialect == "embedding" else "emb_params"
    keys = {FIRST: one if len(parts) == 1 else "clip_l", SECOND: "clip_g"}
    assert set(load_file(path)) == {keys[part] for part in parts}
    again = load_adapter(path)
    assert set(again.tokens) == {"<Zorp>"}
    assert all(torch.equal(again.tokens["<Zorp>"][part], value) for part, value in parts.items())


def test_an_aesthetic_embedding_of_one_axis_is_read(tmp_path: Path) -> None:
    row = torch.randn(768)
    torch.save(row, tmp_path / "laion_7plus.pt")
    assert torch.equal(load_adapter(tmp_path / "laion_7plus.pt").networks[0].tensors["embedding"], row[None])


def test_a_hypernetwork_that_carries_its_optimiser_is_read(tmp_path: Path) -> None:
    layers = [nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(2)]
    optimizer = torch.optim.AdamW(layers[0].parameters())
    layers[0](torch.ones(1, 8)).sum().backward()
    optimizer.step()
    states = tuple({f"linear.{name}": value for name, value in one.state_dict().items()} for one in layers)
    held = {8: states, "layer_structure": [1, 2, 1], "optimizer_name": "AdamW"}
    torch.save({**held, "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "with.pt")
    torch.save(held, tmp_path / "without.pt")
    found, plain = (load_adapter(tmp_path / name).networks[0] for name in ("with.pt", "without.pt"))
    assert set(found.tensors) == set(plain.tensors)
    assert all(torch.equal(found.tensors[name], value) for name, value in plain.tensors.items())
