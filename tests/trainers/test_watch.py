"""Watching every picture: losses at fixed noise, what curves tell, and that training does not notice."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.progress import Note, reporting
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.hooks.watch import WatchSet
from diffgraft.trainers.hooks.watch_findings import find, table
from diffgraft.trainers.hooks.watch_record import WatchedPicture, WatchRecord, read_record
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import TrainingData, build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from tests.conftest import SHORT
from tests.recipes import SUBJECT

CPU = torch.device("cpu")


def data_of(base: Base, pictures: Path, **settings: Any) -> TrainingData:
    given = {"images": str(pictures), "subject": "dog", "prior": {"weight": 0}, **settings}
    recipe = load_recipe(SUBJECT, given)
    return build_training_data(recipe.data, recipe.validation, recipe.seed, base, read_concepts(recipe)[1])


def test_a_measurement_is_its_formula(base: Base, pictures: Path) -> None:
    data = data_of(base, pictures, validation={"share": 0.2})
    asked: list[tuple[Tensor, Tensor, list[str]]] = []

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[Any]) -> Tensor:
        assert len(noisy) == len(times) == len(prompts) == len(frames)
        asked.append((noisy, times, list(prompts)))
        return 0.5 * noisy if prompts[0] else 0.1 * noisy

    process = forward_process(base)
    watched = WatchSet(process, data.instances, data.held_out)
    found = list(watched.measure(predict, CPU))
    assert [picture.is_held_out for picture in watched.pictures()] == [False] * 4 + [True]
    assert {prompt for *_, prompts in asked for prompt in prompts} == {"a sks dog", ""}
    each = len(asked) // 5
    for index, (loss, gain) in enumerate(found):
        noisy = torch.cat([own for own, *_ in asked[index * each : (index + 1) * each]]).double().numpy()
        times = torch.cat([own for _, own, _ in asked[index * each : (index + 1) * each]])
        count = len(times) // 2
        assert torch.equal(times[:count], times[count:])
        group, example = watched.members[index]
        clean = group.encoded.latents[example.rows[0]][0].double().numpy()
        schedule = base.scheduler.alphas_cumprod.double().numpy()[times[:count]][:, None, None, None]
        noise = (noisy[:count] - schedule**0.5 * clean) / (1 - schedule) ** 0.5
        velocity = schedule**0.5 * noise - (1 - schedule) ** 0.5 * clean
        target = velocity if base.parameterization.name == "v_prediction" else noise
        own, bare = (((factor * noisy[:count] - target) ** 2).mean((1, 2, 3)) for factor in (0.5, 0.1))
        assert loss == pytest.approx(own.mean(), rel=1e-4)
        assert gain == pytest.approx(np.log(bare / own).mean(), rel=1e-3)
        if index == 0:
            first = noise
        np.testing.assert_allclose(noise, first, atol=1e-3)  # the same for each picture


def test_training_does_not_notice_that_it_is_watched(
    base: Base, pictures: Path, short_run: Run, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**SHORT, "images": pictures, "watch_every": 2}
    notes: list[str] = []
    with reporting(lambda event: notes.append(event.text) if isinstance(event, Note) else None):
        whole = train(SUBJECT, base=base, output=tmp_path / "whole", **settings)
    assert whole.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()
    record = read_record(whole.folder / "watch.json")
    assert record.steps == (0, 2, 4, 6)
    assert [picture.name for picture in record.pictures] == [f"{number:02}.png" for number in range(1, 6)]
    content = json.loads((whole.folder / "watch.json").read_text("utf-8"))
    assert [finding["sentence"] for finding in content["findings"]] == [found.sentence for found in find(record)]
    assert all(found.sentence in notes for found in find(record))
    with Image.open(whole.folder / "watch.png") as plot:
        assert plot.width > 400
    part = train(SUBJECT, base=base, output=tmp_path / "part", **{**settings, "steps": 4})
    assert read_record(part.folder / "watch.json") == record.up_to(4)
    again = train(base=base, resume=part.folder, steps=6)
    for name in ("adapter.safetensors", "watch.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def record_of(curves: dict[str, Sequence[float]], gains: dict[str, float] | None = None, **more: Any) -> WatchRecord:
    """A record with these losses by name, and a constant gain of each; names that begin with - are held out."""
    gains = gains or {}
    pictures = tuple(WatchedPicture(name=name, prompt="a", is_held_out=name[0] == "-") for name in curves)
    losses = tuple(zip(*curves.values(), strict=True))
    row = tuple(gains.get(name, 0.1) for name in curves)
    return WatchRecord(
        pictures=pictures, steps=tuple(range(len(losses))), losses=losses, gains=(row,) * len(losses), **more
    )


FALLING = [1.0, 0.9, 0.8, 0.72, 0.65, 0.58]


def named(record: WatchRecord) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in find(record):
        found.setdefault(finding.kind, []).extend(finding.pictures)
    return found


def test_what_curves_tell() -> None:
    usual: dict[str, Sequence[float]] = dict.fromkeys("abcd", FALLING)
    assert named(record_of(usual)) == {}
    assert named(record_of({**usual, "e": FALLING}, {"e": 0.04})) == {"outlier": ["e"]}
    assert named(record_of({**usual, "e": FALLING}, {"e": 0.06})) == {}
    assert named(record_of({**usual, "e": [1, 0.8, 0.6, 0.5, 0.4, 0.3]})) == {"memorized": ["e"]}
    held_out = {"-x": [1.0, 0.95, 0.95, 0.95, 1.0, 1.05]}
    assert named(record_of({**usual, **held_out})) == {"memorized": ["a", "b", "c", "d"]}
    flat = {**usual, "e": [0.5, 0.4, 0.36, 0.35, 0.35, 0.35]}
    assert named(record_of(flat)) == {"finished": ["e"]}
    copies = record_of(usual, near_duplicates=(("a", "c"),))
    assert named(copies) == {"near-duplicate": ["a", "c"]}
    few = dict.fromkeys("abc", FALLING)
    assert named(record_of(few, {"c": -1.0})) == {}, "two others tell too little"
    assert named(record_of({**usual, "e": [math.nan] * 6}, {"e": math.nan})) == {}


def test_the_table_has_every_picture() -> None:
    lines = table(record := record_of({"a": FALLING, "b": FALLING, "-x": FALLING}), find(record))
    assert [line.split()[0] for line in lines[:4]] == ["picture", "a", "b", "-x"]
    assert "-42 %" in lines[1]
    assert "held out" in lines[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the record of a watch"),
        ("[]", "is not the record of a watch"),
        ('{"pictures": []}', ""),
        ('{"pictures": [], "steps": [1], "losses": [], "gains": []}', "do not match"),
        ('{"pictures": [], "steps": [2, 1], "losses": [[], []], "gains": [[], []]}', "not in order"),
        ('{"pictures": [], "other": 1}', "other"),
    ],
)
def test_damaged_records_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "watch.json").write_text(text, "utf-8")
    if not message:
        assert table(read_record(file), []) == ["nothing has been measured yet"]
        return
    with pytest.raises(DiffgraftError, match=message):
        read_record(file)
    with pytest.raises(DiffgraftError, match="does not exist: a run writes it"):
        read_record(tmp_path / "none.json")


def test_a_weight_of_a_picture_is_a_factor_on_its_loss(base: Base, pictures: Path) -> None:
    plain = data_of(base, pictures)
    data = data_of(base, pictures, weight=3.0, **{"picture_weights": {"02.png": 0.25, "05.png": 0}})
    weights = {example.name: example.weight for example in data.instances.examples}
    assert weights == {"01.png": 3.0, "02.png": 0.75, "03.png": 3.0, "04.png": 3.0, "05.png": 0.0}
    assert data.digest != plain.digest
    process = forward_process(base)
    batches = [SampleStream(own.instances, process, 7, CPU).batch(0, 5) for own in (plain, data)]
    prediction = torch.randn(batches[0].noisy.shape, generator=torch.Generator().manual_seed(1))
    names = [variant.example.name for variant in batches[0].variants]
    errors = ((prediction - batches[0].target).double().numpy() ** 2).mean((1, 2, 3))
    wanted = np.mean([error * weights[name] for error, name in zip(errors, names, strict=True)])
    assert float(batches[1].loss(process, prediction)) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(DiffgraftError, match=r"picture_weights\.2\.png is for no image of the run: .*02\.png"):
        data_of(base, pictures, **{"picture_weights.2.png": 0.1})
    with pytest.raises(DiffgraftError, match="leaves nothing to train on"):
        data_of(base, pictures, picture_weights={f"{number:02}.png": 0 for number in range(1, 6)})
