"""Validation: the held-out loss is a formula of picture, timestep and noise; patience and the best are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.subject import POODLE
from diffgraft.generation.graft import graft
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.hooks.validation import BestTracker, held_out
from diffgraft.trainers.hooks.validation_set import validation_set_from_images
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from tests.conftest import SHORT
from tests.recipes import SUBJECT

CPU = torch.device("cpu")


def test_the_loss_is_the_mean_over_pairs(base: Base, pictures: Path) -> None:
    plan = load_recipe(
        SUBJECT,
        {
            "images": str(pictures),
            "subject": "dog",
            "prior": {"weight": 0},
            "validation": {"images": str(POODLE.folder / "held-out"), "pairs": 16},
        },
    )
    aside = build_training_data(plan.data, plan.validation, plan.seed, base, read_concepts(plan)[1]).held_out
    assert aside is not None
    held = held_out(forward_process(base), aside, plan.validation.pairs)
    ((validation_set, prompts, _),) = held.groups
    assert set(prompts) == {"a sks dog"}
    asked = []

    def predict(noisy: Tensor, times: Tensor, words: Any, cuts: Any) -> Tensor:
        asked.append((noisy, times))
        assert len(words) == len(cuts) == len(noisy)
        return 0.5 * noisy + (times / 1000).view(-1, 1, 1, 1)

    found = held.loss(predict, CPU)
    noisy, times = torch.cat([one for one, _ in asked]), torch.cat([one for _, one in asked])
    wanted = ((0.5 * noisy + (times / 1000).view(-1, 1, 1, 1) - validation_set.target).double().numpy() ** 2).mean()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sorted((times * 16 // 1000).tolist()) == list(range(16))
    images = [one.image for one in read_folder(POODLE.folder / "held-out")]
    other = validation_set_from_images(base, images, pairs=16)
    torch.testing.assert_close(other.noisy, validation_set.noisy, atol=1e-4, rtol=1e-4)
    assert held.loss(Denoiser(base), CPU) == pytest.approx(other.loss(base, "a sks dog"), rel=1e-4)


def test_patience_ends_a_run_and_the_best_is_kept(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.2])
    monkeypatch.setattr("diffgraft.trainers.hooks.validation.HeldOut.loss", lambda *_: next(losses))
    settings: dict[str, Any] = {**SHORT, "steps": 20, "prior": {"weight": 0}, "sample_prompts": "a dog"}
    validation = {"share": 0.2, "every": 2, "patience": 2}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", validation=validation, **settings)
    assert len(run.metrics) == 8
    assert [entry.get("validation") for entry in run.metrics[1::2]] == pytest.approx([0.5, 0.3, 0.4, 0.35])
    best = load_adapter(run.folder / "best.safetensors")
    shorter = train(
        SUBJECT, base=base, images=pictures, output=tmp_path / "four",
        **{**settings, "steps": 4, "validation": {"share": 0.2, "every": 50}},
    )  # fmt: skip
    for path, deltas in shorter.adapter.deltas.items():
        for name, leaf in deltas[0].leaves.items():
            assert torch.equal(best.deltas[path][0].leaves[name], leaf)
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())][-1] == "step-000008"
    run.adapter_file.unlink()
    again = train(base=base, resume=run.folder)  # it is not taken up again where it had ended
    assert len(again.metrics) == 8


def test_a_validation_that_was_interrupted_is_made_up_for(base: Base, pictures: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {**SHORT, "images": pictures, "steps": 4, "prior": {"weight": 0}, "sample_prompts": "a dog"}
    given |= {"validation": {"share": 0.2, "every": 2, "pairs": 4}}
    whole = train(SUBJECT, base=base, output=tmp_path / "whole", **given)

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffgraft.trainers.hooks.validation.HeldOut.loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(SUBJECT, base=base, output=tmp_path / "cut", **given)
    again = train(base=base, resume=tmp_path / "cut")
    assert sum("validation" in entry for entry in whole.metrics) == 2
    for name in ("metrics.jsonl", "adapter.safetensors", "best.safetensors"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_the_best_is_the_least_and_ties_are_no_gain() -> None:
    best = BestTracker()
    assert [best.update(step, loss) for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0])] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (best.step, best.loss, best.since) == (4, 1.0, 0)


@pytest.mark.parametrize("method", ["lora", "loha", "full", "hypernetwork", "pivotal", "custom"])
def test_bare_is_the_base_without_the_adapter(base: Base, method: str) -> None:
    from diffgraft.trainers.run.attach import attach

    trigger = {"trigger": "<zorp>"} if method in ("pivotal", "custom") else {}
    plan = load_recipe(SUBJECT, {"subject": "dog", "method": method, **trigger})
    noisy, times, prompts = torch.randn(2, 4, 16, 12), torch.tensor([90, 700]), ["a dog", "a cat"]
    with torch.no_grad():
        wanted = Denoiser(base)(noisy, times, prompts)
        live = attach(plan, base)
        try:
            for value in live.trainable().values():
                value.add_(0.02 * torch.randn_like(value))
            denoiser = Denoiser(base, live, text_is_trained=True)
            assert (denoiser(noisy, times, prompts) - wanted).abs().max() > 1e-3
            with live.disabled():
                assert torch.equal(denoiser(noisy, times, prompts), wanted)
            assert (denoiser(noisy, times, prompts) - wanted).abs().max() > 1e-3
        finally:
            live.detach()


def test_prior_preservation_by_prediction_is_its_formula(base: Base, pictures: Path, tmp_path: Path) -> None:
    """In the first step the adapter is nothing, and so is the second term; then it holds the class where it was."""
    settings: dict[str, Any] = {**SHORT, "steps": 30, "lr": 3e-3, "sample_prompts": "a dog", "checkpoint_every": 0}
    runs = {}
    for weight in (0.0, 20.0):
        prior = {"weight": weight, "by": "prediction"}
        output = tmp_path / str(weight)
        runs[weight] = train(SUBJECT, base=base, images=pictures, output=output, **{**settings, "prior": prior})
    first, last = runs[20.0].metrics[0], runs[20.0].metrics[-1]
    assert first["prior"] < 1e-10
    assert last["prior"] > 1e-6
    for entry in runs[20.0].metrics:
        assert entry["loss"] == pytest.approx(entry["instance"] + 20 * entry["prior"], rel=1e-5)
    assert "prior" not in runs[0.0].metrics[0]
    validation_set = validation_set_from_images(base, [one.image for one in read_folder(pictures)], pairs=32)
    before = validation_set.predict(base, "a dog")
    moved = {}
    for weight, run in runs.items():
        with graft(base, {run.adapter: 1.0}):
            moved[weight] = validation_set.prediction_drift(before, base, "a dog")
    assert moved[20.0] < 0.3 * moved[0.0]
    assert not (tmp_path / "class-images").exists()
    assert np.isfinite(list(moved.values())).all()


def test_the_forward_process_of_validation_is_plain(base: Base) -> None:
    """Whatever the recipe's noise is: losses of different recipes can be compared."""
    assert forward_process(base)._noise.offset == 0
