"""The bases at their real sizes, with random weights: every method, from the single file to the graft and back."""

import resource
from pathlib import Path

import pytest
import torch

import diffgraft as dg
from benchmarks.file_work import on_adapters, on_checkpoints
from benchmarks.scale import SIZES, Loaded, Row, measure, random_file
from tests.flow_bases import wide_klein
from tests.recipes import ON_PICTURES

PARAMETERS = {"sd1": 1_066_235_307, "sd2": 1_289_952_427, "sdxl": 3_468_837_867}
"""Of UNet, text encoders and VAE; the published models have as many"""
GIGABYTES = 22.0
"""The most that any of it may take; what each takes stands in benchmarks/results/scale.md"""


@pytest.mark.scale
@pytest.mark.parametrize("family", SIZES)
def test_every_method_at_the_real_size(family: str, tmp_path: Path) -> None:
    loaded, *rows = measure(family, random_file(family, tmp_path))
    assert isinstance(loaded, Loaded)
    assert loaded.parameters == PARAMETERS[family]
    assert loaded.gigabytes < GIGABYTES
    assert {row.method for row in rows if isinstance(row, Row)} == set(ON_PICTURES)
    for row in rows:
        assert isinstance(row, Row)
        # rounding: weights in bfloat16 have eight bits
        assert row.off < (1e-4 if family != "sdxl" else 0.05), row
        assert row.changed > 10 * row.off, row
        assert row.restored, row
        assert row.gigabytes < GIGABYTES, row


SECONDS = 60
"""For each; on two cores with nothing else to do most takes a few seconds, as benchmarks/results/file-work.md has it"""


@pytest.mark.scale
def test_work_on_files_of_real_sizes(tmp_path: Path) -> None:
    jobs = []
    for family in ("sd1", "sdxl"):
        (tmp_path / family).mkdir()
        jobs += on_adapters(family, tmp_path / family)
    jobs += on_checkpoints(tmp_path)
    assert len(jobs) == 9 + 9 + 4
    assert all(job.seconds < SECONDS for job in jobs), jobs


@pytest.mark.scale
def test_a_step_of_flux2_klein_at_its_real_widths(pictures: Path, tmp_path: Path) -> None:
    """The 4B model in nf4, with one of its 5 double, two of its 20 single blocks, and 4 of the 36 layers of Qwen3."""
    wide_klein(tmp_path / "klein", 2)
    base = dg.load_base(tmp_path / "klein", torch.bfloat16, quantize="nf4")
    settings = {"subject": "dog", "resolution": 256, "steps": 1, "quantize": "nf4", "previews": False}
    settings |= {"sample_every": 0, "optimizer": "adamw"}
    run = dg.train("klein-subject", base=base, images=pictures, output=tmp_path / "run", **settings)
    assert 0 < run.metrics[0]["loss"] < 10
    assert len(run.adapter.modules) == 12 + 2 * 2
    down = run.adapter.deltas["transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj"][0].leaves["lora_down"]
    assert down.shape == (32, 3072)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < GIGABYTES * 1e9
