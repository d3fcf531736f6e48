"""Alignment by a CLIP: the loss against float64, resumed runs, and what is refused before anything is written."""

import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases import Base, SizeConditioning
from diffgraft.bases.clip import TINY_CLIP, load_clip
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.align import OBJECTIVE, AlignOptions, decoded
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import check_objective, check_objective_for, new_objective
from diffgraft.trainers.planning import plan
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.run.train import train
from tests.trainers.test_objectives import CPU, examples

SIGNAL, PRIOR, SHARE, WEIGHT = 0.4, 3.0, 0.2, 0.5
SHORT = {"steps": 4, "batch": 3, "lr": 5e-3, "warmup": 0, "checkpoint_every": 2, "lr_schedule": "constant"}


def predicting(factor: Any) -> Any:
    """A denoiser that is known in closed form."""

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning]) -> Tensor:
        assert len(prompts) == len(frames) == len(noisy) == len(times)
        prediction: Tensor = factor * noisy + times.to(noisy).view(-1, 1, 1, 1) / 1000
        return prediction

    return predict


def expected(base: Base, batch: Any, factor: Tensor) -> tuple[Tensor, int]:
    """The loss in float64, by diffusers' and transformers' own functions, and the number of samples it judges."""
    clip = load_clip("tiny")
    vae, model = deepcopy(base.vae).double(), deepcopy(clip.model).double()
    schedule = base.scheduler.alphas_cumprod.double()
    total, judged = torch.zeros((), dtype=torch.float64), 0
    for row, time in enumerate(batch.times.tolist()):
        noisy = batch.noisy[row : row + 1].double()
        prediction = factor * noisy + time / 1000
        loss = PRIOR * (prediction - (SHARE * noisy + time / 1000)).square().mean()
        if schedule[time] >= SIGNAL:
            judged += 1
            x0 = schedule[time].sqrt() * noisy - (1 - schedule[time]).sqrt() * prediction  # tiny predicts v
            pixels = vae.decode(x0 / vae.config.scaling_factor).sample.clamp(-1, 1)
            assert pixels.shape == (1, 3, 24, 20)
            pixels = F.interpolate(pixels, (77, 64), mode="bicubic", antialias=True)[:, :, 6:70]
            ids = clip.tokenizer(batch.prompts[row], return_tensors="pt").input_ids
            both = model(input_ids=ids, pixel_values=pixels)  # the tiny CLIP takes pixels from -1 to 1
            loss = loss + 1 - both.logits_per_image[0, 0] / model.logit_scale.exp()
        total = total + WEIGHT * loss / len(batch.times)
    return total, judged


def test_the_loss_and_its_gradient_are_the_formula(base: Base) -> None:
    stream = SampleStream(examples(5, 1, weight=WEIGHT), forward_process(base), 9, CPU)
    options = {"clip": "tiny", "prior": PRIOR, "signal": SIGNAL}
    given = ObjectiveInputs(stream, None, 0.0, predicting(SHARE), base=base)
    objective = new_objective("align", given, options)
    factor = torch.tensor(0.3, requires_grad=True)
    found = objective.losses(predicting(factor), 20, 6)
    found["loss"].backward()
    exact = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    total, judged = expected(base, stream.batch(20, 6), exact)
    total.backward()  # type: ignore[no-untyped-call]
    assert 0 < judged < 6, "both kinds of samples are to occur"
    assert factor.grad is not None
    assert exact.grad is not None
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert factor.grad.item() == pytest.approx(exact.grad.item(), rel=1e-5)
    mean = WEIGHT * (found["distance"] * judged / 6 + PRIOR * found["drift"])
    assert mean.item() == pytest.approx(total.item(), rel=1e-5)
    assert objective.picture_names(20, 6) == stream.picture_names(20, 6)


def test_noisier_samples_have_the_distance_from_the_base_alone(base: Base) -> None:
    stream = SampleStream(examples(5, 1), forward_process(base), 9, CPU)
    given = ObjectiveInputs(stream, None, 0.0, predicting(SHARE), base=base)
    objective = new_objective("align", given, {"clip": "tiny", "prior": PRIOR, "signal": 0.9999})
    found = objective.losses(predicting(torch.tensor(0.3, requires_grad=True)), 20, 4)
    assert found["distance"].item() == 0
    assert found["loss"].item() == pytest.approx(PRIOR * found["drift"].item())
    found["loss"].backward()  # samples without a judged picture train as well


def test_decoding_with_gradients_gives_the_picture_and_leaves_the_vae_as_it_was(base: Base) -> None:
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    pictures = decoded(base, latents)
    assert pictures.shape == (2, 3, 32, 48)
    with torch.no_grad():
        plain = base.vae.decode(latents / base.latents.scale).sample
    torch.testing.assert_close(pictures, (plain / 2 + 0.5).clamp(0, 1))
    (slope,) = torch.autograd.grad(pictures.sum(), latents)
    assert slope.abs().sum() > 0
    assert not base.vae.decoder.gradient_checkpointing
    assert not base.vae.training


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_stopped_run_goes_on_to_the_same_bytes(method: str, base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {"images": str(pictures), "method": method, **SHORT}
    whole = train("align", base=base, output=tmp_path / "whole", **settings)
    train("align", base=base, output=tmp_path / "halves", **{**settings, "steps": 2})
    resumed = train(resume=tmp_path / "halves", base=base, steps=4)
    assert resumed.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    assert {"loss", "distance", "drift"} <= set(whole.metrics[0])
    assert whole.metrics[0]["drift"] == pytest.approx(0, abs=1e-10), "the adapter begins as the base"
    assert whole.metrics[-1]["drift"] > 0


def test_a_plan_counts_the_vae_and_the_clip(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"images": str(pictures)}
    aligned = plan_run("align", settings)
    without = replace(OBJECTIVE, uses_vae=False, own_bytes=lambda _: 0)
    monkeypatch.setattr(plan, "objectives", lambda: {"align": without})
    plain = plan_run("align", settings)
    assert dict(plain.facts)["memory"] != dict(aligned.facts)["memory"]
    assert any("not their activations" in text for text in aligned.pitfalls)
    assert not any("not their activations" in text for text in plain.pitfalls)


def test_empty_prompts_are_refused(base: Base, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for settings, answer in (
        ({"prompt": " ", "images": str(pictures)}, r"the prompt of .*1\.png, .* is empty: add captions, or set prompt"),
        ({"prompt": ""}, "the prompt of the pictures that are drawn is empty"),
        ({"caption_dropout": 0.1}, r"of which caption_dropout=0\.1 empties a share: set caption_dropout=0"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            plan_run("align", settings)
        with pytest.raises(DiffgraftError, match=answer):
            train("align", base=base, output=output, **settings)
    assert not output.exists()


def test_a_run_goes_on_with_the_same_clip_alone(base: Base, pictures: Path, tmp_path: Path) -> None:
    """Its weights count, not the folder that they are in."""
    clip, kept = tmp_path / "clip", tmp_path / "kept"
    for folder in (clip, kept):
        shutil.copytree(TINY_CLIP, folder)
    settings = {"images": str(pictures), **SHORT, "steps": 2, "loss.options.clip": str(clip)}
    train("align", base=base, output=tmp_path / "run", **settings)
    tensors = load_file(clip / "model.safetensors")
    tensors["visual_projection.weight"] *= 1.5
    save_file(tensors, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(DiffgraftError, match=r"the network that loss\.objective judges by differs"):
        train(resume=tmp_path / "run", base=base, steps=3)
    shutil.rmtree(clip)
    kept.rename(clip)
    assert len(train(resume=tmp_path / "run", base=base, steps=3).metrics) == 3


def test_what_cannot_be_aligned_is_refused(base: Base, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match=r"Invalid value loss\.options\.prior=0"):
        check_objective("align", {"prior": 0})
    with pytest.raises(DiffgraftError, match="has no config"):
        train("align", base=base, images=pictures, output=tmp_path / "run", **{"loss.options.clip": str(tmp_path)})
    assert not (tmp_path / "run").exists()
    other = deepcopy(base)
    other.vae = torch.nn.Identity()
    with pytest.raises(DiffgraftError, match="align has no meaning for bases of the family sd1"):
        check_objective_for("align", AlignOptions(clip="tiny").model_dump(), other)
