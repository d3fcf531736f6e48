"""Control networks: trained as by diffusers' script, exported for diffusers, resumed, and refused in sentences."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler
from PIL import Image, ImageOps
from torch import Tensor

import diffgraft as dg
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.controlnet import AttachedControl, ControlNetwork
from diffgraft.adapters.ops.convert import convert
from diffgraft.bases import Base, load_base
from diffgraft.data.frames import Crop
from diffgraft.devices import has_bfloat16
from diffgraft.edges import edges
from diffgraft.errors import DiffgraftError
from diffgraft.generation.session import Session
from diffgraft.rng import normal
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.hooks.health import GradMonitor
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.attach import attach
from tests.conftest import fresh
from tests.trainers.interrupt_helpers import interrupted_after

WIDTH, HEIGHT = 80, 48
QUICK: dict[str, Any] = {"steps": 2, "batch": 2, "seed": 5, "checkpoint_every": 0, "previews": False, "flip": False}


def drawing(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A picture of rectangles on a gradient, which is not its own mirror image."""
    rng = np.random.default_rng(number)
    pixels = np.broadcast_to(np.linspace(60, 200, size[0])[None, :, None], (size[1], size[0], 3)).copy()
    for _ in range(4):
        left, top = rng.integers(size[0] - 12), rng.integers(size[1] - 12)
        pixels[top : top + rng.integers(6, 24), left : left + rng.integers(6, 24)] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Five captioned drawings of 80 × 48 pixels, a bucket of `tiny`."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for number in range(5):
        drawing(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of {number} dogs", "utf-8")
    return folder


class Seen:
    """What the denoiser was asked in each step, the weights of the control network then, and the gradients."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, list[str]]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        forward, after_backward = Denoiser.forward, GradMonitor.after_backward

        def watched(denoiser: Denoiser, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Any) -> Tensor:
            live = denoiser.adapter
            assert isinstance(live, AttachedControl)
            self.weights.append({name: value.detach().clone() for name, value in live.network.state_dict().items()})
            self.asked.append((noisy, times, list(prompts)))
            return forward(denoiser, noisy, times, prompts, frames)

        def after(monitor: GradMonitor) -> None:
            named = monitor._parameters.items()
            self.gradients.append({name: value.grad.clone() for name, value in named if value.grad is not None})
            after_backward(monitor)

        with patch.object(Denoiser, "forward", watched), patch.object(GradMonitor, "after_backward", after):
            yield


def script_step(
    base: Base, weights: dict[str, Tensor], conditions: Tensor, latents: Tensor, noise: Tensor, asked: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step of diffusers' ``train_controlnet.py``, from diffusers' own parts."""
    _, times, prompts = asked
    network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 96))
    network.load_state_dict(weights)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, times)
    ids = base.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    states = base.text_encoder(ids)[0]
    down, middle = network(noisy, times, encoder_hidden_states=states, controlnet_cond=conditions, return_dict=False)
    prediction = base.unet(
        noisy,
        times,
        encoder_hidden_states=states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, times) if is_v else noise
    loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
    loss.backward()
    gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    return loss.item(), gradients


def noised(base: Base, image: Image.Image, index: int, time: Tensor, size: torch.Size) -> tuple[Tensor, ...]:
    """Latents, noise and noisy latents of a sample, [c, h, w], made anew by diffusers' parts."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = base.vae.encode(pixels).latent_dist
    spread, noise = (normal(tuple(size), 5, index, 0, stream) for stream in (1, 2))
    latents = (posterior.mean[0] + posterior.std[0] * spread) * base.vae.config.scaling_factor
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    return latents, noise, scheduler.add_noise(latents[None], noise[None], time[None])[0]


@pytest.mark.parametrize("flip", [False, True])
def test_losses_and_gradients_are_those_of_diffusers_script(
    flip: bool, base: Base, drawings: Path, tmp_path: Path
) -> None:
    """The first step, in which all but the last layers have no gradient, and the fourth, in which all have one."""
    seen, settings = Seen(), {**QUICK, "steps": 4, "batch": 3, "lr": 1e-3, "max_grad_norm": 1e9, "flip": flip}
    with seen.watch():
        run = dg.train(
            "control", base=base, images=drawings, output=tmp_path / "run", **settings, buckets={"use": True}
        )
    mirrored = []
    for step in (0, 3):
        asked, samples, shown = seen.asked[step], [], []
        for place, (noisy, time, prompt) in enumerate(zip(*asked, strict=True)):
            image = drawing(int(prompt.split()[3]))
            # whether a sample is mirrored is seen from its latents alone, and its condition picture must agree
            ways = [image, ImageOps.mirror(image)][: 1 + flip]
            made = [noised(base, way, 3 * step + place, time, noisy.shape) for way in ways]
            off = [float((own[2] - noisy).abs().max()) for own in made]
            assert min(off) < 1e-4
            samples.append(made[int(np.argmin(off))])
            shown.append(ways[int(np.argmin(off))])
            mirrored.append(np.argmin(off) == 1)
        conditions = torch.stack([torch.from_numpy(np.array(edges(own))).permute(2, 0, 1) / 255 for own in shown])
        assert conditions.std() > 0.1
        latents, noise, _ = (torch.stack(part) for part in zip(*samples, strict=True))
        loss, gradients = script_step(base, seen.weights[step], conditions, latents, noise, asked)
        assert run.metrics[step]["loss"] == pytest.approx(loss, rel=1e-5)
        ours = {name.removeprefix("control."): value for name, value in seen.gradients[step].items()}
        assert ours.keys() == gradients.keys()
        total = torch.stack([value.norm() for value in gradients.values()]).norm()
        assert torch.stack([(ours[name] - value).norm() for name, value in gradients.items()]).norm() < 1e-5 * total
        assert all(value.any() for value in gradients.values()) == (step == 3)
    assert (0 < sum(mirrored) < 6) == flip


def test_the_loss_would_differ_with_other_conditions(base: Base, drawings: Path, tmp_path: Path) -> None:
    """The third loss from the same values depends on the condition pictures; the first two cannot yet."""
    losses = []
    for folder in ("black", "white"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            Image.new("RGB", (WIDTH, HEIGHT), folder).save(tmp_path / folder / f"{number}.webp")
        settings = {**QUICK, "steps": 3, "lr": 1e-2, "control": {"images": str(tmp_path / folder)}}
        run = dg.train("control", base=base, images=drawings, output=tmp_path / f"run-{folder}", **settings)
        losses.append([entry["loss"] for entry in run.metrics])
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_new_network_leaves_predictions_bit_for_bit(family: str, folders: Path) -> None:
    base = fresh(folders / family)
    live = attach(load_recipe("control", {}), base)
    denoiser = Denoiser(base, live)
    noisy, times, prompts = normal((2, 4, 6, 8), 3), torch.tensor([20, 700]), ["a dog", ""]
    frames = [dg.bases.SizeConditioning((48, 64), (0, 0), (48, 64), torch.rand(3, 48, 64)) for _ in prompts]
    with torch.no_grad():
        steered = denoiser(noisy, times, prompts, frames)
        with live.disabled():
            bare = denoiser(noisy, times, prompts, frames)
        assert torch.equal(steered, bare)
        for value in live.trainable().values():
            value.add_(0.1)
        assert not torch.allclose(denoiser(noisy, times, prompts, frames), bare, atol=1e-3)
        with live.disabled():
            assert torch.equal(denoiser(noisy, times, prompts, frames), bare)


def test_the_seed_decides_the_start_and_leaves_the_global_generator_alone(base: Base) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    first, again, other = (attach(load_recipe("control", {"seed": seed}), base).trainable() for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert {name for name, value in first.items() if not torch.equal(value, other[name])} == {
        f"control.controlnet_cond_embedding.{layer}.{leaf}"
        for layer in ("conv_in", *(f"blocks.{number}" for number in range(4)))
        for leaf in ("weight", "bias")
    }


def test_exported_it_gives_the_same_residuals_in_diffusers(base: Base, drawings: Path, tmp_path: Path) -> None:
    run = dg.train("control", base=base, images=drawings, output=tmp_path / "run", **{**QUICK, "lr": 1e-3})
    done = convert(run.adapter_file, tmp_path / "edges", "controlnet")
    assert done.comparison.same
    assert sorted(path.name for path in done.path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    from_folder = ControlNetModel.from_pretrained(done.path)
    from_file = ControlNetModel.from_single_file(str(run.adapter_file), config=str(done.path), local_files_only=True)
    source = run.adapter.networks[0]
    assert isinstance(source, ControlNetwork)
    given = {
        "sample": normal((2, 4, 12, 20), 1),
        "timestep": torch.tensor([20, 700]),
        "encoder_hidden_states": normal((2, 77, 64), 2),
        "controlnet_cond": torch.rand(2, 3, 48, 80),
    }
    with torch.no_grad():
        wanted, *others = (network(**given) for network in (source.build(base), from_folder, from_file))
        assert wanted.mid_block_res_sample.abs().max() > 1e-4
        for other in others:
            assert torch.equal(other.mid_block_res_sample, wanted.mid_block_res_sample)
            pairs = zip(other.down_block_res_samples, wanted.down_block_res_samples, strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    # and back: the folder, the file, and what diffusers itself has saved
    from_folder.save_pretrained(tmp_path / "theirs")
    for path in (done.path, tmp_path / "theirs"):
        again = load_adapter(path).networks[0]
        assert all(torch.equal(value, source.tensors[name]) for name, value in again.tensors.items())
    started = dg.train(
        "control",
        base=base,
        images=drawings,
        output=tmp_path / "more",
        init_from=str(tmp_path / "theirs"),
        **{**QUICK, "lr": 1e-5},
    )
    moved = started.adapter.networks[0].tensors
    assert max(float((moved[name] - value).abs().max()) for name, value in source.tensors.items()) < 1e-4


def test_samples_are_steered_by_conditions_of_the_training_images(
    base: Base, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool, bytes]] = []
    draw = Session.draw

    def watched(session: Session, prompts: Any, *rest: Any) -> Any:
        steering = session._steering
        asked.append((prompts, steering is not None, steering.control.image.tobytes() if steering else b""))
        return draw(session, prompts, *rest)

    monkeypatch.setattr(Session, "draw", watched)
    settings = {**QUICK, "previews": True, "sample_every": 2, "lr": 1e-2}
    run = dg.train("control", base=base, images=drawings, output=tmp_path / "run", **settings)
    assert run.before_after.is_file()
    assert (run.folder / "samples" / "step-000002.png").is_file()
    prompts = [f"a picture of {number} dogs" for number in range(4)]
    assert [prompt for prompt, _, _ in asked] == prompts * 3
    assert [is_steered for _, is_steered, _ in asked] == [True] * 4 + [False] * 4 + [True] * 4
    square = Crop((WIDTH, HEIGHT), (107, 64), (21, 0), (64, 64))
    squares = [edges(square.crop(drawing(number))) for number in range(4)]
    assert [content for _, _, content in asked[:4]] == [own.tobytes() for own in squares]


def test_stopped_and_resumed_it_is_never_stopped(base: Base, drawings: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 5, "ema": 0.9, "gradient_checkpointing": True, "caption_dropout": 0.3, "flip": True}
    settings |= {"validation": {"share": 0.4, "every": 2, "pairs": 4}}
    whole = dg.train("control", base=base, images=drawings, output=tmp_path / "whole", **settings)
    with interrupted_after(3):
        dg.train("control", base=base, images=drawings, output=tmp_path / "cut", **settings)
    again = dg.train(base=base, resume=tmp_path / "cut")
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    assert [entry["validation"] for entry in again.metrics if "validation" in entry]


def test_condition_files_are_part_of_the_fingerprint(base: Base, drawings: Path, tmp_path: Path) -> None:
    conditions = tmp_path / "conditions"
    conditions.mkdir()
    for file in drawings.glob("*.png"):
        edges(Image.open(file)).save(conditions / file.name)
    settings = {**QUICK, "steps": 3, "control": {"images": str(conditions)}}
    with interrupted_after(2):
        dg.train("control", base=base, images=drawings, output=tmp_path / "run", **settings)
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(conditions / "2.png")
    with pytest.raises(DiffgraftError, match="the pictures or their captions differ"):
        dg.train(base=base, resume=tmp_path / "run")


def test_edges_given_as_files_are_edges_that_are_made(base: Base, drawings: Path, tmp_path: Path) -> None:
    conditions = tmp_path / "conditions"
    conditions.mkdir()
    for file in drawings.glob("*.png"):
        edges(Image.open(file)).save(conditions / file.name)
    digests = set()
    for name, control in (("files", {"images": str(conditions)}), ("made", {"by": "edges"})):
        settings = {**QUICK, "control": control, "buckets": {"use": True}}
        run = dg.train("control", base=base, images=drawings, output=tmp_path / name, **settings)
        tensors = run.adapter.networks[0].tensors
        digests.add(hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest())
    assert len(digests) == 1


def _missing(folder: Path) -> None:
    (folder / "3.png").unlink()


def _other_shape(folder: Path) -> None:
    Image.new("RGB", (50, 50)).save(folder / "3.png")


def _not_a_picture(folder: Path) -> None:
    (folder / "3.png").write_text("no picture", "utf-8")


@pytest.mark.parametrize(
    ("spoil", "answer"),
    [
        (_missing, r"has no condition picture for 3\.png: put one there for each training image"),
        (_other_shape, r"3\.png is 50x50, but its training image 3\.png is 80x48: give both the same size"),
        (_not_a_picture, r"The condition picture .*3\.png cannot be read as a picture"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_training(
    spoil: Any, answer: str, base: Base, drawings: Path, tmp_path: Path
) -> None:
    conditions = tmp_path / "conditions"
    conditions.mkdir()
    for file in drawings.glob("*.png"):
        edges(Image.open(file)).save(conditions / file.name)
    spoil(conditions)
    settings: dict[str, Any] = {**QUICK, "control": {"images": str(conditions)}}
    for call in (dg.plan, dg.train):
        with pytest.raises(DiffgraftError, match=answer):
            call("control", base=base, images=drawings, output=str(tmp_path / "run"), **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("recipe", "settings", "answer"),
    [
        ("control", {"method": "lora"}, "method=lora does not use condition pictures.*set method=controlnet"),
        ("style", {"method": "controlnet"}, "method=controlnet needs condition pictures.*use the recipe control"),
        ("control", {"sample_prompts": "a dog"}, "sample_prompts is not supported by method=controlnet: samples have"),
        ("control", {"rank": 4}, "rank is not supported by method=controlnet"),
        ("control", {"control": {"by": "depth"}}, "Invalid value control.by='depth'"),
        ("control", {"control": "edges"}, r"control is a group; set one of its keys: control\.by, control\.images"),
        ("control", {"control": {"images": "nowhere"}}, r"control\.images=nowhere does not exist"),
        ("control", {"quantize": "int8"}, "begins as a copy of the base, which is quantized to int8"),
        ("control", {"format": "kohya"}, "which such files cannot hold"),
        ("control", {"prior": {"weight": 1}}, "Unknown setting 'prior.weight' for a control recipe"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(
    recipe: str, settings: dict[str, Any], answer: str, drawings: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        dg.train(recipe, images=drawings, output=tmp_path / "run", **{"steps": 1, **settings})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_folder_of_the_pictures_is_no_folder_of_conditions(drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="is the folder of the training images: give a folder of condition"):
        dg.train("control", images=drawings, output=tmp_path / "run", control={"images": str(drawings)})


def test_a_family_without_control_networks_says_so(drawings: Path, tmp_path: Path) -> None:
    from tests.toy_family import installed, mixer_base

    with installed(), pytest.raises(DiffgraftError, match="family mixer have no control networks"):
        dg.train("control", base=mixer_base(), images=drawings, output=tmp_path / "run", steps=1)


def test_images_of_two_folders_do_not_share_a_condition(tmp_path: Path) -> None:
    (tmp_path / "conditions").mkdir()
    for number in range(5):
        edges(drawing(number)).save(tmp_path / "conditions" / f"{number}.png")
    (tmp_path / "both" / "1_dogs").mkdir(parents=True)
    (tmp_path / "both" / "2_cats").mkdir()
    drawing(3).save(tmp_path / "both" / "1_dogs" / "3.png")
    drawing(4).save(tmp_path / "both" / "2_cats" / "3.png")
    control = {"images": str(tmp_path / "conditions")}
    with pytest.raises(DiffgraftError, match=r"3\.png would be the condition picture of two different training images"):
        dg.train("control", images=tmp_path / "both", output=tmp_path / "run", control=control)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"objective": "consistency", "options": {"guidance": 3}}},
        {"loss": {"snr_gamma": 5}, "accumulate": 2, "optimizer": "adamw8bit"},
        {"precision": "bfloat16" if has_bfloat16() else "float32", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_objectives_and_options_of_the_loop_go_with_it(
    settings: dict[str, Any], drawings: Path, tmp_path: Path
) -> None:
    run = dg.train("control", images=drawings, output=tmp_path / "run", **{**QUICK, "lr": 1e-3, "steps": 3, **settings})
    assert all(np.isfinite(entry["loss"]) for entry in run.metrics)
    network = run.adapter.networks[0]
    assert isinstance(network, ControlNetwork)
    assert float(network.tensors["controlnet_cond_embedding.conv_out.weight"].abs().max()) > 0


def test_it_trains_on_stable_diffusion_xl(sdxl_folder: Path, drawings: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 3, "lr": 1e-3, "precision": "float32"}
    run = dg.train("control", base=load_base(sdxl_folder), images=drawings, output=tmp_path / "run", **settings)
    assert len({entry["loss"] for entry in run.metrics}) == 3
    names = set(run.adapter.networks[0].tensors)
    assert {"add_embedding.linear_1.weight", "controlnet_mid_block.weight"} <= names


def test_a_plan_counts_the_network(drawings: Path) -> None:
    facts = dict(dg.plan("control", images=drawings).facts)
    assert facts["conditions"] == "edges of the images"
    live = attach(load_recipe("control", {}), load_base("tiny"))
    assert f"{sum(value.numel() for value in live.trainable().values()):,} parameters" in facts["trained"]
