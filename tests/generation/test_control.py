"""Pictures steered by condition pictures: as by diffusers' pipelines, told by their files, and drawn again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.controlnet import ControlNetwork
from diffgraft.bases import Base, load_base
from diffgraft.cli.main import app
from diffgraft.edges import edges
from diffgraft.errors import DiffgraftError
from diffgraft.generation.control import ControlInput
from diffgraft.generation.graft import graft
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.metadata import PARAMETERS, save_drawing
from diffgraft.generation.regenerate import Sources, regenerate
from diffgraft.generation.regions import Region
from diffgraft.generation.sampling import Job, Pass, Progress
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.progress import phase
from diffgraft.rng import normal

FEW = DrawSettings(steps=4)


def network_of(base: Base, size: float = 0.1) -> ControlNetwork:
    """A control network of a base with random outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = base.family.control_network(base)
    tensors = {
        name: normal(tuple(value.shape), 2, place) * size if "controlnet_" in name and not value.any() else value
        for place, (name, value) in enumerate(module.state_dict().items())
    }
    return ControlNetwork(tensors, base.family.control_settings(module))


def adapter_of(base: Base, size: float = 0.1) -> Adapter:
    return Adapter({}, {"method": "controlnet"}, (network_of(base, size),))


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture with edges, of which a half is not like the other."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    pixels[8:30, 5:40] = (220, 180, 60)
    pixels[20:44, 30:60] = (60, 200, 230)
    return Image.fromarray(pixels)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_latents_are_those_of_the_pipelines_of_diffusers(family: str, start: float, end: float, folders: Path) -> None:
    base = load_base(folders / family)
    source = network_of(base, 0.05)
    settings = replace(FEW, guidance=5.0, size=(64, 48), negative="" if family == "sdxl" else "a cat")
    session, pipe = Session(base), base.pipeline()
    session.steer(Adapter({}, {}, (source,)), ControlInput(photo(), "edges", 0.7, start, end))
    work = Pass([Job(0, "a dog", 7)], settings, (64, 48), 4, steering=session._steering)
    with torch.no_grad(), phase("drawing", 4) as tracker:
        ours = session.painter.sample(work, Progress(tracker, None))
        bare = session.painter.sample(replace(work, steering=None), Progress(tracker, None))
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "ControlNetPipeline"))
    given = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    more = {"add_watermarker": False} if family == "sdxl" else {"requires_safety_checker": False}
    scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config, timestep_spacing="linspace", steps_offset=0)
    theirs = kind(**given, scheduler=scheduler, controlnet=source.build(base), **more)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        "a dog",
        image=edges(photo()),
        negative_prompt=settings.negative or None,
        num_inference_steps=4,
        guidance_scale=5.0,
        width=64,
        height=48,
        controlnet_conditioning_scale=0.7,
        control_guidance_start=start,
        control_guidance_end=end,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    scale = float(drawn.abs().max())
    assert float((ours - bare).abs().max()) > 0.002 * scale
    assert float((ours - drawn).abs().max()) < 1e-4 * scale


def test_strength_zero_draws_as_without_and_the_rest_in_proportion(base: Base) -> None:
    session = Session(base)
    (bare,) = pixels(session.draw("a dog", [1], FEW))
    off = []
    for strength in (0.0, 0.5, 1.0):
        session.steer(adapter_of(base), ControlInput(photo(), "edges", strength))
        (drawn,) = pixels(session.draw("a dog", [1], replace(FEW, size=(64, 64))))
        off.append(np.abs(drawn - bare).mean())
    assert off[0] == 0
    assert 0 < off[1] < off[2]
    session.stop_steering()
    assert np.array_equal(pixels(session.draw("a dog", [1], FEW))[0], bare)


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        (FEW, None),
        (replace(FEW, size=(96, 48), sampler="dpm++ 2s a"), None),
        (replace(FEW, hires=Hires(1.5, 0.6, 3, "lanczos")), None),
        (FEW, ImageInput(photo((64, 64)), 0.6)),
        (replace(FEW, regions=(Region("a cat", (0.0, 0.0, 0.5, 1.0)),)), None),
    ],
)
def test_pictures_tell_it_and_are_drawn_again(
    settings: DrawSettings, image: ImageInput | None, base: Base, tmp_path: Path
) -> None:
    (tmp_path / "library").mkdir()
    file = adapter_of(base).save(tmp_path / "library" / "lines.safetensors")
    control = ControlInput(photo(), "edges", 0.8, 0.1, 0.9)
    with Session(base) as session:
        plain = session.draw("a dog", [3], settings, image)
        session.steer(file, control)
        drawn = session.draw("a dog", [3], settings, image)
    if settings.size is not None or image is not None:  # else the condition picture decides the size
        assert not np.array_equal(pixels(plain), pixels(drawn))
    path = save_drawing(drawn[0], tmp_path / "drawn.png")
    told = drawn[0].info[PARAMETERS]
    assert 'ControlNet 0: "Module: canny, Model: lines [' in told
    assert "Weight: 0.8, Guidance Start: 0.1, Guidance End: 0.9" in told
    source = Sources(
        None, (), tmp_path / "library", None if image is None else image.image, None, control=control.image
    )
    again = regenerate(path, source)
    assert again.differences == []
    assert again.has_same_pixels is True
    with pytest.raises(DiffgraftError, match=r"was steered by a condition picture.*give that picture by --control"):
        regenerate(path, replace(source, control=None))
    with pytest.raises(DiffgraftError, match="was steered by another picture"):
        regenerate(path, replace(source, control=Image.new("RGB", (64, 48))))
    with pytest.raises(DiffgraftError, match=r"adapter lines .* not here"):
        regenerate(path, replace(source, library=None))


def test_the_size_is_that_of_the_condition_picture(base: Base) -> None:
    with Session(base) as session:
        session.steer(adapter_of(base), ControlInput(photo((128, 64))))
        (drawn,) = session.draw("a dog", [1], FEW)
    assert drawn.size == (88, 48)


def test_a_large_picture_is_steered_where_regions_are_drawn_alone(base: Base) -> None:
    """A region that is predicted alone gets its part of the condition picture."""
    session = Session(base)
    session.steer(adapter_of(base), ControlInput(photo((128, 64))))
    assert session._steering is not None
    control = session._steering.for_pass((128, 64), 4, 4)
    whole, part = control.signal(0, None, 2), control.signal(0, (slice(0, 16), slice(8, 24)), 3)
    assert whole is not None
    assert part is not None
    assert whole.pictures.shape == (2, 3, 64, 128)
    assert torch.equal(part.pictures, whole.pictures[:1, :, :, 32:96].expand(3, -1, -1, -1))


def test_a_network_of_half_precision_draws(base: Base) -> None:
    half = load_base("tiny", torch.bfloat16)
    with Session(half) as session:
        session.steer(adapter_of(base), ControlInput(photo(), "edges"))
        assert {value.dtype for value in session._steering.network.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
        assert pixels(session.draw("a dog", [1], FEW)).std() > 5


def test_the_public_function_and_the_command(base: Base, tmp_path: Path) -> None:
    adapter = adapter_of(base)
    adapter.save(tmp_path / "lines.safetensors")
    photo().save(tmp_path / "photo.png")
    steered: dict[str, Any] = {"control": tmp_path / "photo.png", "control_net": adapter, "control_by": "edges"}
    (first,) = dg.generate("a dog", base=base, seed=5, steps=3, **steered)
    output = tmp_path / "out"
    told = ["generate", "a dog", "--seed", "5", "--steps", "3", "-o", str(output), "--control"]
    told += [str(tmp_path / "photo.png"), "--control-net", str(tmp_path / "lines.safetensors"), "--control-by", "edges"]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    (file,) = output.glob("*.png")
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(first))
    given = ["-a", str(tmp_path / "lines.safetensors"), "--control", str(tmp_path / "photo.png")]
    again = CliRunner().invoke(app, ["regenerate", str(file), *given, "-o", str(output)])
    assert "Its pixels are the same." in again.output


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"control": "PHOTO"}, "control needs a control network, but control_net is missing"),
        ({"control_net": "NET"}, "control_net needs a condition picture, but control is missing"),
        ({"control_strength": 0.5}, "control_strength needs a condition picture, but control is missing"),
        ({"control": "nowhere.png", "control_net": "NET"}, "The picture nowhere.png does not exist"),
        ({"control": 5, "control_net": "NET"}, "Invalid value control=5: must be a path or a picture"),
        ({"control": "NET", "control_net": "NET"}, "cannot be read as a picture"),
        ({"control": "PHOTO", "control_net": "PHOTO"}, "photo.png"),
        ({"control": "PHOTO", "control_net": "nowhere"}, "There is no adapter 'nowhere'"),
        ({"control": "PHOTO", "control_net": 5}, "Invalid value control_net=5"),
        ({"control": "PHOTO", "control_net": "LORA"}, "lora is not a control network, but an adapter of the method"),
        ({"control": "PHOTO", "control_net": "XL"}, "xl does not fit this base: it is for a base with block_out"),
        ({"control": "PHOTO", "control_net": "NET", "control_by": "depth"}, "Invalid value control_by='depth'"),
        ({"control": "PHOTO", "control_net": "NET", "control_strength": -1}, "control_strength=-1: must be 0 to 10"),
        ({"control": "PHOTO", "control_net": "NET", "control_start": 0.6, "control_end": 0.5}, "the start before"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(
    options: dict[str, Any], answer: str, base: Base, short_run: Any, folders: Path, tmp_path: Path
) -> None:
    photo().save(tmp_path / "photo.png")
    files = {"PHOTO": tmp_path / "photo.png", "NET": tmp_path / "net.safetensors", "XL": tmp_path / "xl.safetensors"}
    adapter_of(base).save(files["NET"])
    adapter_of(load_base(folders / "sdxl")).save(files["XL"])
    files["LORA"] = tmp_path / "lora.safetensors"
    files["LORA"].write_bytes(short_run.adapter_file.read_bytes())
    given = {name: files.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(DiffgraftError, match=answer):
        dg.generate("a dog", base=base, steps=2, **given)


def test_as_an_adapter_it_is_refused(base: Base) -> None:
    with pytest.raises(DiffgraftError, match="needs a condition picture: give it as control_net"):
        graft(base, {adapter_of(base): 1.0})


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "it is a 'UNet2DConditionModel', and not a ControlNetModel"),
        ({"down_block_types": ["Nonsense"] * 3}, "its settings are not those of a ControlNet"),
        ({"conditioning_embedding_out_channels": [16, 32]}, "do not fit together"),
        ({"norm_num_groups": "many"}, "its settings are not those of a ControlNet"),
        ({"cross_attention_dim": 10**9}, "for a base with cross_attention_dim 1000000000"),
    ],
    ids=str,
)
def test_settings_of_a_hostile_file_are_refused(changed: dict[str, Any], answer: str, base: Base) -> None:
    source = network_of(base)
    with pytest.raises(DiffgraftError, match=answer):
        Session(base).steer(
            Adapter({}, {}, (ControlNetwork(source.tensors, {**source.settings, **changed}),)), ControlInput(photo())
        )


def test_files_without_configuration_and_in_the_layout_of_the_authors_are_told(base: Base, tmp_path: Path) -> None:
    from diffgraft.adapters.formats import load_adapter
    from diffgraft.files import write_safetensors

    write_safetensors(tmp_path / "bare.safetensors", network_of(base).tensors, {})
    with pytest.raises(DiffgraftError, match=r"a ControlNet without its config\.json: give the folder"):
        load_adapter(tmp_path / "bare.safetensors")
    original = {"control_model.input_hint_block.0.weight": torch.ones(2, 3)}
    write_safetensors(tmp_path / "original.safetensors", original, {})
    with pytest.raises(DiffgraftError, match=r"layout of its authors' files: convert it by diffusers"):
        load_adapter(tmp_path / "original.safetensors")


def test_the_base_keeps_its_bits_and_no_hooks(base: Base) -> None:
    def hooks(module: nn.Module) -> int:
        return sum(len(own._forward_hooks) + len(own._forward_pre_hooks) for own in module.modules())

    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    count = hooks(base.denoiser)
    with Session(base) as session:
        session.steer(adapter_of(base), ControlInput(photo()))
        session.draw("a dog", [1], FEW)
        assert hooks(base.denoiser) == count
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())
