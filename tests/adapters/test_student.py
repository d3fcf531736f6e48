"""Students: smaller denoisers that begin with the base's weights, take its place, and learn its predictions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import diffgraft as dg
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.student import StudentSize, student_unet
from diffgraft.data.image_folder import read_folder
from diffgraft.errors import DiffgraftError
from diffgraft.pixels import to_tensor
from diffgraft.rng import normal
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import objectives
from diffgraft.trainers.run.train import train
from tests.generation.test_session import bits, same
from tests.recipes import SUBJECT


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Random, with two layers in a block and unequal widths."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def predicted(model: nn.Module, *, seed: int = 1) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(
            normal((2, 4, 8, 16), seed), torch.tensor([3, 700]), normal((2, 5, 12), seed)
        ).sample
    return found


def test_a_student_keeps_the_weights_of_the_layers_that_it_has(unet: UNet2DConditionModel) -> None:
    """Of three layers in an upward block the middle one is left out."""
    student = student_unet(unet, StudentSize(layers=1, middle=False))
    theirs, ours = dict(unet.named_parameters()), dict(student.named_parameters())
    assert not any(name.startswith("mid_block") for name in ours)
    assert not any(".resnets.2." in name for name in ours)
    for name, value in ours.items():
        own = name.replace(".resnets.1.", ".resnets.2.").replace(".attentions.1.", ".attentions.2.")
        assert torch.equal(value, theirs[own if name.startswith("up_blocks") else name]), name
    assert predicted(student).shape == predicted(unet).shape
    assert not torch.equal(predicted(student), predicted(unet))


def test_a_narrower_student_begins_with_the_first_rows_and_columns(unet: UNet2DConditionModel) -> None:
    student = student_unet(unet, StudentSize(width=0.5, middle=True))
    assert list(student.config.block_out_channels) == [8, 16]  # type: ignore[union-attr]
    theirs = dict(unet.named_parameters())
    for name, value in student.named_parameters():
        own = theirs[name][tuple(slice(0, side) for side in value.shape)]
        assert torch.equal(value, own), name
    assert predicted(student).isfinite().all()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (StudentSize(), "saves nothing"),
        (StudentSize(layers=3), "larger than the base, which has 2"),
    ],
)
def test_a_student_that_is_not_smaller_is_refused(unet: UNet2DConditionModel, size: StudentSize, said: str) -> None:
    with pytest.raises(DiffgraftError, match=said):
        student_unet(unet, size)


def test_a_student_takes_the_place_of_the_denoiser_and_leaves_it(base: Base) -> None:
    """Two of them, which are undone in the order in which they came."""
    before = bits(base)
    method = get_method("student")
    noisy, times, prompt = normal((1, 4, 16, 16), 3), torch.tensor([500]), base.condition(["a dog"])
    bare = base.denoise(noisy, times, prompt)
    first, second = (
        method.attach(base, Spec({}, 1, 1.0, 0, method.read_options({"width": width}))) for width in (1.0, 0.5)
    )
    with torch.no_grad():
        narrow = base.denoise(noisy, times, prompt)
        with second.disabled():
            without = base.denoise(noisy, times, prompt)
        first.detach()
        assert torch.equal(base.denoise(noisy, times, prompt), narrow)
        second.detach()
    assert not torch.equal(narrow, bare)
    assert not torch.equal(without, bare)
    assert torch.equal(base.denoise(noisy, times, prompt), bare)
    assert "forward" not in vars(base.unet)
    assert same(bits(base), before)


def test_the_objective_is_its_formula(base: Base) -> None:
    """Every tenth prompt is empty; the loss on the pictures is added with its weight."""

    class Stream:
        process = forward_process(base)

        def batch(self, index: int, count: int) -> object:
            latents, noise = (normal((count, 4, 16, 16), seed) for seed in (index, index + 1))
            times = torch.tensor([100, 900, 500])[:count]
            flow = base.parameterization

            class Batch:
                noisy, target = flow.noised(latents, noise, times), flow.target(latents, noise, times)
                prompts, frames, mask, weight = ["a dog"] * count, [None] * count, None, torch.tensor([1.0, 2.0, 0.5])

                def loss(self, _: object, prediction: torch.Tensor) -> torch.Tensor:
                    return ((prediction - self.target).square().flatten(1).mean(1) * self.weight).mean()

            batch = Batch()
            batch.times = times  # type: ignore[attr-defined]
            return batch

    asked: list[list[str]] = []

    def bare(noisy: torch.Tensor, _: object, prompts: list[str], __: object) -> torch.Tensor:
        asked.append(prompts)
        return 0.5 * noisy

    kind = objectives()["distillation"]
    stream = Stream()
    inputs = ObjectiveInputs(stream, None, 0.0, bare, options=kind.read_options({"data": 0.25}))  # type: ignore[arg-type]
    found = kind.build(inputs).losses(lambda noisy, *_: 0.7 * noisy, 8, 3)
    batch = stream.batch(8, 3)
    noisy = batch.noisy.double()  # type: ignore[attr-defined]
    weight = torch.tensor([1.0, 2.0, 0.5])
    own = ((0.2 * noisy).square().flatten(1).mean(1) * weight).mean()
    data = ((0.7 * noisy - batch.target).square().flatten(1).mean(1) * weight).mean()  # type: ignore[attr-defined]
    assert asked == [["a dog", "", "a dog"]]
    assert float(found["distillation"]) == pytest.approx(float(own), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(own + 0.25 * data), rel=1e-5)


@pytest.fixture(scope="module")
def run(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dg.Run:
    settings = {"steps": 12, "batch": 4, "warmup": 1, "options": {"width": 0.75}, "checkpoint_every": 0}
    return train("student", base=base, images=pictures, output=tmp_path_factory.mktemp("student") / "run", **settings)


def test_a_student_learns_what_the_base_predicts(base: Base, run: dg.Run, pictures: Path) -> None:
    images = [picture.image for picture in read_folder(pictures)][:4]
    noisy = base.parameterization.noised(
        base.family.posterior(base, to_tensor(images))[0], normal((4, 4, 16, 16), 3), torch.tensor([200, 400, 600, 800])
    )
    asked = noisy, torch.tensor([200, 400, 600, 800]), base.condition(["a picture"] * 4)
    wanted = base.denoise(*asked)
    method = get_method("student")
    live = method.attach(base, Spec({}, 1, 1.0, 0, method.read_options({"width": 0.75})))
    with torch.no_grad():
        before = (base.denoise(*asked) - wanted).square().mean()
    live.detach()
    with dg.graft(base, {run: 1.0}):
        after = (base.denoise(*asked) - wanted).square().mean()
    assert after < 0.7 * before
    with pytest.raises(DiffgraftError, match=r"has the strengths 0 and 1, not 0\.5"), dg.graft(base, {run: 0.5}):
        pass


def test_what_would_have_no_effect_beside_a_student_is_refused(
    base: Base, run: dg.Run, short_run: dg.Run, pictures: Path, tmp_path: Path
) -> None:
    """Other adapters on the denoiser, in one drawing; and training, on a grafted student or one under it."""
    before = bits(base)
    with pytest.raises(DiffgraftError, match="the other adapters on the denoiser would have no effect"):
        dg.graft(base, {run: 1.0, short_run: 0.5})
    with dg.graft(base, {run: 0.0, short_run: 0.5}):
        pass
    settings = {"subject": "dog", "images": pictures, "steps": 1, "prior": {"weight": 0}, "previews": False}
    with dg.graft(base, run), pytest.raises(DiffgraftError, match="nothing else can be trained on it"):
        train(SUBJECT, base=base, output=tmp_path / "beside", **settings)
    under = {"adapter": str(run.adapter_file)}
    with pytest.raises(DiffgraftError, match="nothing else can be trained on it"):
        train(SUBJECT, base=base, output=tmp_path / "under", under=under, **settings)
    assert same(bits(base), before)
    assert "forward" not in vars(base.unet)


def test_a_student_is_written_as_a_base_that_diffusers_opens(base: Base, run: dg.Run, tmp_path: Path) -> None:
    folder = dg.merge(run, base=base, output=tmp_path / "small")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    small = dg.load_base(folder)
    noisy, times = normal((1, 4, 16, 16), 3), torch.tensor([500])
    with torch.no_grad():
        theirs = pipe.unet(noisy, times, base.condition(["a dog"]).hidden_states).sample
    with dg.graft(base, {run: 1.0}):
        ours = base.denoise(noisy, times, base.condition(["a dog"]))
    torch.testing.assert_close(small.denoise(noisy, times, small.condition(["a dog"])), ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert small.unet.mid_block is None
    assert replace(base, name="again").unet.mid_block is not None
