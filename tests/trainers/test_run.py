"""Runs from end to end: what they leave, that they resume, that the base is untouched, that they learn."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base, load_base
from diffgraft.demo.subject import POODLE
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.hooks.validation_set import validation_set_from_images
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import collect_samples, encode_samples
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.prompts import prompt_builders
from diffgraft.trainers.training_data.templates import OBJECT, STYLE
from tests.conftest import SHORT
from tests.drawing import generate
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after


def bits(base: Base) -> str:
    digest = hashlib.sha256()
    for _, part in base.parts():
        for name, value in part.state_dict().items():
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_a_run_leaves_what_it_promises(base: Base, short_run: Run) -> None:
    names = {path.name for path in short_run.folder.iterdir() if path.name != ".lock"}
    promised = {"adapter.safetensors", "recipe.yaml", "metrics.jsonl", "loss.png", "before-after.png", "checkpoints"}
    assert names == promised
    header = short_run.adapter.metadata
    assert header["method"] == "lora"
    assert (header["rank"], header["alpha"], header["trigger"], header["class"]) == (8, 8.0, "sks", "dog")
    assert header["base"] == {
        "name": "tiny",
        "family": "sd1",
        "hash": base.hash,
        "layers_per_block": 1,
        "prediction_type": "v_prediction",
    }
    assert header["seed"] == 3
    assert len(header["data"]) == 64
    assert set(header["versions"]) >= {"diffgraft", "torch", "diffusers", "peft"}
    text = json.dumps(dict(header))
    assert str(short_run.folder) not in text
    lines = [json.loads(line) for line in (short_run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["instance"] + 2 * line["prior"], rel=1e-5)
    for name in ("loss.png", "before-after.png"):
        with Image.open(short_run.folder / name) as image:
            assert np.asarray(image).std() > 10
    assert all(value.abs().max() > 0 for value in load_file(short_run.adapter_file).values())


def test_training_leaves_every_bit_of_the_base(base: Base, pictures: Path, tmp_path: Path) -> None:
    before = bits(base)
    train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", text_encoder=True, **{**SHORT, "steps": 2})
    assert bits(base) == before
    assert not any(value.requires_grad for _, part in base.parts() for value in part.parameters())
    parts = {path.partition(".")[0] for path in load_adapter(tmp_path / "run" / "adapter.safetensors").modules}
    assert parts == {"unet", "text_encoder"}


def test_an_interrupted_run_goes_on(base: Base, pictures: Path, tmp_path: Path, short_run: Run) -> None:
    """Stopped after step 3 and resumed, it ends where the run that was never stopped ended."""
    folder = tmp_path / "run"
    with interrupted_after(4):
        train(SUBJECT, base=base, images=pictures, output=folder, **SHORT)
    assert not (folder / "adapter.safetensors").exists()
    with pytest.raises(DiffgraftError, match=r"unfinished run.*--resume"):
        train(SUBJECT, base=base, images=pictures, output=folder, **SHORT)
    with pytest.raises(DiffgraftError, match="output cannot be changed when resuming"):
        train(base=base, resume=folder, output=tmp_path / "other")
    newest = folder / "checkpoints" / "step-000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:50])
    with pytest.warns(UserWarning, match="step-000004 is damaged"):
        run = train(base=base, resume=folder)
    assert run.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()
    assert list(run.metrics) == list(short_run.metrics)
    again = train(base=base, resume=folder)
    assert list(again.metrics) == list(run.metrics)
    with pytest.raises(DiffgraftError, match="already holds a finished run"):
        train(SUBJECT, base=base, images=pictures, output=folder, **SHORT)


def test_an_update_is_whole_before_it_is_interrupted(
    base: Base, pictures: Path, tmp_path: Path, short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the fifth one: that is done and recorded first, and goes into a checkpoint."""
    folder, real, calls = tmp_path / "run", torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *words: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(SUBJECT, base=base, images=pictures, output=folder, **SHORT)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000003", "step-000005"]
    assert len((folder / "metrics.jsonl").read_text("utf-8").splitlines()) == 5
    run = train(base=base, resume=folder)
    assert run.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


def test_an_update_that_was_cut_short_is_not_kept(
    base: Base, pictures: Path, tmp_path: Path, short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the interruption is no signal, it may come when some weights have moved: the checkpoint before counts."""
    folder, real, calls = tmp_path / "run", torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *words: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            self.param_groups[0]["params"][0].data += 1
            raise KeyboardInterrupt
        return real(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(SUBJECT, base=base, images=pictures, output=folder, **SHORT)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    run = train(base=base, resume=folder)
    assert run.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()


def test_the_header_holds_the_hash_of_the_base_alone(pictures: Path, tmp_path: Path) -> None:
    """A run without class images asks for it only after the adapter was attached."""
    held = load_base("tiny")
    run = train("style", base=held, images=pictures, output=tmp_path / "run", steps=1, sample_prompts="a dog")
    assert run.adapter.metadata["base"]["hash"] == load_base("tiny").hash


def test_the_default_base_is_not_a_folder_that_is_called_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    run = train("style", images=pictures, output="run", steps=1, previews=False)
    assert run.adapter.metadata["base"]["name"] == "tiny"


@pytest.mark.filterwarnings(
    "ignore:.*modules never received a gradient"
)  # the middle sees one latent: nothing to attend to
def test_the_recipe_of_stable_diffusion_15_runs(pictures: Path, folders: Path, tmp_path: Path) -> None:
    """With its own settings, on a random model of the family's shape."""
    settings: dict[str, Any] = {"steps": 2, "resolution": 64, "subject": "dog", "sample_prompts": "a dog"}
    run = train(
        "sd15-subject", base=folders / "sd1", images=pictures, output=tmp_path / "run", prior={"images": 2}, **settings
    )
    assert run.recipe.precision == "bfloat16"
    assert run.recipe.optimizer == "adamw8bit"
    assert len(run.adapter.modules) == 128
    assert any(value.abs().max() > 0 for name, value in load_file(run.adapter_file).items() if "lora_up" in name)


def test_resuming_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="no run to resume"):
        train(resume=tmp_path)


def test_resuming_before_the_first_checkpoint_starts_afresh(base: Base, short_run: Run, tmp_path: Path) -> None:
    shutil.copy(short_run.folder / "recipe.yaml", tmp_path / "recipe.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n{"step": 2, "lo', "utf-8")
    run = train(base=base, resume=tmp_path)
    assert run.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()


def test_captions_replace_the_prompt_and_style_learns_from_them(base: Base, pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "01.txt").write_text("a dog on the grass", "utf-8")

    def prompts(recipe: str, **settings: object) -> list[list[str]]:
        plan = load_recipe(recipe, {"images": str(data), **settings})
        return [one.prompt_builder.prompts() for one in collect_samples(plan.data, read_concepts(plan)[1], base)]

    assert prompts("style")[:2] == [["a dog on the grass, sks style"], ["a picture, sks style"]]
    with pytest.warns(UserWarning, match=r"caption of 01.png lacks the trigger 'sks'"):
        assert prompts(SUBJECT, subject="dog")[:2] == [["a dog on the grass"], ["a sks dog"]]
    told = prompts(SUBJECT, subject="dog", insert_trigger=True)
    assert told[:2] == [["sks, a dog on the grass"], ["a sks dog"]]
    assert prompts(SUBJECT, subject="dog", captions=False) == [["a sks dog"]] * 5
    (data / "02.txt").write_text("a " + "very " * 90 + "good dog", "utf-8")
    with pytest.warns(UserWarning, match=r"02.png is too long.*good dog, sks style"):
        run = train("style", base=base, images=data, output=tmp_path / "run", steps=2, flip=True, prior={"images": 3})
    assert set(run.metrics[0]) == {"step", "lr", "loss", "instance", "prior"}
    assert run.adapter.metadata["class"] is None


def test_what_class_images_show() -> None:
    captions = ["a cat", None, "a cat", "a tree"]
    assert load_recipe(SUBJECT, {"subject": "dog"}).class_prompts(captions) == ["a dog"]
    assert load_recipe("style", {}).class_prompts(captions) == ["a cat", "a picture", "a tree"]
    assert load_recipe("concept", {}).class_prompts(captions) == []
    kohya = ["sks style, a cat", "a tree, sks", "sks", "two masks"]
    assert load_recipe("style", {}).class_prompts(kohya) == ["a cat", "a tree", "a picture", "two masks"]


def test_class_images_in_several_settings() -> None:
    templates = {"prior.prompts": "{class_prompt}|{class_prompt} in the snow|some {subject}"}
    subject = load_recipe(SUBJECT, {"subject": "dog", "class_prompt": "a toy {subject}", **templates})
    assert subject.class_prompts([None]) == ["a toy dog", "a toy dog in the snow", "some dog"]
    style = load_recipe("style", {"prior.prompts": ["{class_prompt} in the snow"]})
    assert style.class_prompts(["a cat, sks style", None]) == ["a cat in the snow", "a picture in the snow"]
    with pytest.raises(DiffgraftError, match=r"Unknown placeholder \{class\} in prior\.prompts"):
        load_recipe(SUBJECT, {"subject": "dog", "prior.prompts": ["{class} in the snow"]})


def test_prediction_preserves_every_class_prompt_in_turn(pictures: Path) -> None:
    templates = {"prior.prompts": ["{class_prompt}", "{class_prompt} at night"]}
    recipe = load_recipe(SUBJECT, {"subject": "dog", "images": str(pictures), "prior.by": "prediction", **templates})
    _, ((concept, read),) = read_concepts(recipe)
    prompts, class_prompts = prompt_builders(concept, read[0])
    assert prompts.prompts() == ["a sks dog", "a sks dog"]
    assert class_prompts.prompts() == ["a dog", "a dog at night"]


def test_templates_show_each_picture_under_each_prompt(base: Base, pictures: Path, tmp_path: Path) -> None:
    plan = load_recipe("concept", {"subject": "dog", "trigger": "<zorp>", "images": str(pictures)})
    items = collect_samples(plan.data, read_concepts(plan)[1], base)
    wanted = [template.replace("{trigger}", "<zorp>") for template in OBJECT]
    assert [one.prompt_builder.prompts() for one in items] == [wanted] * 5
    examples = encode_samples(plan, base, items, "encoding")
    assert len(examples.encoded.latents) == 5
    shown = [(one.row, one.text) for place in range(5 * len(OBJECT)) for one in examples.at(3, place, 1)]
    assert sorted(shown) == [(row, text) for row in range(5) for text in range(len(OBJECT))]
    plan = load_recipe("concept", {"templates": "style", "images": str(pictures)})
    items = collect_samples(plan.data, read_concepts(plan)[1], base)
    assert [len(one.prompt_builder.texts) for one in items] == [len(STYLE)] * 5
    settings: dict[str, Any] = {"steps": 3, "subject": "dog", "sample_every": 0, "sample_prompts": "a {trigger}"}
    run = train("concept", base=base, images=pictures, output=tmp_path / "run", options={"vectors": "2"}, **settings)
    assert run.adapter.tokens["<concept>"]["text_encoder"].shape == (2, 64)
    assert run.adapter_file.stat().st_size < 4000


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "bfloat16"},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw8bit"},
        {"accumulate": 2, "batch": 2},
        {"layers": "attention+feedforward", "prior": {"weight": 0}},
    ],
)
def test_the_options_of_the_loop_train(pictures: Path, tmp_path: Path, more: dict[str, Any], short_run: Run) -> None:
    settings: dict[str, Any] = {**SHORT, "steps": 2, "sample_prompts": "a dog", **more}
    run = train(SUBJECT, images=pictures, output=tmp_path / "run", **settings)
    first, wanted = run.metrics[0], short_run.metrics[0]
    if "gradient_checkpointing" in more or "optimizer" in more:
        assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    if "precision" in more:
        assert first["loss"] == pytest.approx(wanted["loss"], rel=0.05)
        assert first["loss"] != wanted["loss"]
    assert all(value.abs().max() > 0 for value in load_file(run.adapter_file).values())


def test_samples_are_drawn_during_training(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "steps": 2, "sample_every": 1, "sample_prompts": "a {trigger} {subject}"}
    settings["previews"] = True
    train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert [file.name for file in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-000001.png",
        "step-000002.png",
    ]


@pytest.mark.parametrize("more", [{"ema": 0.5}, {"optimizer": "schedule-free"}], ids=["average", "schedule-free"])
def test_adapters_are_kept_on_the_way(base: Base, pictures: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """Each is what a run that ended there would have left."""
    settings: dict[str, Any] = {**SHORT, "sample_prompts": "a dog", "prior": {"weight": 0}, "lr": 1e-2, **more}
    short = train(SUBJECT, base=base, images=pictures, output=tmp_path / "short", **{**settings, "steps": 2})
    long = train(SUBJECT, base=base, images=pictures, output=tmp_path / "long", **settings, adapter_every=2)
    files = sorted((long.folder / "adapters").iterdir())
    assert [file.name for file in files] == [f"step-00000{step}.safetensors" for step in (2, 4, 6)]
    wanted, found = load_file(short.adapter_file), load_file(files[0])
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert files[-1].read_bytes() == long.adapter_file.read_bytes()
    assert load_adapter(files[0]).metadata == long.adapter.metadata
    (bare,) = generate(base, ["a sks dog"], DrawSettings(steps=3), [1])
    with graft(base, {files[0]: 1.0}):
        (drawn,) = generate(base, ["a sks dog"], DrawSettings(steps=3), [1])
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(bare)).max() > 0


def test_a_run_on_stable_diffusion_xl(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The recipe's own settings on a random model of the family's shape; diffusers alone draws what we draw."""
    settings: dict[str, Any] = {"steps": 3, "resolution": 32, "subject": "dog", "text_encoder": True, "rank": 3}
    run = train("sdxl-subject", base=sdxl_folder, images=pictures, output=tmp_path / "run", lr=0.05, **settings)
    assert run.adapter.metadata["base"]["family"] == "sdxl"
    assert {path.partition(".")[0] for path in run.adapter.modules} == {"unet", "text_encoder", "text_encoder_2"}
    assert not any("text_model" in path for path in run.adapter.modules)
    assert all(value.abs().max() > 0 for value in load_file(run.adapter_file).values())

    def draw(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        (image,) = pipe("a sks dog", num_inference_steps=3, height=32, width=32, generator=generator).images
        return np.asarray(image).astype(int)

    pipe = load_base(sdxl_folder).pipeline()
    bare = draw(pipe)
    with graft(pipe, {run.adapter_file: 1.0}):
        ours = draw(pipe)
    pipe.load_lora_weights(run.folder, weight_name="adapter.safetensors")
    theirs = draw(pipe)
    assert np.abs(ours - bare).max() > 8
    assert np.abs(ours - theirs).max() <= 2


def test_a_state_of_8_bits_is_saved_and_resumed(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "rank": 64, "optimizer": "adamw8bit", "sample_prompts": "a dog", "steps": 4}
    whole = train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **settings)
    state = load_file(tmp_path / "whole" / "checkpoints" / "step-000003" / "optimizer.safetensors")
    assert torch.uint8 in {value.dtype for value in state.values()}
    cut = tmp_path / "cut"
    shutil.copytree(whole.folder, cut)
    for name in ("adapter.safetensors", "checkpoints/step-000004"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(base=base, resume=cut)
    assert resumed.adapter_file.read_bytes() == whole.adapter_file.read_bytes()


def test_two_batches_of_two_are_one_of_four(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "steps": 2, "sample_prompts": "a dog", "prior": {"weight": 0}}
    one = train(SUBJECT, base=base, images=pictures, output=tmp_path / "1", batch=4, **settings)
    two = train(SUBJECT, base=base, images=pictures, output=tmp_path / "2", batch=2, accumulate=2, **settings)
    assert len(two.metrics) == len(one.metrics) == 2
    assert two.metrics[0]["loss"] == pytest.approx(one.metrics[0]["loss"], rel=1e-5)
    wanted, found = load_file(one.adapter_file), load_file(two.adapter_file)
    for name, value in wanted.items():
        # Adam makes the rounding of a tiny gradient as large as a step: single numbers may differ, the whole may not
        assert (found[name] - value).norm() < 1e-3 * value.norm(), name


def test_what_will_not_do_is_said_before_anything_is_written(base: Base, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for settings, answer in (
        ({"images": tmp_path / "none"}, "does not exist"),
        ({"images": ""}, "has no images"),
        ({"images": pictures, "resolution": 60}, "needs a multiple of 8"),
        ({"images": pictures, "method": "lorra"}, "did you mean 'lora'"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            train(SUBJECT, base=base, subject="dog", output=output, **settings)  # type: ignore[arg-type]
    with pytest.raises(DiffgraftError, match=r"The base .* was not found"):
        train(SUBJECT, base="no/such-base", images=pictures, subject="dog", output=output)
    assert not output.exists()


@pytest.mark.usefixtures("good_class_images")
def test_it_learns(base: Base, pictures: Path, tmp_path: Path) -> None:
    """A short run lowers the loss on the subject's pixels in pictures it has not seen, and needs its trigger for it."""
    from diffgraft.data.image_folder import read_folder

    held_out = [picture.image for picture in read_folder(POODLE.folder / "held-out")]
    masks = [Image.open(path) for path in sorted((POODLE.folder / "held-out-masks").glob("*.png"))]
    validation_set = validation_set_from_images(base, held_out, masks, pairs=64)
    before = {prompt: validation_set.loss(base, prompt) for prompt in ("a sks dog", "a dog")}
    settings: dict[str, Any] = {"subject": "dog", "steps": 50, "prior": {"images": 8}, "sample_prompts": "a dog"}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    with graft(base, {run.adapter: 1.0}):
        after = {prompt: validation_set.loss(base, prompt) for prompt in before}
    gain = {prompt: before[prompt] - after[prompt] for prompt in before}
    assert gain["a sks dog"] > 0.1 * before["a sks dog"]
    assert gain["a dog"] < 0.5 * gain["a sks dog"]
    assert validation_set.loss(base, "a sks dog") == pytest.approx(before["a sks dog"], rel=1e-6)


def test_a_start_that_was_refused_can_be_made_again(base: Base, pictures: Path, tmp_path: Path) -> None:
    """Nothing is in its way, though the recipe was written."""
    folder, cut = tmp_path / "run", {"buckets": {"use": True, "min": 128}}
    given: dict[str, Any] = {**SHORT, "steps": 1, "images": pictures, "output": folder, "prior": {"weight": 0}}
    with pytest.raises(DiffgraftError, match=r"buckets\.min"):
        train(SUBJECT, base=base, **given, **cut)
    assert train(SUBJECT, base=base, **given).steps == 1


def test_prodigy_at_another_rate_than_one_is_warned_of(base: Base, pictures: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {**SHORT, "steps": 1, "images": pictures, "prior": {"weight": 0}, "optimizer": "prodigy"}
    with pytest.warns(UserWarning, match=r"finds by lr=0\.01, so it hardly learns: set lr=1"):
        train(SUBJECT, base=base, output=tmp_path / "run", lr=0.01, **given)


def test_the_header_has_all_concepts(base: Base, pictures: Path, tmp_path: Path) -> None:
    concepts = [
        {"images": str(pictures), "subject": "dog"},
        {"images": str(pictures), "subject": "cat", "trigger": "zwx"},
    ]
    given: dict[str, Any] = {**SHORT, "steps": 1, "prior": {"weight": 0}, "concepts": concepts}
    run = train(SUBJECT, base=base, output=tmp_path / "run", **given)
    wanted = [{"trigger": "sks", "class": "dog"}, {"trigger": "zwx", "class": "cat"}]
    assert run.adapter.metadata["concepts"] == wanted
    assert run.recipe.samples()[:2] == ["a sks dog", "a zwx cat"]
