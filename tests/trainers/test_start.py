"""Runs that start from an adapter file: what they begin with, what they refuse, that they resume, what they say."""

import hashlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run import train as run
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from tests.adapters.test_families import random_lora
from tests.conftest import SHORT
from tests.recipes import ON_PICTURES, SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after

FAST: dict[str, Any] = {**SHORT, "batch": 2, "checkpoint_every": 0, "prior": {"weight": 0}, "trigger": "<zorp>"}
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(autouse=True)
def _draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "before_after", lambda *_: Image.new("RGB", (8, 8)))


@pytest.fixture
def go(base: Base, pictures: Path, tmp_path: Path) -> Any:
    """Trains, each time in a new folder."""
    count = iter(range(99))

    def trained(held: Base = base, **settings: Any) -> Run:
        given = {**FAST, **settings}
        return train(SUBJECT, base=held, images=pictures, output=tmp_path / f"run-{next(count)}", **given)

    return trained


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_plan_sees_another_start_from_the_weight(base: Base, pictures: Path, tmp_path: Path) -> None:
    """As `train` does, by one layer of the base; of one that is loaded and one that is not."""
    settings: dict[str, Any] = {**SHORT, "images": str(pictures), "steps": 1, "prior": {"weight": 0}, "rank": 2}
    first = train(SUBJECT, base=base, output=tmp_path / "run", **settings, options={"init": "pissa"})
    started = {**settings, "init_from": str(first.adapter_file)}
    dg.plan(SUBJECT, **started, options={"init": "pissa"})
    for given in ({}, {"base": base}):
        with pytest.raises(DiffgraftError, match=r"did not start from this base's weights with the same options\.init"):
            dg.plan(SUBJECT, **given, **started, options={"init": "olora"})


# a LoRA beside a grafted student would lie on layers that compute nothing
@pytest.mark.parametrize("method", [name for name in ON_PICTURES if name != "student"])
def test_the_first_loss_is_that_of_the_grafted_file(method: str, go: Any, base: Base, tmp_path: Path) -> None:
    """A first run's file goes on: at its first step the UNet says what it says with the file grafted."""
    text = {} if method in ("hypernetwork", "textual-inversion", "custom") else {"text_encoder": True}
    settings: dict[str, Any] = {"method": method, "lr": 1e-4 if method == "full" else 1e-2, **text}
    first = go(steps=3, **settings)
    file = first.adapter.save(tmp_path / "elsewhere.safetensors", "diffgraft")
    on = go(steps=2, init_from=file, **settings)
    with graft(base, {file: 1.0}):
        # beside the graft a new LoRA does nothing at first
        wanted = go(steps=1, cache=False).metrics[0]["loss"]
    bare = go(steps=1, **({"lr_scale": {"unet": 0}, "method": "pivotal"} if first.adapter.tokens else {}))
    assert on.metrics[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert on.metrics[0]["loss"] != pytest.approx(bare.metrics[0]["loss"], rel=1e-4)
    assert on.adapter.metadata["init_from"] == sha(file)
    assert str(tmp_path) not in str(on.adapter.metadata)
    assert "init_from" not in first.adapter.metadata
    assert set(on.adapter.modules) == set(first.adapter.modules)


def test_ranks_and_scales_are_the_file_s_and_the_header_tells_them(go: Any) -> None:
    first = go(steps=2, rank=3, alpha=1.5)
    with pytest.warns(UserWarning, match=r"56 modules \(e\.g\. .*\) have the rank of adapter\.safetensors instead"):
        on = go(steps=2, rank=8, init_from=first.adapter_file)
    assert {(delta.rank, delta.alpha) for (delta,) in on.adapter.deltas.values()} == {(3, 1.5)}
    assert (on.adapter.metadata["rank"], on.adapter.metadata["alpha"]) == (3, 1.5)
    assert on.adapter.metadata["init_from"] == sha(first.adapter_file)
    same = go(steps=2, rank=3, alpha=9, init_from=first.adapter_file)
    assert same.adapter.metadata["alpha"] == 1.5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mixed = go(steps=1, rank=8, init_from=first.adapter_file, text_encoder=True)
    said = [str(one.message) for one in told]
    assert sum("has no weights for 16 modules (e.g. text_encoder.encoder" in text for text in said) == 1  # once
    assert len(said) == 2
    assert {(delta.rank, delta.alpha) for (delta,) in mixed.adapter.deltas.values()} == {(3, 1.5), (8, 8.0)}
    assert not {"rank", "alpha"} & set(mixed.adapter.metadata)


def test_ranks_of_each_module_are_kept(go: Any, base: Base, tmp_path: Path) -> None:
    """As files have them that were resized by energy."""
    from diffgraft.adapters.lowrank import RankBudget
    from diffgraft.adapters.ops.resize import resize

    first = go(steps=3, lr=1e-2)
    small = resize(first.adapter, RankBudget(energy=0.7)).adapter
    ranks = {path: delta.rank for path, (delta,) in small.deltas.items() if isinstance(delta, FactorDelta)}
    assert len(set(ranks.values())) > 1
    file = small.save(tmp_path / "small.safetensors", "kohya")
    with pytest.warns(UserWarning, match="have the rank of small"):
        on = go(steps=1, lr=1e-5, init_from=file)
    assert {path: delta.rank for path, (delta,) in on.adapter.deltas.items()} == ranks  # type: ignore[attr-defined]
    weight = base.unet.get_submodule(QUERY.removeprefix("unet.")).weight.shape
    kept, now = (adapter.deltas[QUERY][0].delta(tuple(weight)) for adapter in (small, on.adapter))  # type: ignore[attr-defined]
    torch.testing.assert_close(now, kept, rtol=0, atol=1e-3)
    assert not torch.equal(now, kept)


def test_what_is_frozen_goes_on_as_the_file_has_it(go: Any) -> None:
    first = go(steps=2, text_encoder=True)
    on = go(steps=2, text_encoder=True, init_from=first.folder, lr_scale={"text_encoder": 0, "M00": 0})
    assert set(on.adapter.modules) == set(first.adapter.modules)
    for path, (delta,) in on.adapter.deltas.items():
        (before,) = first.adapter.deltas[path]
        same = all(torch.equal(leaf, before.leaves[name]) for name, leaf in delta.leaves.items())
        assert same == path.startswith(("text_encoder.", "unet.mid_block.")), path
    full = go(steps=1, method="full", lr=1e-4)
    again = go(steps=1, method="full", lr=1e-4, init_from=full.adapter_file, lr_scale={"M00": 0})
    for path in ("unet.mid_block.resnets.0.conv1", "unet.conv_in"):
        before, now = (done.adapter.deltas[path][0].leaves["diff"] for done in (full, again))
        assert torch.allclose(before, now, rtol=0, atol=1e-7) == path.startswith("unet.mid_block.")


def lines(path: str, kind: str = "lora", width: int = 128) -> Adapter:
    leaves: Mapping[str, torch.Tensor] = {"lora_down": torch.ones(2, width), "lora_up": torch.ones(128, 2)}
    delta: Delta = low_rank(leaves["lora_down"], leaves["lora_up"])
    if kind == "replacement":
        from diffgraft.adapters.registry import read_delta

        delta = read_delta("replacement", {"weight": torch.ones(128, 128)}, None)
    return Adapter({path: (delta,)}, {"method": kind})


@pytest.mark.parametrize(
    ("made", "settings", "answer"),
    [
        (
            {"method": "loha"},
            {},
            r"Set method=loha, or convert it to a LoRA: diffgraft resize \S+made\.safetensors --rank 8",
        ),
        ({"method": "loha", "layers": "attention"}, {}, r"is a loha, but this run trains a lora\. Set method=loha"),
        ({}, {"method": "lokr"}, r"is a lora, but this run trains a lokr\. Set method=lora\.$"),
        ({"method": "full", "lr": 1e-4}, {}, "Set method=full, or convert it to a LoRA"),
        (
            {"text_encoder": True},
            {},
            r"16 of its 72 modules are not adapted here: text_encoder\..* …\. Set text_encoder=t",
        ),
        ({"layers": "attention+feedforward"}, {}, r"not adapted here: .*\. Set layers=attention\+feedforward\."),
        ({"method": "locon", "text_encoder": True}, {}, r"\. Set text_encoder=true layers=all\."),
        ({"options": {"dora": True}}, {}, r"is a DoRA \(options\.dora=true of lora and locon\)"),
        ({"method": "pivotal"}, {}, r"Set method=pivotal\."),
        ({"method": "pivotal"}, {"method": "textual-inversion"}, r"Set method=pivotal\."),
        ({"method": "custom"}, {}, r"Set method=custom\."),
        ({"method": "textual-inversion"}, {}, r"it holds a word, .*\. Set method=textual-inversion\."),
        ({}, {"method": "textual-inversion"}, r"it holds weights of layers, .*\. Set method=lora\."),
        ({"method": "hypernetwork"}, {"method": "lora"}, r"it holds a network, .*\. Set method=hypernetwork\."),
        (
            {"method": "hypernetwork"},
            {"method": "hypernetwork", "options.structure": "1,3,1"},
            "options.structure=1,2,1",
        ),
        ({"method": "full"}, {"method": "full", "text_encoder": False}, r"is not trained here\. Set text_encoder=true"),
        (
            lines("unet.conv_in"),
            {},
            r"not adapted here: unet\.conv_in\. No value of layers includes all of them",
        ),
        (
            lines("unet.mid_block.convv"),
            {},
            r"This base has no module unet\.mid_block\.convv; the file was made",
        ),
        (lines(QUERY, width=96), {}, "does not fit this base's layer of shape 128 × 128"),
        (lines(QUERY, "replacement"), {}, r"is a replacement.*You can convert it to a LoRA: diffgraft resize"),
    ],
)
def test_what_has_no_place_is_refused_with_what_would_give_it_one(
    made: dict[str, Any] | Adapter,
    settings: dict[str, Any],
    answer: str,
    go: Any,
    tmp_path: Path,
    pictures: Path,
    base: Base,
) -> None:
    file = tmp_path / "made.safetensors"
    (made if isinstance(made, Adapter) else go(steps=1, **made).adapter).save(file, "diffgraft")
    with pytest.raises(DiffgraftError, match=answer):
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "on", init_from=file, **{**FAST, **settings})
    assert not (tmp_path / "on").exists()
    assert not any(module._forward_hooks for module in base.unet.modules())


def test_a_file_that_is_not_there_or_no_adapter_is_told_before_anything_is_written(go: Any, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no", "utf-8")
    for file, answer in (("none.safetensors", "there is no file"), ("text.safetensors", "is not a readable")):
        with pytest.raises(DiffgraftError, match=answer):
            go(init_from=tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.filterwarnings("ignore:.*have the rank of made")
def test_it_resumes_with_equal_bits_and_only_with_the_same_file(
    base: Base, pictures: Path, tmp_path: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of mixed ranks, with a part that is frozen, and words whose lengths are those of the file."""
    settings = {**FAST, "method": "pivotal", "steps": 5, "checkpoint_every": 2, "lr_scale": {"M00": 0}, "lr": 1e-2}
    weights_options = {"weights_options": {"ranks": {"OUT*": 5}}}
    made = go(steps=3, method="pivotal", lr=1e-2, rank=3, options={**weights_options, "keep_norm": False})
    file = tmp_path / "made.safetensors"
    made.adapter.save(file)
    whole = train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", init_from=file, **settings)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        with interrupted_after(3):
            train(SUBJECT, base=base, images=pictures, output=folder, init_from="made.safetensors", **settings)
    kept = file.read_bytes()
    changed = {name: value + 1e-3 for name, value in load_file(file).items()}
    save_file(changed, file, {"format": "pt", "diffgraft": '{"method": "pivotal"}'})
    with pytest.raises(DiffgraftError, match="the file of init_from differs"):
        train(base=base, resume=folder)
    file.unlink()
    with pytest.raises(DiffgraftError, match="there is no file"):
        train(base=base, resume=folder)
    file.write_bytes(kept)
    again = train(base=base, resume=folder)
    assert sha(again.adapter_file) == sha(whole.adapter_file)
    assert list(again.metrics) == list(whole.metrics)
    norms = [done.adapter.tokens["<zorp>"]["text_encoder"].norm() for done in (made, whole)]
    torch.testing.assert_close(norms[1], norms[0])
    file.unlink()
    assert list(train(base=base, resume=folder).metrics) == list(whole.metrics)  # it is finished, and needs no file


def test_a_file_of_kohya_s_for_xl_goes_on_with_what_does_not_reach_the_loss(
    folders: Path, pictures: Path, tmp_path: Path
) -> None:
    """Of the first text encoder the last layer does not, and files have it: it stays as it is."""
    base = load_base(folders / "sdxl")
    adapter = random_lora(base, "attention")
    last = "text_encoder.encoder.layers.1."
    assert any(path.startswith(last) for path in adapter.modules)
    file = adapter.save(tmp_path / "theirs.safetensors", "kohya")
    settings = {**FAST, "steps": 2, "rank": 3, "text_encoder": True, "resolution": 64}
    on = train(SUBJECT, base=base, images=pictures, output=tmp_path / "on", init_from=file, **settings)
    assert set(on.adapter.modules) == set(adapter.modules)
    assert (on.adapter.metadata["rank"], on.adapter.metadata["alpha"]) == (3, 1.5)
    for path, (delta,) in on.adapter.deltas.items():
        (before,) = adapter.deltas[path]
        same = all(torch.equal(leaf, before.leaves[name]) for name, leaf in delta.leaves.items())
        assert same == path.startswith(last), path
    fresh = train(SUBJECT, base=base, images=pictures, output=tmp_path / "fresh", **settings)
    assert not any(path.startswith(last) for path in fresh.adapter.modules)


def test_a_folder_of_peft_s_is_known_by_all_of_its_files(go: Any, tmp_path: Path) -> None:
    first = go(steps=1, text_encoder=True)
    folder = first.adapter.save(tmp_path / "theirs", "peft")
    on = go(steps=1, text_encoder=True, init_from=folder)
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("adapter_*")))).hexdigest()
    assert on.adapter.metadata["init_from"] == whole
    assert len(list(folder.rglob("adapter_*"))) == 4


def test_the_word_of_a_file_may_be_called_otherwise(go: Any) -> None:
    first = go(steps=2, method="textual-inversion", trigger="<other>", lr=1e-2)
    with pytest.warns(UserWarning, match="The token '<other>' of adapter.safetensors is renamed to"):
        on = go(steps=1, method="textual-inversion", init_from=first.adapter_file, lr=1e-9)
    (rows,), (before,) = (next(iter(done.adapter.tokens.values())).values() for done in (on, first))
    torch.testing.assert_close(rows, before)
    assert list(on.adapter.tokens) == ["<zorp>"]


def test_a_file_of_another_base_is_told(go: Any, short_run: Run, tmp_path: Path) -> None:
    made = short_run.adapter
    other = {**made.metadata, "base": {**made.metadata["base"], "hash": "0" * 64, "name": "another"}}
    file = Adapter(made.deltas, other).save(tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match=r"other.safetensors was trained on another base \(another\)"):
        go(steps=1, init_from=file)


def test_the_path_is_no_part_of_what_a_run_is() -> None:
    one, other = (load_recipe(SUBJECT, {"subject": "dog", "init_from": path}) for path in ("a", "b"))
    assert one.fingerprint() == other.fingerprint()
    assert "init_from" not in one.header()


def test_what_was_left_of_an_earlier_checkpoint_is_not_overwritten_by_the_file(
    base: Base, tmp_path: Path, go: Any
) -> None:
    """A run that was cut right after its last step exports what it had learnt."""
    first = go(steps=1)
    whole = go(steps=2, init_from=first.folder, checkpoint_every=1)
    copy = tmp_path / "copy"
    shutil.copytree(whole.folder, copy)
    (copy / "adapter.safetensors").unlink()
    again = train(base=base, resume=copy)
    assert sha(again.adapter_file) == sha(whole.adapter_file)
    before = load_adapter(first.adapter_file)
    assert not torch.equal(again.adapter.deltas[QUERY][0].leaves["lora_up"], before.deltas[QUERY][0].leaves["lora_up"])


def test_a_plan_knows_of_the_file(go: Any, pictures: Path, tmp_path: Path) -> None:
    """Of what trains there is as much as the file has, and what would be refused is refused."""
    first = go(steps=1, rank=3, text_encoder=True)
    settings = {"images": pictures, "subject": "dog", "init_from": first.folder, "prior": {"weight": 0}}
    numbers = sum(leaf.numel() for (delta,) in first.adapter.deltas.values() for leaf in delta.leaves.values())
    with pytest.warns(UserWarning, match="have the rank of"):
        found = plan_run(SUBJECT, {**settings, "text_encoder": True})
    assert f"{numbers:,} parameters" in str(found)
    unet = sum(
        leaf.numel()
        for path, (delta,) in first.adapter.deltas.items()
        for leaf in delta.leaves.values()
        if path.startswith("unet.")
    )
    still = plan_run(SUBJECT, {**settings, "text_encoder": True, "rank": 3, "lr_scale": {"text_encoder": 0}})
    assert f"{unet:,} parameters" in str(still)
    with pytest.raises(DiffgraftError, match="Set text_encoder=true"):
        plan_run(SUBJECT, settings)
    with pytest.raises(DiffgraftError, match="there is no file"):
        plan_run(SUBJECT, {**settings, "init_from": tmp_path / "none.safetensors"})
