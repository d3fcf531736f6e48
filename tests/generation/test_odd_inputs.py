"""What users and hostile pictures may give to drawing: a right picture, or one sentence."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffgraft as dg
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.attention_control import Edit, edit
from diffgraft.generation.grammar.choices import draw_choices
from diffgraft.generation.grammar.notes import notes_on
from diffgraft.generation.grammar.tags import Point, split_tags
from diffgraft.generation.image_input import ImageInput, native_size
from diffgraft.generation.inversion import invert
from diffgraft.generation.metadata import PARAMETERS, RECORD, read_parameters, read_record, save_drawing
from diffgraft.generation.regenerate import Sources, regenerate
from diffgraft.generation.regions import Region
from diffgraft.generation.samplers.names import named_sampler, sampler_sigmas
from diffgraft.generation.samplers.noise import CpuNoise
from diffgraft.generation.sampling import Painter
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.generation.sheets import Axis, Cell, draw_sheet
from tests.generation.samplers.test_k_diffusion import LEVELS
from tests.generation.test_lanes import made
from tests.generation.test_session import pixels

FEW = DrawSettings(steps=3)


@pytest.fixture(scope="module")
def library(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for name, method in (("lora", "lora"), ("lokr", "lokr")):
        made(base, method, 1).save(folder / f"{name}.safetensors")
    return folder


def test_lanes_follow_what_is_merged_in_each_step(base: Base, library: Path) -> None:
    with Session(base, library) as session:
        whole = session.draw("a dog <lora:lora:0@0,1@0.5> <lora:lokr:1>", [7], FEW)
        region = replace(FEW, regions=(Region("a dog <lora:lokr:1>"),))
        found = session.draw("a dog <lora:lora:0@0,1@0.5>", [7], region)
    assert np.abs(pixels(found) - pixels(whole)).max() <= 2


def test_axes_of_strength_and_block_keep_each_other(base: Base, library: Path) -> None:
    start = Cell("a dog", 3, DrawSettings(steps=2))
    with Session(base, library) as session:
        session.use("lora", 0.5)
        for axes in (("lora=0.4,0.8", "lora:M00=0,1"), ("lora:M00=0,1", "lora=0.4,0.8")):
            sheet = np.asarray(draw_sheet(session, start, [Axis.read(axis) for axis in axes]))
            cells = []
            for block, strength in ((0, 0.4), (0, 0.8), (1, 0.4), (1, 0.8)):
                session.use("lora", {"unet": strength, "text_encoder": strength, "M00": block})
                cells += session.draw("a dog", [3], start.settings)
            session.use("lora", 0.5)
            seen = [
                sheet[-134 * (2 - row) : -134 * (2 - row) + 128, -134 * (2 - column) : -134 * (2 - column) + 128]
                for row in range(2)
                for column in range(2)
            ]
            order = [0, 1, 2, 3] if axes[0].startswith("lora=") else [0, 2, 1, 3]
            for place, cell in zip(order, cells, strict=True):
                assert np.array_equal(seen[place], np.asarray(cell.resize((128, 128), Image.Resampling.NEAREST)))


@pytest.mark.parametrize(
    ("prompt", "settings", "answer"),
    [
        ("a dog AND a cat", FEW, "has parts, choices or changes between steps"),
        ("a [dog:cat:0.5]", FEW, "has parts, choices or changes between steps"),
        ("a {red|blue} dog", FEW, "has parts, choices or changes between steps"),
        ("a dog", replace(FEW, regions=(Region("a"),)), "with regions cannot be edited"),
        ("a dog", replace(FEW, negative="word " * 100), "too long to be edited"),
    ],
)
def test_edits_that_would_be_false_are_refused(prompt: str, settings: DrawSettings, answer: str, base: Base) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        edit(Session(base), prompt, "a cat", settings=settings)
    if settings.negative:
        with pytest.raises(DiffgraftError, match=answer):
            invert(Session(base), Image.new("RGB", (64, 64)), prompt, settings)


def test_a_record_tells_of_the_file_that_was_read(base: Base, library: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((library / "lora.safetensors").read_bytes())
    with Session(base, tmp_path) as session:
        session.use("x", 3.0)
        file.unlink()
        (drawn,) = session.draw("a dog", [3], FEW)
    assert regenerate(
        save_drawing(drawn, tmp_path / "a.png"), Sources(base, [library / "lora.safetensors"])
    ).has_same_pixels


def test_variation_seeds_are_those_of_each_picture_alone(base: Base) -> None:
    settings = replace(FEW, variation_seed=5, variation_strength=0.9)
    together = pixels(Session(base).draw("a dog", [1, 2, 3], settings))
    alone = pixels(Session(base).draw("a dog", [1, 2, 3], replace(settings, batch=1)))
    assert np.abs(together - alone).max() <= 2


def test_a_delta_of_seeds_changes_the_noise_of_steps_alone(base: Base) -> None:
    """As in webui: the first noise is that of the seed, that of steps starts anew from the seed and the delta."""
    drawn: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        for seed, delta in ((3, 4), (7, 0), (3, 0)):
            streams = {}

            class Stream(CpuNoise):
                def __init__(self, seed: int, streams: dict[int, Any] = streams) -> None:
                    super().__init__(seed)
                    streams[seed] = self.numbers = []

                def normal(self, shape: Sequence[int]) -> torch.Tensor:
                    found = super().normal(shape)
                    self.numbers.append(float(found.sum()))
                    return found

            patch.setattr("diffgraft.generation.samplers.noise.CpuNoise", Stream)
            Session(base).draw("a dog", [seed], replace(FEW, sampler="euler a", noise_seed_delta=delta))
            drawn.append([number for numbers in streams.values() for number in numbers])
    with_delta, of_seven, of_three = drawn
    assert with_delta[0] == of_three[0]
    assert with_delta[1:] == of_seven[: len(with_delta) - 1]
    assert with_delta[1:] != of_three[1:]
    assert len(with_delta) == len(of_three) > 2


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"quantize": "int8"}, {"zero_snr": False}])
def test_how_the_base_was_loaded_is_told(options: Any, tmp_path: Path) -> None:
    (drawn,) = dg.generate("a dog", steps=2, device="cpu", **options)
    again = regenerate(save_drawing(drawn, tmp_path / "a.png"))
    assert again.has_same_pixels
    assert again.differences == []


def test_pictures_of_webui_that_started_from_one_ask_for_it(base: Base, tmp_path: Path) -> None:
    source = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image = Image.new("RGB", (64, 64))
    image.info = {PARAMETERS: "a dog\nSteps: 4, Seed: 9, CFG scale: 3, Denoising strength: 0.5, Eta: 0.5, VAE: x"}
    file = save_drawing(image, tmp_path / "a.png")
    with pytest.raises(DiffgraftError, match=r"was drawn from a starting picture.* by --image"):
        regenerate(file, Sources(base))
    again = regenerate(file, Sources(base, image=source))
    settings = DrawSettings(steps=4, guidance=3.0, noise="gpu")
    (wanted,) = Session(base).draw("a dog", [9], settings, ImageInput(source, 0.5))
    assert again.image.tobytes() == wanted.tobytes()
    assert again.differences[1:] == ["Eta: 0.5 is not read.", "VAE: x is not read."]


def test_records_that_formats_cannot_hold_are_left_out(base: Base, tmp_path: Path) -> None:
    (drawn,) = Session(base).draw("a dog \uffff \ud7ff 𠀀", [3], DrawSettings(steps=1))
    for ending in ("png", "webp", "jpg"):
        record, _ = read_record(save_drawing(drawn, tmp_path / f"a.{ending}"))
        assert record is not None
        assert record.prompt.startswith("a dog \uffff")
    drawn.info[RECORD] += " " * 70_000
    drawn.info[PARAMETERS] += "x" * 70_000
    assert read_record(save_drawing(drawn, tmp_path / "b.jpg")) == (None, "")
    wide = save_drawing(Image.new("RGB", (16_384, 2)), tmp_path / "c.webp")
    assert wide.name == "c.png"


def test_numbers_of_numpy_are_numbers(base: Base, library: Path) -> None:
    with Session(base, library) as session:
        session.use("lora", {"unet": np.float32(0.5)})
        settings = DrawSettings(steps=np.int64(1), guidance=np.float32(3))
        (drawn,) = session.draw("a dog", seeds=np.arange(1), settings=settings)
    assert json.loads(drawn.info[RECORD])["settings"]["guidance"] == 3.0


@pytest.mark.parametrize(
    "given",
    [
        {"seeds": 5},
        {"seeds": [-1]},
        {"seeds": [2**70]},
        {"seeds": [1.5]},
        {"prompts": None},
        {"prompts": [5]},
        {"prompts": "a \udcff dog"},
        {"prompts": "x" * 20_000},
        {"image": Image.new("RGB", (8, 8))},
    ],
)
def test_what_cannot_be_drawn_with(given: dict[str, Any], base: Base) -> None:
    with pytest.raises(DiffgraftError):
        Session(base).draw(**{"prompts": "a dog", "settings": FEW, **given})


@pytest.mark.parametrize(
    "given",
    [
        *({"size": value} for value in ("64x64", (64,), 5)),
        *({"steps": value} for value in ("many", 2.5, None)),
        *({"guidance": value} for value in ("x", float("nan"))),
        *({"sampler": value} for value in (5, None)),
        *({name: 5} for name in ("negative", "hires", "encoding", "regions", "noise")),
        {"variation_seed": 2**70},
        {"variation_seed": -1},
        {"batch": 1.5},
        {"regions": ["x"]},
    ],
)
def test_settings_of_other_types_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(DiffgraftError, match=f"{next(iter(given))}|seed"):
        DrawSettings(**given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Region(None),  # type: ignore[arg-type]
        lambda: Region("x", mask="m.png"),  # type: ignore[arg-type]
        lambda: Region("x", box=5),  # type: ignore[arg-type]
        lambda: ImageInput("m.png"),  # type: ignore[arg-type]
        lambda: Hires(scale="x"),  # type: ignore[arg-type]
        lambda: Edit(weights={"cat": "x"}),  # type: ignore[dict-item]
        lambda: Edit(weights={"cat": float("nan")}),
        lambda: DrawSettings(noise_seed_delta=2**70),
        lambda: dg.sheet("a", [5], base="none"),
        lambda: dg.generate("a", seed=-5, base="none"),
        lambda: dg.generate("a", count="a", base="none"),  # type: ignore[arg-type]
        lambda: dg.generate("a", image=5, base="none"),  # type: ignore[arg-type]
        lambda: dg.generate("a", style="foo", base="none"),  # type: ignore[arg-type]
        lambda: named_sampler("DPM++ 2M Karras"),
    ],
)
def test_other_values_of_other_types_are_refused(make: Any) -> None:
    with pytest.raises(DiffgraftError):
        make()


def test_masks_of_regions_are_made_small() -> None:
    region = Region("x", mask=Image.effect_noise((3000, 2000), 80))
    assert region.mask is not None
    assert region.mask.size == (1024, 683)
    again = DrawSettings.from_changed(DrawSettings(regions=(region,)).changed())
    assert torch.equal(again.regions[0].area(60, 90), region.area(60, 90))


def test_extreme_pictures_are_refused(base: Base) -> None:
    with pytest.raises(DiffgraftError, match="1x20000: crop it"):
        native_size(base, Image.new("RGB", (1, 20_000)))


def hostile(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record with one value changed in many ways."""
    odd = (5, -1, 2**70, 1.5, "x", None, [], {}, float("inf"), "\ud800", "x" * 5000, "../../etc/passwd", True)
    changed = [{**record, key: value} for key in record for value in odd]
    changed += [
        {**record, "settings": {**record["settings"], key: value}}
        for key in ("sampler", "steps", "size", "negative", "variation_seed", "hires", "encoding", "regions", "batch")
        for value in odd
    ]
    for name in ("hires", "encoding"):
        changed += [{**record, "settings": {name: {key: value}}} for key in ("steps", "style", "x") for value in odd]
    pair = {**record, "batch": [[0, 3], [0, 3]]}
    edits = ({key: value} for key in ("cross", "self", "weights", "inner", "x") for value in (*odd, {"dog": "x"}))
    changed += [{**pair, "edit": edit} for edit in (*edits, {"weights": {"dog": float("inf")}})]
    adapters = [{"name": name, "hash": digest, "strength": 1} for name in odd for digest in ("", "0" * 64)]
    changed += [{**record, "adapters": [adapter]} for adapter in adapters]
    changed += [{**record, "prompts": [f"a <lora:{name}:1>"]} for name in ("/etc/passwd", "~no:1", "../x")]
    return changed


def test_hostile_records_are_drawn_or_refused(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the library is opened, and nothing but DiffgraftError is raised."""
    (drawn,) = Session(base).draw("a dog", [3], DrawSettings(steps=1))
    record = json.loads(drawn.info[RECORD])
    monkeypatch.setattr(Painter, "sample", lambda _, work, __: torch.zeros(len(work.jobs), 4, 2, 2))

    def load(path: Path, *_: object) -> Any:
        assert path.is_relative_to(tmp_path / "lib"), path
        return load_adapter(path)

    monkeypatch.setattr("diffgraft.generation.adapter_library.load_adapter", load)
    monkeypatch.setattr("diffgraft.bases.loading._from_hub", lambda *_: pytest.fail("looked up on the hub"))
    monkeypatch.setattr("diffgraft.generation.regenerate.load_base", cache(load_base))  # most records name the same
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "broken.safetensors").write_bytes(b"\xff" * 100)
    refused = 0
    for number, changed in enumerate(hostile(record)):
        drawn.info = {RECORD: json.dumps(changed)}
        file = save_drawing(drawn, tmp_path / "a.png")
        file = file.rename(tmp_path / "b.png")
        try:
            regenerate(file, Sources(base if number % 13 else None, (), tmp_path / "lib"))
        except DiffgraftError:
            refused += 1
    assert refused > 100


def test_reading_takes_no_time_on_purpose() -> None:
    start = time.process_time()
    read_parameters("x\n" + "n" * 200_000)
    split_tags("<a:" * 20_000)
    for _ in notes_on("[" * 2_000, 20):
        pass
    assert time.process_time() - start < 5


def test_moments_in_steps_may_begin_at_the_first() -> None:
    (tag,) = split_tags("<lora:a:0@0,1@5>")[1]
    assert tag.denoiser == (Point(0, 0, True), Point(1, 5, True))
    (tag,) = split_tags("<lora:a:0@0,1@1>")[1]
    assert not tag.denoiser[0].in_steps


def test_notes_are_true() -> None:
    assert not [*notes_on("a [dog:cat:1.5]", 20, has_second_pass=True)]
    assert [*notes_on("a [dog:cat:1.5]", 20)]
    assert not [*notes_on(r"a \\ b", 20)]
    assert [*notes_on(r"a \ b", 20)]


@pytest.mark.parametrize("text", ["{" + "9" * 400 + "::a|b}", "{" + "9" * 5000 + "$$a|b}", "{0::a|0::b}"])
def test_choices_of_odd_numbers_are_refused(text: str) -> None:
    with pytest.raises(DiffgraftError, match="The choice"):
        draw_choices(text, 1)


def test_wildcards_lie_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret", "utf-8")
    (tmp_path / "words").mkdir()
    with pytest.raises(DiffgraftError, match="There is no wildcard"):
        draw_choices(f"__{tmp_path}/secret__", 1, tmp_path / "words")
    with pytest.raises(DiffgraftError, match="There is no folder of wildcards"):
        draw_choices("__x__", 1, tmp_path / "none")
    assert draw_choices("{a|a} " * 300, 1) == "a " * 300


def test_no_noise_level_comes_twice() -> None:
    sampler = named_sampler("dpm++ 3m sde")
    sigmas = sampler_sigmas(sampler, "simple", 1000, LEVELS)
    assert len(set(sigmas)) == len(sigmas)


def test_names_of_runs_and_of_several_files(base: Base, library: Path, tmp_path: Path) -> None:
    for name in ("one/adapter", "two/adapter", "two/checkpoints/step-1/adapter", "two/checkpoints/step-1/optimizer"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.safetensors").write_bytes((library / "lora.safetensors").read_bytes())
    names = Session(base, tmp_path).library
    assert names.find("two") == tmp_path / "two" / "adapter.safetensors"
    with pytest.raises(
        DiffgraftError, match="adapter is the name of 2 adapters: write one of one/adapter, two/adapter"
    ):
        names.find("adapter")
    with pytest.raises(DiffgraftError, match=r"There is no adapter 'optimizer' in .*: known are: one, two"):
        names.find("optimizer")
    with pytest.raises(DiffgraftError, match="There is no adapter '~nosuch'"):
        names.find("~nosuch")


def test_a_base_that_is_not_here_is_asked_for(base: Base, tmp_path: Path) -> None:
    (drawn,) = Session(base).draw("a dog", [3], DrawSettings(steps=1))
    record = json.loads(drawn.info[RECORD])
    drawn.info = {RECORD: json.dumps({**record, "base": "someone/model"})}
    with pytest.raises(DiffgraftError, match="someone/model, which is not here: give it by --base"):
        regenerate(save_drawing(drawn, tmp_path / "a.png"))
    assert load_base("tiny").generation_hash == record["base_hash"]
