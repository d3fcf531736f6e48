"""A base of a kind that nothing was written for trains, draws and resumes; what has no meaning for it is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.rng import normal
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.toy_family import installed, mixer_base
from tests.trainers.interrupt_helpers import interrupted_after

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {**SHORT, "steps": 6, "prior": {"weight": 0}, "previews": False, "sample_prompts": "a dog"}


@pytest.fixture(scope="module")
def mixer() -> Iterator[Base]:
    """The toy family installed, and a base of it."""
    with installed():
        yield mixer_base()


@pytest.mark.parametrize("method", ["lora", "loha", "full"])
def test_it_trains_saves_under_its_own_prefix_and_comes_off_again(
    method: str, mixer: Base, pictures: Path, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in mixer.denoiser.state_dict().items()}
    told = mixer.condition(["a sks dog", "a dog"])
    noisy, times = normal((2, 4, 8, 6), 3), torch.tensor([300, 800])
    with torch.no_grad():
        plain = mixer.denoise(noisy, times, told)
    settings = {**QUICK, "validation": {"share": 0.4, "every": 3, "pairs": 8}, "lr": 5e-3, "text_encoder": False}
    run = dg.train(SUBJECT, base=mixer, images=pictures, output=tmp_path / "run", method=method, **settings)
    assert all(torch.equal(value, before[name]) for name, value in mixer.denoiser.state_dict().items())
    assert {"mixer"} == {key.partition(".")[0].removeprefix("lycoris_") for key in load_file(run.adapter_file)}
    assert {path.partition(".")[0] for path in run.adapter.modules} == {"mixer"}
    assert run.adapter.metadata["base"] == {
        "name": "toy-mixer",
        "family": "mixer",
        "hash": mixer.hash,
        "prediction_type": "flow",
    }
    losses = [entry["validation"] for entry in run.metrics if "validation" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    with dg.graft(mixer, run.adapter), torch.no_grad():
        assert not torch.allclose(mixer.denoise(noisy, times, told), plain, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(mixer.denoise(noisy, times, told), plain)


def test_its_loss_is_that_of_flow_matching(mixer: Base) -> None:
    """The first loss of a run, made anew in float64 from σ, noise and latents."""
    from diffgraft.trainers.denoiser import forward_process

    process = forward_process(mixer)
    latents = normal((3, 4, 8, 6), 1)
    noised = process.at_places(latents, [(7, place, 0) for place in range(3)])
    noise = torch.stack([normal((4, 8, 6), 7, place, 0, 2) for place in range(3)]).double().numpy()
    even = (noised.timesteps.numpy() + 1) / 1000
    sigma = (3 * even / (1 + 2 * even))[:, None, None, None]
    x = latents.double().numpy()
    np.testing.assert_allclose(noised.noisy.numpy(), (1 - sigma) * x + sigma * noise, atol=1e-5)
    np.testing.assert_allclose(noised.target.numpy(), noise - x, atol=1e-5)


def test_it_is_planned_sampled_and_resumed_to_the_same_bytes(mixer: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "previews": True, "sample_every": 4, "gradient_checkpointing": True}
    plan = str(dg.plan(SUBJECT, base=mixer, images=pictures, **{**settings, "output": str(tmp_path / "planned")}))
    assert "(mixer, 64 px)" in plan
    assert re.search(r"predicts +flow", plan)
    whole = dg.train(SUBJECT, base=mixer, images=pictures, output=tmp_path / "whole", **settings)
    assert whole.before_after.exists()
    assert (whole.folder / "samples" / "step-000004.png").exists()
    with interrupted_after(4):
        dg.train(SUBJECT, base=mixer, images=pictures, output=tmp_path / "cut", **settings)
    again = dg.train(base=mixer, resume=tmp_path / "cut")
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    assert (again.folder / "samples" / "step-000004.png").exists()


def test_class_images_are_drawn_by_it(mixer: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 2, "prior": {"images": 2}, "batch": 2}
    run = dg.train(SUBJECT, base=mixer, images=pictures, output=tmp_path / "run", **settings)
    assert run.metrics[0]["prior"] > 0


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"attention": "sliced"}, r"attention=sliced has no meaning for bases of the family mixer: its attention"),
        ({"channels_last": True}, "channels_last=True has no meaning .* no convolutions"),
        ({"zero_snr": True}, "zero_snr=True has no meaning|zero_snr=True"),
        ({"prediction_type": "epsilon"}, "prediction_type=epsilon"),
        ({"loss": {"snr_gamma": 5}}, r"loss.snr_gamma=5.0 has no meaning .* undefined for flow matching"),
        ({"loss": {"debiased": True}}, r"loss.debiased=True has no meaning .* undefined for flow matching"),
        ({"loss": {"kind": "huber", "schedule": "snr"}}, r"loss.schedule=snr is undefined for flow matching"),
        ({"lr_scale": {"OUT00": 0.5}}, r"lr_scale.OUT00"),
        ({"method": "hypernetwork"}, "cross-attention"),
        ({"format": "kohya"}, "kohya"),
    ],
    ids=str,
)
def test_what_has_no_meaning_for_it_is_refused_by_name(
    setting: dict[str, Any], why: str, mixer: Base, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffgraftError, match=why):
        dg.train(SUBJECT, base=mixer, images=pictures, output=tmp_path / "run", **{**QUICK, **setting})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_outside_the_bases_nothing_assumes_an_architecture() -> None:
    """Kinds of denoisers, second text encoders and predictions are named in bases, formats and recipes alone."""
    forbidden = re.compile(r"\"unet\"|'unet'|\"transformer\"|'transformer'|text_encoder_2|prediction_type")
    # headers of files are read in training_metadata without the formats, whose import takes a second
    headers, other_tools = "adapters/training_metadata.py", "diffgraft/imports/"
    webui_tags = "diffgraft/generation/grammar/tags.py"  # webui writes <lora:name:unet=1>, whatever the denoiser
    allowed = (
        "diffgraft/bases/",
        "adapters/formats/",
        "trainers/recipe/",
        "recipes/",
        headers,
        other_tools,
        webui_tags,
    )
    found = []
    for folder in ("adapters", "trainers", "diffgraft"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name.startswith((*allowed, "diffgraft/adapters/", "diffgraft/trainers/")):
                continue
            lines = file.read_text("utf-8").splitlines()
            found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if forbidden.search(line)]
    assert found == []
