"""Every method that a flow-matching transformer can have, on a small base of every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffgraft as dg
from diffgraft.adapters.registry import methods
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.rng import normal
from tests.conftest import FLOW_FAMILIES, SHORT, flow_folder_of
from tests.recipes import ON_PICTURES, SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after

QUICK: dict[str, Any] = {
    **SHORT,
    "steps": 3,
    "checkpoint_every": 2,
    "resolution": 32,
    "batch": 1,
    "prior": {"weight": 0},
    "previews": False,
    "sample_every": 0,
    "sample_prompts": "a dog",
    "text_encoder": False,
    "lr": 1e-2,
}
OF_UNETS = ("custom", "hypernetwork", "student")
"""Methods that change cross-attentions, which these transformers do not have, or build smaller UNets"""
WORDS = {"textual-inversion": "<sks>", "pivotal": "<sks>"}
METHODS = [name for name in ON_PICTURES if name not in OF_UNETS]


def settings(method: str, **more: Any) -> dict[str, Any]:
    word = {"trigger": WORDS[method]} if method in WORDS else {}
    return {**QUICK, "method": method, **word, **more}


def prediction(base: Base, prompt: str) -> Tensor:
    side = 32 // base.vae_scale_factor
    noisy = normal((2, base.latents.channels, side, side + 2 * base.family.patch), 3)
    with torch.no_grad():
        return base.denoise(noisy, torch.tensor([300, 900]), base.condition([prompt, "a cat"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_to_the_same_bytes_and_comes_off_again(
    method: str, flow_base: Base, pictures: Path, tmp_path: Path
) -> None:
    """By one method on each family, and by each on one: a checkpoint holds parameters, whatever their names are."""
    prompt = f"a {WORDS.get(method, 'sks')} dog"
    plain = prediction(flow_base, prompt)
    whole = dg.train(SUBJECT, base=flow_base, images=pictures, output=tmp_path / "whole", **settings(method))
    if method == "lora" or flow_base.family.name == FLOW_FAMILIES[0]:
        with interrupted_after(2):
            dg.train(SUBJECT, base=flow_base, images=pictures, output=tmp_path / "cut", **settings(method))
        again = dg.train(base=flow_base, resume=tmp_path / "cut")
        assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    losses = [entry["loss"] for entry in whole.metrics]
    assert len(set(losses)) == 3
    assert max(losses) < 20
    loaded = dg.load_adapter(whole.adapter_file)
    assert loaded.metadata["base"]["family"] == flow_base.family.name
    with dg.graft(flow_base, {whole.adapter_file: 0.7}):
        changed = prediction(flow_base, prompt)
    assert (changed - plain).abs().max() > 1e-5
    assert torch.equal(prediction(flow_base, prompt), plain)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_trains_as_the_plain_one_nearly_does(
    quantize: Any, flow_base: Base, pictures: Path, tmp_path: Path
) -> None:
    base = dg.load_base(flow_base.name, quantize=quantize)
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    losses = {}
    for kind, own in (("plain", flow_base), ("quantized", base)):
        more = {"quantize": "none" if own is flow_base else quantize}
        run = dg.train(SUBJECT, base=own, images=pictures, output=tmp_path / kind, **settings("loha", **more))
        losses[kind] = [entry["loss"] for entry in run.metrics]
    assert losses["quantized"] == pytest.approx(losses["plain"], rel=0.15)
    assert losses["quantized"] != losses["plain"]
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


def test_gradient_checkpointing_changes_no_loss(flow_base: Base, pictures: Path, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        more = settings("lora", gradient_checkpointing=checkpointing)
        run = dg.train(SUBJECT, base=flow_base, images=pictures, output=tmp_path / str(checkpointing), **more)
        losses.append([entry["loss"] for entry in run.metrics])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "locon"])
def test_diffusers_opens_the_file(method: str, flow_base: Base, pictures: Path, tmp_path: Path) -> None:
    """LoRA on attention, and on all layers, by the pipeline's own loader: the predictions are the same."""
    run = dg.train(
        SUBJECT, base=flow_base, images=pictures, output=tmp_path / "run", format="diffusers", **settings(method)
    )
    with dg.graft(flow_base, run.adapter_file):
        ours = prediction(flow_base, "a sks dog")
    base = dg.load_base(flow_base.name)
    pipe = base.pipeline()
    pipe.load_lora_weights(run.folder, weight_name=run.adapter_file.name)
    try:
        torch.testing.assert_close(prediction(base, "a sks dog"), ours, rtol=1e-4, atol=1e-5)
    finally:
        pipe.unload_lora_weights()


def test_the_text_encoder_trains_where_it_is_read(flow_base: Base, pictures: Path, tmp_path: Path) -> None:
    run = dg.train(
        SUBJECT, base=flow_base, images=pictures, output=tmp_path / "run", **settings("lora", text_encoder=True)
    )
    trained = {path for path in run.adapter.modules if path.startswith("text_encoder")}
    assert trained
    for path in trained:
        part, _, inside = path.partition(".")
        assert flow_base.family.affects_output(flow_base, part, inside), path
    assert {path.partition(".")[0] for path in trained} == set(flow_base.text_encoders())


def test_what_a_run_needs_is_planned(flow_base: Base, pictures: Path, tmp_path: Path) -> None:
    plan = str(dg.plan(SUBJECT, base=flow_base, images=pictures, output=tmp_path / "run", **settings("lora")))
    assert f"({flow_base.family.name}, 32 px)" in plan
    assert "predicts  flow" in plan


def test_every_family_and_method_is_in_these_tests() -> None:
    assert len(FLOW_FAMILIES) >= 5
    needs_conditions = {name for name, method in methods().items() if method.needs_conditions}
    assert set(METHODS) | set(OF_UNETS) | needs_conditions == set(methods())


def test_a_base_that_is_named_is_planned_and_drawn_with(
    flow_base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line does, which plans from the headers of the files alone."""
    plan = str(dg.plan(SUBJECT, base=flow_base.name, images=pictures, output=tmp_path / "run", **settings("lora")))
    assert f"({flow_base.family.name}, 32 px)" in plan
    more = settings("lora", loss={"objective": "align", "options": {"clip": "tiny"}})
    try:
        assert "decoder of the VAE" in str(
            dg.plan(SUBJECT, base=flow_base.name, images=pictures, output=tmp_path / "run", **more)
        )
    except DiffgraftError as error:
        assert "align has no meaning" in str(error)  # noqa: PT017  (an autoencoder without gradient checkpointing)
    monkeypatch.chdir(tmp_path)
    (picture,) = dg.generate("a dog", base=flow_base.name, size=(32, 64), steps=2)
    assert picture.size == (32, 64)


@pytest.mark.parametrize(
    ("prompt", "options", "why"),
    [
        ("a (dog:1.3)", {}, "no weights of words and no chunks: write the prompt without parentheses"),
        ("a dog", {"negative": "(bad:1.4)"}, "no weights of words"),
        ("a dog BREAK a cat", {}, "no weights of words"),
        ("a dog", {"clip_skip": 2}, "clip_skip has no meaning for bases of the family"),
        ("a dog", {"zero_snr": True}, "zero_snr=True has no meaning for this base: it predicts the flow"),
        ("a dog", {"prediction_type": "epsilon"}, "prediction_type=epsilon has no meaning for this base"),
        ("a dog", {"embedded_guidance": 9.0}, "embedded_guidance=9 has no meaning for this base"),
        ("a dog", {"size": (33, 48)}, "sides must be multiples of"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_with_is_said(prompt: str, options: dict[str, Any], why: str, klein_folder: Path) -> None:
    with pytest.raises(DiffgraftError, match=why):
        dg.generate(prompt, base=klein_folder, **{"size": (32, 48), "steps": 2, **options})


@pytest.fixture(scope="module")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base of FLUX.2 klein."""
    return flow_folder_of("flux2-klein", tmp_path_factory)
