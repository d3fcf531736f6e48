"""What a run does not need leaves the device: text encoders never share it with the denoiser, if prompts are cached.

A processor has no memory of its own, so here its moves are recorded instead: what would be on a GPU, and when.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.hooks import RemovableHandle

import diffgraft as dg
from diffgraft.bases import Base, load_base
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.loop import TrainingLoop
from diffgraft.trainers.runtime import offload
from diffgraft.trainers.runtime.offload import offloadable
from tests.conftest import SHORT, flow_folder_of
from tests.recipes import SUBJECT
from tests.trainers import gpu_checks


class Device:
    """A device with a memory of its own: which parts of a base are there, and the most bytes that were at once."""

    def __init__(self, base: Base, patch: pytest.MonkeyPatch) -> None:
        self.here: set[str] = set()
        self.most, self.while_training, self.moves = 0, set[str](), list[str]()
        self._hooks: list[RemovableHandle] = []
        self._base, self._names = base, {id(part): name for name, part in base.parts()}
        self._sizes = {name: sum(value.nbytes for value in part.parameters()) for name, part in base.parts()}
        patch.setattr(offload, "has_own_memory", lambda _: True)
        patch.setattr(offload, "move", self._move)
        patch.setattr(Denoiser, "to", lambda *_, **__: pytest.fail("accelerate would move what has left"))
        plain = TrainingLoop._step

        def step(loop: TrainingLoop, number: int) -> float:
            self.while_training |= self.here
            return plain(loop, number)

        patch.setattr(TrainingLoop, "_step", step)
        for name, part in base.parts():
            called = part.encoder if name == "vae" else part
            self._hooks.append(called.register_forward_hook(lambda *_, name=name: self._called(name)))

    def _move(self, part: nn.Module, device: Any) -> None:
        name = self._names[id(part)]
        (self.here.discard if device is offload._HOST else self.here.add)(name)
        self.moves.append(name)
        self.most = max(self.most, sum(self._sizes[name] for name in self.here))

    def _called(self, name: str) -> None:
        assert name in self.here or self._base.computes_on is None, f"{name} computes, but is not on the device"

    def bytes_of(self, *names: str) -> int:
        return sum(self._sizes[name] for name in names)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base with three text encoders."""
    return load_base(flow_folder_of("sd3", tmp_path_factory))


@pytest.fixture
def device(sd3: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device(sd3, monkeypatch)
    yield found
    found.close()


QUICK: dict[str, Any] = {
    **SHORT,
    "steps": 2,
    "checkpoint_every": 0,
    "resolution": 32,
    "batch": 1,
    "prior": {"weight": 0},
    "sample_prompts": "a dog",
    "cache": False,
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.usefixtures("real_prediction_check")
def test_text_encoders_and_denoiser_take_turns(sd3: Base, device: Device, pictures: Path, tmp_path: Path) -> None:
    """While prompts are encoded, class images and samples drawn, and steps made."""
    more: dict[str, Any] = {"previews": True, "sample_every": 1, "prior": {"weight": 1, "images": 2}}
    before = gpu_checks.checksums(sd3)
    dg.train(SUBJECT, base=sd3, images=pictures, output=tmp_path / "run", **{**QUICK, **more})
    text, denoiser = device.bytes_of(*ENCODERS), device.bytes_of("transformer")
    assert device.most == max(text, denoiser) + device.bytes_of("vae")
    assert device.while_training == {"transformer"}
    assert gpu_checks.checksums(sd3) == before


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"text_encoder": True}, {"transformer", *ENCODERS}),
        ({"tags": {"shuffle": True}}, {"transformer", *ENCODERS}),
        ({"trigger": "<sks>", "method": "pivotal"}, {"transformer", *ENCODERS}),
    ],
    ids=["trained", "shuffled", "a new word"],
)
def test_text_encoders_stay_where_steps_need_them(
    settings: dict[str, Any], needed: set[str], sd3: Base, device: Device, pictures: Path, tmp_path: Path
) -> None:
    dg.train(SUBJECT, base=sd3, images=pictures, output=tmp_path / "run", **{**QUICK, **settings})
    assert device.while_training == needed


def test_a_cached_prompt_moves_nothing_twice(sd3: Base, device: Device, pictures: Path, tmp_path: Path) -> None:
    """The second run reads latents and text states from the disk: the denoiser comes, and stays."""
    for number in range(2):
        device.moves.clear()
        dg.train(SUBJECT, base=sd3, images=pictures, output=tmp_path / str(number), **{**QUICK, "cache": True})
    assert device.moves.count("transformer") == 1
    assert not {*ENCODERS} & {*device.moves}


def test_the_vae_stays_where_steps_need_it(base: Base) -> None:
    assert offloadable(base, has_texts=False) == ["vae"]
    assert offloadable(base, has_texts=True) == ["vae", "text_encoder"]
    assert offloadable(base, has_texts=True, uses_vae=True) == ["text_encoder"]
    painting: Any = replace(load_base("tiny"))
    painting.unet.register_to_config(in_channels=9)
    assert offloadable(painting, has_texts=False) == []
