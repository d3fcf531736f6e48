"""The evaluation of a run: what is drawn and what is kept, its files, its page, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffgraft as dg
from diffgraft.adapters.registry import with_leaves
from diffgraft.bases import Base
from diffgraft.cli.main import app
from diffgraft.demo.subject import ALIEN, POODLE
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.candidates import adapter_paths, read_candidates
from diffgraft.evaluation.evaluate import Evaluation
from diffgraft.evaluation.page import render
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import Note, Phase, reporting
from diffgraft.trainers.run.folder import Run

FEW: dict[str, Any] = {"settings": DrawSettings(steps=2), "seeds": 3, "strengths": (0.5, 1.0)}
PROMPTS = ["a {trigger} {subject}", "a sks dog <b>in</b> the snow", "a dog"]
MEASURES = ["clip-i", "contrast", "drift", "held-out"]


@pytest.fixture(scope="module")
def run(short_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run with an adapter from halfway, and with the final one also under its step."""
    folder = tmp_path_factory.mktemp("evaluated") / "dog"
    shutil.copytree(short_run.folder, folder)
    save_part(folder, 3, 0.5)
    shutil.copy(folder / "adapter.safetensors", folder / "adapters" / "step-000006.safetensors")
    return folder


def save_part(folder: Path, step: int, share: float) -> Path:
    """Save the run's adapter with a share of its change as that of a step."""
    adapter = dg.load_adapter(folder / "adapter.safetensors")
    for path, (delta,) in adapter.deltas.items():
        leaves = {name: leaf * share if name == "lora_up" else leaf for name, leaf in delta.leaves.items()}
        adapter.deltas[path] = (with_leaves(delta, leaves),)  # type: ignore[index]
    (folder / "adapters").mkdir(exist_ok=True)
    return adapter.save(folder / "adapters" / f"step-{step:06d}.safetensors")


@pytest.fixture(scope="module")
def done(run: Path, base: Base) -> Evaluation:
    held = POODLE.folder / "held-out"
    return dg.evaluate(run, base=base, prompts=PROMPTS, measures=MEASURES, held_out=held, **FEW)


def test_all_saved_adapters_are_compared_once(done: Evaluation, run: Path) -> None:
    titles = [entry.title for entry in done.entries]
    assert titles == ["step 3 at 0.5", "step 3 at 1", "final at 0.5", "final at 1"]
    assert [entry.step for entry in done.entries] == [3, 3, 6, 6]
    assert done.folder == run / "evaluation"
    prompts = done.target.prompts
    assert prompts.trained == ("a sks dog", "a sks dog <b>in</b> the snow")
    assert prompts.plain == ("a dog", "a dog <b>in</b> the snow")
    assert prompts.of_class == ("a dog",)
    assert len(done.target.references) == 5
    assert len(done.target.held_out) == 8
    # the base draws two prompts, adapters three, with three seeds each
    assert done.drawn == 3 * (2 + 4 * 3)
    assert len(list((done.folder / "pictures").glob("*.png"))) == done.drawn


def test_checkpoints_are_compared_too(run: Path, base: Base, tmp_path: Path) -> None:
    """Of a run that was stopped at step 3, or that has finished at step 6, where the newest is the final adapter."""
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluation", "adapters"))
    assert [name for name, _, _ in adapter_paths(folder)] == ["step 3", "final"]
    (folder / "adapter.safetensors").unlink()
    bits = {name: value.clone() for name, value in base.unet.state_dict().items()}
    first, last = read_candidates([folder], base)
    assert [(one.name, one.step) for one in (first, last)] == [("step 3", 3), ("step 6", 6)]
    assert first.hash != last.hash
    wanted = dg.load_adapter(run / "adapter.safetensors")
    for path, (delta,) in wanted.deltas.items():
        for name, leaf in delta.leaves.items():
            assert torch.equal(last.adapter.deltas[path][0].leaves[name], leaf)
    up = next(iter(wanted.deltas))
    assert not torch.equal(first.adapter.deltas[up][0].leaves["lora_up"], wanted.deltas[up][0].leaves["lora_up"])
    assert all(torch.equal(value, bits[name]) for name, value in base.unet.state_dict().items())
    (folder / "checkpoints" / "step-000003" / "parameters.safetensors").write_bytes(b"damaged")
    with pytest.raises(DiffgraftError, match="step-000003 is damaged"):
        read_candidates([folder], base)


def test_pictures_are_those_of_a_session_with_the_adapter(done: Evaluation, run: Path, base: Base) -> None:
    (entry,) = (entry for entry in done.entries if entry.title == "final at 0.5")
    with dg.Session(base) as session:
        session.use(run / "adapter.safetensors", 0.5)
        (own,) = session.draw(done.target.prompts.trained[1], [done.seeds[2]], FEW["settings"])
        session.remove("dog")
        (bare,) = session.draw("a dog", [done.seeds[0]], FEW["settings"])
    for found, wanted in ((entry.drawn.trained[1][2], own), (done.bare_drawn.trained[0][0], bare)):
        gap = np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int))
        assert gap.max() <= 1  # batches of other sizes round in another way
    assert done.bare_drawn.of_class[0][0] is done.bare_drawn.trained[0][0]


def test_losses_are_those_of_the_base_with_the_adapter(done: Evaluation, run: Path, base: Base) -> None:
    from diffgraft.trainers.hooks.validation_set import validation_set_from_images

    held = done.target.held_out
    wanted = []
    with dg.graft(base, {run / "adapter.safetensors": 1.0}):
        for seed in range(3):
            pairs = validation_set_from_images(base, [picture.image for picture in held], None, 16, seed)
            wanted.append(pairs.loss(base, [picture.prompt for picture in held]))
    found = done.entries[-1].figures["held-out"]
    assert {picture.prompt for picture in held} == {"a sks dog"}
    assert found.value == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert found.error == pytest.approx(float(torch.tensor(wanted).std()) / 3**0.5, rel=1e-4)


def test_a_second_call_draws_only_what_is_new(done: Evaluation, run: Path, base: Base) -> None:
    more = {"base": base, "prompts": PROMPTS, "measures": MEASURES[:2], **FEW}
    notes: list[str] = []

    def keep(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with reporting(keep):
        again = dg.evaluate(run, **more)
    assert again.drawn == 0
    assert notes[-1] == "42 pictures were kept from earlier evaluations, 0 were drawn."
    for before, after in zip(done.entries, again.entries, strict=True):
        assert after.figures["clip-i"] == before.figures["clip-i"]
    kept = next((done.folder / "pictures").glob("*.png"))
    kept.write_bytes(b"damaged")
    new = save_part(run, 4, 0.8)
    try:
        assert dg.evaluate(run, **{**more, "strengths": (1.0,)}).drawn in (3 * 3, 3 * 3 + 1)
        settings = DrawSettings(steps=2, guidance=2.0)
        assert dg.evaluate(
            new,
            **{**more, "strengths": (1.0,), "settings": settings},
            images=ALIEN.folder / "learn",
            output=done.folder,
        ).drawn == 3 * (2 + 3)
    finally:
        new.unlink()


def test_the_report_is_json_and_the_page_needs_nothing(done: Evaluation) -> None:
    report = json.loads(json.dumps(done.as_json(), allow_nan=False))
    assert report["recommended"]["name"] == done.best.name
    assert report["entries"][0]["figures"]["clip-i"]["value"] == done.entries[0].figures["clip-i"].value
    assert report["bare"]["drift"]["value"] == pytest.approx(0, abs=1e-6)
    page = render(done, 'Evaluation of <script>alert("x")</script>')
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a sks dog &lt;b&gt;in&lt;/b&gt; the snow" in page
    assert "<b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert "http" not in page.replace("http-equiv", "")
    uri = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # recommended: 2; sheets: 3 prompts, the base and 4 entries each; references: 5
    assert len(uri) == 2 + 3 * 5 + 5
    assert page.count('<svg viewBox="0 0 360 240"') == 1 + len(MEASURES)
    for attribute in ('width="device-width', "prefers-color-scheme: dark"):
        assert attribute.split('"')[-1] in page


def test_the_command_shows_a_table_and_writes_both_files(run: Path, tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("a sks dog\na sks dog at night\n", "utf-8")
    words = ["evaluate", str(run / "adapters" / "step-000003.safetensors"), "--strengths", "1", "--seeds", "2"]
    words += ["--prompts", str(listed), "--images", str(POODLE.folder / "learn"), "--steps", "2"]
    words += ["--measure", "clip-i", "--measure", "contrast", "-o", str(tmp_path / "out"), "--progress", "none"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert re.search(r"verdict +CLIP-I +follows prompts", lines[0])
    assert lines[1].startswith("base alone")
    assert re.match(
        r"→ step-000003 at 1 +(too little|good|overcooked) +\d\.\d{3} \([+-]\d\.\d{3} ± \d\.\d{3}\)", lines[2]
    )
    assert json.loads((tmp_path / "out/evaluation.json").read_text("utf-8"))["seeds"] == [60000, 60001]
    assert (tmp_path / "out/evaluation.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.fixture
def broken(tmp_path: Path, run: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluation", "adapters", "checkpoints"))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": []}, "must be a list of numbers"),
        ({"strengths": [0.0]}, "the base alone"),
        ({"seeds": 0}, "Invalid value seeds=0"),
        ({"measures": ["clip-i"]}, r"rates following.*add one of contrast"),
        ({"measures": ["clip-i", "contrast", "held-out"]}, r"held-out cannot be computed.*--held-out"),
        ({"measures": ["clip-i", "contrast", "kid"], "seeds": 2}, "at least 3 seeds, and there are 2"),
        ({"encoders": {"sound": "x"}}, "Unknown encoder 'sound'"),
        ({"prompts": ["a dog"]}, "mentions the trigger 'sks'"),
        ({"prompts": "prompts.json"}, "must be a .txt file"),
        ({"images": "nowhere"}, "nowhere does not exist"),
        ({"weights": 1}, "Unknown option weights="),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_drawn(
    run: Path, base: Base, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffgraft.evaluation.drawing.Artist.draw", lambda *_: pytest.fail("it draws"))
    with pytest.raises(DiffgraftError, match=message):
        dg.evaluate(run, **{"base": base, **options})


def test_sources_that_are_no_adapters_are_refused(run: Path, broken: Path, base: Base, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="nothing to evaluate"):
        dg.evaluate()
    with pytest.raises(DiffgraftError, match="no run and no adapter at"):
        dg.evaluate(tmp_path / "nothing")
    (broken / "adapter.safetensors").unlink()  # it has no checkpoints either
    with pytest.raises(DiffgraftError, match=r"has saved no adapter yet.*adapter_every=100"):
        dg.evaluate(broken)
    file = tmp_path / "other.safetensors"
    Image.new("RGB", (4, 4)).save(file, "PNG")
    with pytest.raises(DiffgraftError, match="other"):
        dg.evaluate(run, file, base=base)
    with pytest.raises(DiffgraftError, match=r"does not hold the pictures.*--images"):
        dg.evaluate(run / "adapter.safetensors", base=base)


def test_progress_is_told(run: Path, base: Base) -> None:
    phases: list[Phase] = []

    def keep(event: object) -> None:
        if isinstance(event, Phase):
            phases.append(event)

    with reporting(keep):
        dg.evaluate(run, base=base, prompts=PROMPTS, measures=MEASURES[:2], **FEW)
    assert ("evaluating", 5) in [(event.name, event.total) for event in phases]
