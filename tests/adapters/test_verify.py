"""A writer of a dialect that leaves something out is an error, and leaves no file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.formats import samples
from diffgraft.adapters import registry
from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Contents
from diffgraft.adapters.formats import check_dialect, load_adapter
from diffgraft.adapters.formats.verify import LossyWriteError
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.registry import read_delta

PATH, OTHER = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"
METADATA = {"method": "pivotal", "trigger": "<zorp>", "seed": 3, "base": {"family": "sd1", "name": "x"}}


def pivotal() -> Adapter:
    deltas: dict[str, tuple[Delta, ...]] = {
        path: (low_rank(torch.ones(2, 5), torch.ones(7, 2), 1.0),) for path in (PATH, OTHER)
    }
    words = {"<zorp>": {"text_encoder": torch.ones(2, 6)}, "<blub>": {"text_encoder": torch.zeros(1, 6)}}
    return Adapter(deltas, METADATA, tokens=words)


def without(*ends: str) -> Callable[[Contents], Contents]:
    """Leave out the keys that hold one of these."""
    return lambda contents: ({k: v for k, v in contents[0].items() if not any(e in k for e in ends)}, contents[1])


def renamed(old: str, new: str) -> Callable[[Contents], Contents]:
    return lambda contents: ({k.replace(old, new): v for k, v in contents[0].items()}, contents[1])


def other_vectors(contents: Contents) -> Contents:
    return {k: v + 1 if "<zorp>" in k else v for k, v in contents[0].items()}, contents[1]


def no_header(contents: Contents) -> Contents:
    return contents[0], {}


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the writer of a dialect spoil what it writes."""

    def spoil(name: str, how: Callable[[Contents], Contents]) -> None:
        known = registry.dialects()
        write = known[name].write
        assert write is not None
        spoilt = {**known, name: replace(known[name], write=lambda adapter: how(write(adapter)))}
        for module in ("registry", "formats.saving", "formats.loading"):
            monkeypatch.setattr(f"diffgraft.adapters.{module}.dialects", lambda: spoilt)

    return spoil


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (without("bundle_emb"), "the embeddings of the word '<zorp>' for text_encoder are not read again"),
        (without("<blub>"), "the embeddings of the word '<blub>' for text_encoder are not read again"),
        (other_vectors, "the embeddings of the word '<zorp>' for text_encoder are not read again"),
        (without("proj_out"), rf"{OTHER} is read again as nothing instead of lora \(lora_down, lora_up\)"),
        (without("proj_out.lora_up"), "cannot read again"),
        (renamed("proj_out", "proj_other"), rf"{OTHER} is read again as nothing"),
        (renamed("lora_unet", "unknown"), "no format recognises what was written|cannot read again"),
        (no_header, "the metadata entry 'trigger' is not read again|'seed' is not read again"),
    ],
)
def test_what_a_writer_leaves_out_is_told_and_nothing_is_saved(
    how: Callable[[Contents], Contents], reason: str, writing: Any, tmp_path: Path
) -> None:
    writing("lycoris", how)
    with pytest.raises(LossyWriteError, match=reason):
        pivotal().save(tmp_path / "a.safetensors", "lycoris")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(LossyWriteError):
        check_dialect(pivotal(), "lycoris")


def test_a_conversion_that_loses_words_is_refused(writing: Any, tmp_path: Path) -> None:
    source = pivotal().save(tmp_path / "a.safetensors", "diffgraft")
    writing("lycoris", without("bundle_emb"))
    with pytest.raises(LossyWriteError, match="the embeddings of the word"):
        convert(source, tmp_path / "b.safetensors", "lycoris")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_part_of_a_delta_that_is_left_out_is_told(writing: Any, tmp_path: Path) -> None:
    leaves = {"diff": torch.ones(7, 5), "diff_b": torch.ones(7)}
    adapter = Adapter({PATH: (read_delta("full", leaves, None),)}, {"method": "full"})
    writing("kohya", without(".diff_b"))
    with pytest.raises(LossyWriteError, match=r"read again as full \(diff\) instead of full \(diff, diff_b\)"):
        adapter.save(tmp_path / "a.safetensors", "kohya")


def test_a_network_that_is_cut_is_told(writing: Any, tmp_path: Path) -> None:
    adapter = samples()["hypernetwork"]
    writing("webui", without("768."))
    with pytest.raises(LossyWriteError, match="the hypernetwork is not read again"):
        adapter.save(tmp_path / "a.pt", "webui")
    assert not [*tmp_path.iterdir()]


def test_deltas_that_a_format_has_one_name_for_are_summed_and_not_missed(tmp_path: Path) -> None:
    """LoRAs side by side, differences added up, and a bias beside them: what the format makes of them is no loss."""

    def drawn(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=torch.Generator().manual_seed(sum(sides)))

    lora = low_rank(drawn(2, 5), drawn(7, 2), 1.0)
    loha = read_delta(
        "loha",
        {f"hada_w{i}_{s}": drawn(*((7, 3) if s == "a" else (3, 5))) for i in (1, 2) for s in "ab"},
        1.0,
    )
    bias = read_delta("full", {"diff_b": drawn(7)}, None)
    for deltas in ((lora, lora), (lora, loha), (lora, bias), (lora, lora, bias), (lora, loha, bias)):
        adapter = Adapter({PATH: deltas}, {"method": "mixed"})
        for dialect in ("kohya", "lycoris", "diffgraft"):
            again = load_adapter(adapter.save(tmp_path / "a.safetensors", dialect))
            weight, own = drawn(7, 5), drawn(7)
            wanted, found = ((weight, own), (weight, own))
            for delta in deltas:
                wanted = delta.apply(*wanted, 1.0)  # type: ignore[assignment]
            for delta in again.deltas[PATH]:
                found = delta.apply(*found, 1.0)  # type: ignore[assignment]
            torch.testing.assert_close(found, wanted)
