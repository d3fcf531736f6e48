"""Sessions: pictures by the grammar of prompts, adapters that come and go, and the base's bits at the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.grammar.encode import Encoding
from diffgraft.generation.guided import Guidance, Guide, GuidedDenoiser, Told, noise_levels
from diffgraft.generation.samplers.names import SAMPLERS
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import Advance, Control, Event, Note, Preview, StoppedError, reporting
from diffgraft.trainers.run.folder import Run
from tests.toy_family import mixer_base

FEW = DrawSettings(steps=3)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def bits(base: Base) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part, module in base.parts() for k, v in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def library(short_run: Run, tmp_path: Path) -> Path:
    """A folder with the adapter of the short run, six times as strong, so that pictures tell it."""
    (tmp_path / "library" / "animals").mkdir(parents=True)
    file = tmp_path / "library" / "animals" / "poodle.safetensors"
    file.write_bytes(short_run.adapter_file.read_bytes())
    return tmp_path / "library"


def test_a_plain_prompt_is_drawn_as_diffusers_draws_it(folders: Path) -> None:
    """SDXL and Stable Diffusion 1, whose ε-prediction and sizes diffusers' own pipelines compute."""
    for family in ("sd1", "sdxl"):
        base = load_base(folders / family)
        settings = DrawSettings(steps=4, guidance=5, size=(64, 48), negative="" if family == "sdxl" else "a cat")
        (ours,) = Session(base).draw("a dog", [7], settings)
        pipe = base.pipeline()
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            base.scheduler.config, timestep_spacing="linspace", steps_offset=0
        )
        generator = torch.Generator().manual_seed(7)
        (theirs,) = pipe(
            "a dog",
            negative_prompt=settings.negative or None,
            num_inference_steps=4,
            guidance_scale=5,
            width=64,
            height=48,
            generator=generator,
        ).images
        assert np.abs(pixels([ours]) - pixels([theirs])).max() <= 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws(name: str, base: Base) -> None:
    session = Session(base)
    settings = DrawSettings(steps=6, sampler=name.upper())
    drawn = pixels(session.draw("a dog", [1, 2], settings))
    assert drawn.shape == (2, 64, 64, 3)
    assert drawn.std() > 10
    assert np.abs(drawn[0] - drawn[1]).mean() > 1
    again = pixels(session.draw("a dog", [2], settings))
    assert np.abs(again[0] - drawn[1]).max() <= 2  # batches differ in the last bits


def test_a_flow_is_drawn_too() -> None:
    session = Session(mixer_base())
    (image,) = session.draw("a dog", [1], DrawSettings(steps=2))
    assert np.asarray(image).std() > 0
    with pytest.raises(DiffgraftError, match="have no weights of words"):
        session.draw("a (dog:1.2)", [1], DrawSettings(steps=2))


def test_the_grammar_moves_pictures(base: Base) -> None:
    session = Session(base)

    def draw(prompt: str, **more: Any) -> np.ndarray:
        return pixels(session.draw(prompt, [3], DrawSettings(steps=6, **more)))

    plain = draw("a dog in the snow")
    assert np.array_equal(draw("a dog in the snow"), plain)
    assert np.array_equal(draw("a {dog|dog} in the snow"), plain)
    for other in (
        "a (dog:1.4) in the snow",
        "a [dog:cat:0.5] in the snow",
        "a dog AND in the snow",
        "a dog BREAK snow",
    ):
        assert np.abs(draw(other) - plain).mean() > 0.3, other
    assert np.array_equal(draw("a [dog:cat:1.0] in the snow"), plain)
    assert np.abs(draw("a (dog:1.4) in the snow", encoding=Encoding("comfyui")) - plain).mean() > 0.1
    assert np.abs(draw("a dog in the snow", noise="gpu") - plain).mean() > 1
    assert np.abs(draw("a dog in the snow", variation_seed=5, variation_strength=0.3) - plain).mean() > 0.3
    assert np.abs(draw("a dog in the snow", rescale=0.7) - plain).mean() > 0.1
    assert np.abs(draw("a dog in the snow", schedule="karras") - plain).mean() > 0.1


def test_previews_come_on_request_and_a_stop_ends_it(base: Base, library: Path) -> None:
    seen: list[Preview] = []
    asked = Control()

    def reporter(event: Event) -> None:
        match event:
            case Advance(_, 2):
                asked.sample_now()
            case Preview():
                seen.append(event)
            case Advance(_, 4):
                asked.stop()

    before = bits(base)
    with reporting(reporter, asked), pytest.raises(StoppedError):
        Session(base, library).draw("a sks dog <lora:poodle:5>", [1, 2], DrawSettings(steps=8))
    (preview,) = seen
    assert preview.step == 3
    assert [image.size for image in preview.images] == [(64, 64)] * 2
    assert np.abs(pixels(list(preview.images))[0] - pixels(list(preview.images))[1]).mean() > 1
    assert same(bits(base), before)


def test_what_is_not_read_as_it_looks_is_told(base: Base) -> None:
    seen: list[Event] = []
    with reporting(seen.append):
        Session(base).draw("a (dog:1,2)", [1], DrawSettings(steps=1))
    (note,) = [event for event in seen if isinstance(event, Note)]
    assert "drawn as text" in note.text


def test_adapters_by_name_are_what_graft_merges(base: Base, library: Path) -> None:
    before = bits(base)
    plain = pixels(Session(base).draw("a sks dog", [3], FEW))
    with graft(base, {library / "animals" / "poodle.safetensors": 6.0}):
        wanted = pixels(Session(base).draw("a sks dog", [3], FEW))
    assert np.abs(wanted - plain).mean() > 0.3
    (library / "dog" / "run-1").mkdir(parents=True)
    (library / "dog" / "run-1" / "adapter.safetensors").write_bytes(
        (library / "animals" / "poodle.safetensors").read_bytes()
    )
    with Session(base, library) as session:
        for name in ("run-1", "dog/run-1", "dog/run-1/adapter"):
            assert session.library.find(name) == library / "dog" / "run-1" / "adapter.safetensors"
        with pytest.raises(DiffgraftError, match="did you mean 'run-1'"):
            session.use("run1")
        session.use("poodle", 6.0)
        assert set(session.adapters) == {"poodle"}
        assert np.array_equal(pixels(session.draw("a sks dog", [3], FEW)), wanted)
        session.use("poodle", 2.0)
        assert np.abs(pixels(session.draw("a sks dog", [3], FEW)) - wanted).max() > 0
        session.remove("poodle")
        assert same(bits(base), before)
        assert np.array_equal(pixels(session.draw("a sks dog <lora:animals/poodle:6>", [3], FEW)), wanted)
        assert same(bits(base), before)
        assert not session.adapters
        session.use(library / "animals" / "poodle.safetensors")
    assert same(bits(base), before)


def test_strengths_by_step(base: Base, library: Path) -> None:
    session = Session(base, library)
    settings = DrawSettings(steps=4)

    def draw(tag: str) -> np.ndarray:
        return pixels(session.draw(f"a sks dog <lora:poodle:{tag}>", [3], settings))

    plain, whole = pixels(session.draw("a sks dog", [3], settings)), draw("0:6")
    before = bits(base)
    assert np.array_equal(draw("0:6:start=0:end=4"), whole)
    assert np.array_equal(draw("0:6:start=5"), plain)
    assert np.array_equal(draw("0:6@0,6@1"), whole)
    half = draw("0:6:end=2")
    assert np.abs(half - whole).max() > 0
    assert np.abs(half - plain).max() > 0
    assert np.array_equal(draw("0:6@0,6@0.49,0@0.5"), half)
    assert same(bits(base), before)


def test_a_run_that_fails_leaves_the_base_as_it_was(base: Base, library: Path) -> None:
    before, session = bits(base), Session(base, library)
    session.use("poodle", 0.5)
    held = bits(base)
    for prompt, answer in (
        ("a <lora:podle:1>", r"no adapter 'podle' in .*: did you mean 'poodle'"),
        ("a <lora:poodle:1> <lora:nothing:1>", "no adapter 'nothing'"),
        ("a <hypernet:poodle:1>", "poodle is no hypernetwork: write <lora:poodle"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            session.draw(prompt, [1], FEW)
        assert same(bits(base), held)
    with pytest.raises(DiffgraftError, match=r"No adapter 'podle' is in use: did you mean 'poodle'"):
        session.remove("podle")
    with pytest.raises(DiffgraftError, match="give the folder of adapters"):
        Session(base).use("poodle")
    session.close()
    assert same(bits(base), before)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"sampler": "euler b"}, "sampler='euler b': did you mean 'euler a'"),
        ({"steps": 0}, "steps=0: must be 1 to 1000"),
        ({"guidance": -1}, "guidance=-1: must be 0 to 100"),
        ({"rescale": 2}, "rescale=2: must be from 0 to 1"),
        ({"schedule": "x"}, "schedule='x'"),
        ({"size": (70, 64)}, r"size=70x64: sides must be multiples of 8. Use 72x64"),
    ],
)
def test_settings_that_cannot_be_drawn(base: Base, settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        Session(base).draw("a dog", [1], DrawSettings(**settings))


def test_guidance_is_its_formula(base: Base) -> None:
    """Two parts and a negative prompt, in float64 from the predictions; unequal lengths are run apart."""
    x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1)) * 3
    sigma = 3.0
    told = {text: base.condition([text]).hidden_states[0] for text in ("a dog", "a cat", "")}
    long = torch.cat([told["a cat"], told[""]])
    first = Guide([(1.0, [Told(9, told["a dog"])]), (-0.5, [Told(9, long)])], [Told(9, told[""])])
    second = Guide([(1.0, [Told(1, told["a dog"]), Told(9, told["a cat"])])], [Told(9, told[""])])
    denoise = GuidedDenoiser(base, [first, second], Guidance(4.0))
    denoise.step = 2
    found = denoise(x, sigma)

    def predicted(states: torch.Tensor, row: int) -> torch.Tensor:
        from diffgraft.bases.family import Conditioning

        time = torch.tensor([noise_levels(base).timestep(sigma)], dtype=torch.float32)
        scaled = x[row : row + 1] / (1 + sigma**2) ** 0.5
        with torch.no_grad():
            v = base.denoise(scaled, time, Conditioning(states[None]))[0].double()
        return x[row].double() / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * v

    empty = [predicted(told[""], row) for row in range(2)]
    wanted = [
        empty[0] + 4 * (predicted(told["a dog"], 0) - empty[0]) - 2 * (predicted(long, 0) - empty[0]),
        empty[1] + 4 * (predicted(told["a cat"], 1) - empty[1]),
    ]
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)
    denoise.step = 1  # the last step of the first text
    wanted[1] = empty[1] + 4 * (predicted(told["a dog"], 1) - empty[1])
    torch.testing.assert_close(denoise(x, sigma).double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_200_random_changes_end_with_the_bits_of_the_base(base: Base, library: Path) -> None:
    dice, before = np.random.default_rng(4), bits(base)
    session = Session(base, library)
    names = ["poodle", "other", "third"]
    for _ in range(200):
        name = names[dice.integers(3)]
        if name in session.adapters and dice.random() < 0.4:
            session.remove(name)
        else:
            session.use(library / "animals" / "poodle.safetensors", float(dice.normal()), name)
    session.close()
    assert same(bits(base), before)
