"""Health of adapters: figures against numpy's singular values, and planted dead and saturated modules."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.ops.health import health, rank_that_keeps
from diffgraft.adapters.ops.resize import resize
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.weights import open_weights
from diffgraft.cli.main import app
from diffgraft.errors import DiffgraftError

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.encoder.layers.1.self_attn.q_proj"


def shape_of(path: str) -> tuple[int, ...]:
    with open_weights("tiny") as weights:
        return weights.shapes()[path]


def lora(path: str, rank: int, seed: int, scale: float = 1.0, decay: float = 1.0) -> Delta:
    """A LoRA with singular values that fall by a factor."""
    rows, columns = shape_of(path)
    rng = np.random.default_rng(seed)
    up, down = np.linalg.qr(rng.normal(size=(rows, rank)))[0], np.linalg.qr(rng.normal(size=(columns, rank)))[0].T
    values = scale * decay ** np.arange(rank)
    leaves = {"lora_up": torch.tensor(up * values).float(), "lora_down": torch.tensor(down).float()}
    return read_delta("lora", leaves, float(rank))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    deltas = {Q: (lora(Q, 6, 1, decay=0.4),), UP: (lora(UP, 6, 2, scale=0.5),), TEXT: (lora(TEXT, 4, 3, scale=1e-6),)}
    return Adapter(deltas, {"method": "lora", "base": {"name": "tiny", "family": "sd1"}})


def test_figures_are_those_of_numpy(adapter: Adapter) -> None:
    with open_weights("tiny") as weights:
        report = health(adapter, weights)
        for module in report.modules:
            matrix = adapter.deltas[module.path][0].delta(shape_of(module.path)).double().numpy()  # type: ignore[attr-defined]
            weight = weights[f"{module.path}.weight"].double().numpy()
            squares = np.linalg.svd(matrix, compute_uv=False) ** 2
            shares = squares[squares > 0] / squares.sum()
            assert module.norm == pytest.approx(math.sqrt(squares.sum()), rel=1e-5)
            assert module.relative == pytest.approx(math.sqrt(squares.sum()) / np.linalg.norm(weight), rel=1e-4)
            assert module.effective_rank == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-3)
    assert [block.name for block in report.blocks] == ["M00", report.blocks[1].name, "text_encoder.encoder.layers.1"]
    assert report.blocks[1].name.startswith("OUT")
    assert [block.modules for block in report.blocks] == [1, 1, 1]
    assert report.blocks[0].relative == pytest.approx(report.modules[0].relative)


def test_dead_and_saturated_modules_are_named(adapter: Adapter) -> None:
    report = health(adapter)
    assert report.dead == [TEXT]
    assert report.saturated == [UP, TEXT]
    assert all(module.relative is None for module in report.modules)
    text = "\n".join(report.lines())
    assert f"dead: 1 modules do nothing, or next to nothing beside the others (e.g. {TEXT})" in text
    assert f"saturated: 2 modules use their whole rank: a larger rank might hold more (e.g. {UP})" in text


def test_the_suggested_rank_keeps_what_it_says(adapter: Adapter) -> None:
    few = Adapter({Q: adapter.deltas[Q]}, adapter.metadata)
    report = health(few)
    assert (report.suggested_rank, report.largest_rank) == (3, 6)  # 1, 0.16, 0.0256: three keep 99.6 %, two 97.4 %
    for rank, is_enough in ((3, True), (2, False)):
        error = resize(few, RankBudget(rank)).errors[Q]
        assert (1 - error**2 >= 0.99) == is_enough
    assert "rank 3 of 6 keeps 99 % of the change: diffgraft resize FILE NEW --rank 3" in report.lines()[-1]
    assert rank_that_keeps([torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0, 1.0])], 0.9) == 2
    assert rank_that_keeps([torch.zeros(3)], 0.99) == 0
    assert health(adapter).suggested_rank == 6


def test_changes_that_depend_on_weights_need_the_base() -> None:
    rows, _ = shape_of(Q)
    scaled = read_delta("ia3", {"weight": torch.full((rows,), 0.5)}, None)
    adapter = Adapter({Q: (scaled,), UP: (lora(UP, 2, 5),)}, {"base": {"family": "sd1"}})
    report = health(adapter)
    assert report.unknown == [Q]
    assert "name it with --base" in "\n".join(report.lines())
    with open_weights("tiny") as weights:
        report = health(adapter, weights)
    assert report.unknown == []
    assert report.modules[0].relative == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(DiffgraftError, match="changes no weights"):
        health(Adapter({}, {}))


def test_the_command_reports_health(adapter: Adapter, tmp_path: Path) -> None:
    file = adapter.save(tmp_path / "dog.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(file), "--health", "--base", "tiny"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[1].startswith("M00")
    assert " %" in shown.output.splitlines()[1]
    report = json.loads(CliRunner().invoke(app, ["inspect", str(file), "--health", "--json"]).output)
    assert report["dead"] == [TEXT]
    assert CliRunner().invoke(app, ["inspect", str(file), "--base", "tiny"]).exit_code != 0
