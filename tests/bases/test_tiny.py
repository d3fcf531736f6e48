"""The embedded base is as good as its card says: the autoencoder, the judge, and what is drawn from words."""

import torch

from benchmarks.tiny_base import prompts_and_scenes, psnr, through_vae, verdicts, wilson
from diffgraft.bases import Base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.bases.tiny.train.pictures import UNSEEN, scene_at
from diffgraft.bases.tiny.world import draw
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from tests.drawing import generate

FROZEN = "79920fa381b0f52778622a02319eeaaac9eb1e26ff5516d1c9e917031af08b8f"
"""`Base.hash` of the weights that ship. Numbers elsewhere depend on it: it changes with a release, not by accident."""


def test_the_weights_are_those_that_were_frozen(base: Base) -> None:
    assert base.hash == FROZEN


def test_the_weights_are_small_and_cannot_run_code() -> None:
    files = [file for file in TINY.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") <= 25_000_000


def test_the_schedule_ends_in_pure_noise(base: Base) -> None:
    assert base.prediction_type == "v_prediction"
    assert float(base.scheduler.alphas_cumprod[-1]) < 1e-6


def test_judge_and_autoencoder_on_pictures_never_seen(base: Base) -> None:
    scenes = [scene_at(UNSEEN + 5000 + number) for number in range(500)]
    x = to_tensor([draw(scene)[0] for scene in scenes])
    right = verdicts(load_judge(TINY / "judge"), x, scenes)
    assert right["thing"].float().mean() > 0.97
    assert right["setting"].float().mean() > 0.97
    assert right["style"].float().mean() > 0.97
    assert psnr(x[:128], through_vae(base.vae, x[:128])).mean() > 28


def test_pictures_show_what_the_words_say(base: Base) -> None:
    prompts, scenes = prompts_and_scenes(64)
    images = generate(base, prompts, DrawSettings(steps=15, batch=32), range(64))
    right = verdicts(load_judge(TINY / "judge"), to_tensor(images), scenes)
    share = {kind: float(right[kind].float().mean()) for kind in LABELS}
    assert share["thing"] > 0.85
    assert share["setting"] > 0.9
    assert share["style"] > 0.7


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Against the quadratic it solves: |p̂ − p| = z √(p (1 − p) / n) at both ends."""
    low, high = wilson(230, 256)
    for p in (low, high):
        assert abs(abs(230 / 256 - p) - 1.96 * (p * (1 - p) / 256) ** 0.5) < 1e-12
    assert low < 230 / 256 < high


def test_unknown_words_neither_break_the_picture_nor_vanish(base: Base) -> None:
    states = base.condition(["a dog", "a sks dog", "a zwx dog"]).hidden_states
    assert torch.cdist(states.flatten(1), states.flatten(1))[1, 2] > 0.5
