"""What a run learns from: the line of examples over buckets and repeats, several concepts, masks, class images."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.data.captions import PromptBuilder
from diffgraft.data.frames import Crop
from diffgraft.data.latents import Encoded, Latents
from diffgraft.data.settings import Masks, Tags
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.hooks.validation import held_out
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import TrainingData, build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.examples import Example, Examples, ExampleVariant
from tests.conftest import SHORT
from tests.recipes import SUBJECT

CPU = torch.device("cpu")


def line(
    sizes: list[tuple[int, int]], repeats: list[int] | None = None, rows: int = 1, texts: int = 1, **more: Any
) -> Examples:
    """Pictures of these latent sizes (width, height), each with so many frames and texts."""
    frames = [Crop((w, h), (w, h), (0, 0), (w, h)) for w, h in sizes for _ in range(rows)]
    latents = [
        (torch.full((4, h, w), float(n)), torch.zeros(4, h, w)) for n, (w, h) in enumerate(sizes) for _ in range(rows)
    ]
    own = [range(n * rows, (n + 1) * rows) for n in range(len(sizes))]
    said = PromptBuilder(tuple(f"text {n}" for n in range(texts)))
    listed = [Example(f"{n}", own[n], said, said, (repeats or [1] * len(sizes))[n]) for n in range(len(sizes))]
    masks: list[Tensor | None] = [None] * len(frames)
    return Examples(Encoded(Latents(latents), frames, masks, dict(enumerate(own))), listed, **more)


def batches(data: Examples, count: int, size: int, seed: int = 3) -> list[list[ExampleVariant]]:
    return [data.at(seed, number * size, size) for number in range(count)]


def test_a_batch_is_of_one_size_and_every_picture_comes_equally_often() -> None:
    sizes = [(8, 6)] * 5 + [(6, 8)] * 2 + [(5, 5)]
    data = line(sizes)
    found = batches(data, 8 * 6, 3)
    for batch in found:
        assert len({sizes[int(one.example.name)] for one in batch}) == 1
        assert len(batch) == 3
    seen = Counter(one.example.name for batch in found for one in batch)
    assert set(seen.values()) == {18}
    assert found[4:9] == batches(data, 9, 3)[4:]
    order = [sizes[int(batch[0].example.name)] for batch in found]
    assert order[:8] != order[8:16]


def test_repeats_are_kept_within_and_across_buckets() -> None:
    data = line([(8, 6), (8, 6), (6, 8)], repeats=[3, 1, 2])
    seen = Counter(one.example.name for batch in batches(data, 6 * 4, 2) for one in batch)
    assert seen == {"0": 24, "1": 8, "2": 16}


def test_each_frame_meets_each_text_before_two_meet_again() -> None:
    data = line([(8, 6)] * 2, rows=3, texts=2, repeats=[2, 1])
    shown = [(one.example.name, one.row, one.text) for batch in batches(data, 3 * 12, 1) for one in batch]
    assert Counter(shown) == {
        **{("0", row, text): 4 for row in range(3) for text in range(2)},
        **{("1", row, text): 2 for row in range(3, 6) for text in range(2)},
    }
    for name in ("0", "1"):
        first = [one for one in shown if one[0] == name]
        assert len(set(first[:6])) == len(set(first[6:12])) == 6
        assert first[:6] != first[6:12]


def test_class_prompts_have_the_tags_of_the_prompts() -> None:
    said, of_class = PromptBuilder(("a, b, c, d",), ("{caption}, sks",)), PromptBuilder(("a, b, c, d",))
    one = Example("0", range(0, 1), said, of_class)
    data = Examples(line([(4, 4)]).encoded, [one], Tags(shuffle=True, drop=0.3))
    for place in range(40):
        (shown,) = data.at(1, place, 1)
        ours, theirs = (ask(shown, 1, place, 0) for ask in (data.prompt, data.class_prompt))
        assert ours == f"{theirs}, sks"
    assert len({data.prompt(data.at(1, place, 1)[0], 1, place, 0) for place in range(40)}) > 10


def folder(where: Path, count: int, size: tuple[int, int] = (90, 60), start: int = 0) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(where / f"{number:02}.png")
    return where


def gathered(base: Base, recipe: str, **settings: Any) -> TrainingData:
    plan = load_recipe(recipe, settings)
    return build_training_data(plan.data, plan.validation, plan.seed, base, read_concepts(plan)[1])


def test_concepts_have_words_weights_and_class_images_of_their_own(base: Base, tmp_path: Path) -> None:
    concepts = [
        {
            "images": str(folder(tmp_path / "dog", 3)),
            "subject": "dog",
            "weight": 0.5,
            "prior": {"weight": 3, "images": 2},
        },
        {"images": str(folder(tmp_path / "cat", 2, start=3)), "subject": "cat", "trigger": "zwx", "repeats": 4},
    ]
    found = gathered(base, SUBJECT, concepts=concepts, prior={"weight": 1, "images": 3})
    said = {(one.prompt_builder.texts[0], one.repeats, one.weight) for one in found.instances.examples}
    assert said == {("a sks dog", 1, 0.5), ("a zwx cat", 4, 1.0)}
    assert len(found.instances.examples) == 5
    assert found.class_images is not None
    kept = Counter((one.prompt_builder.texts[0], one.weight) for one in found.class_images.examples)
    assert kept == {("a dog", 3.0): 2, ("a cat", 1.0): 3}
    assert found.prompts == ["a sks dog", "a dog", "a zwx cat", "a cat"]


def test_a_method_that_teaches_one_word_refuses_several(base: Base, tmp_path: Path) -> None:
    concepts = [{"images": str(folder(tmp_path / "dog", 1)), "trigger": word} for word in ("<one>", "<two>")]
    with pytest.raises(
        DiffgraftError, match="pivotal trains a single token, '<one>', but concepts have other triggers: <two>"
    ):
        gathered(base, SUBJECT, subject="dog", method="pivotal", trigger="<one>", concepts=concepts)


def test_kohyas_layout_is_understood_with_its_own_class_images(base: Base, tmp_path: Path) -> None:
    folder(tmp_path / "img" / "10_sks dog", 2)
    folder(tmp_path / "img" / "3_sks dog outside", 1, start=2)
    (tmp_path / "img" / "10_sks dog" / "00.txt").write_text("sks dog, sitting", "utf-8")
    folder(tmp_path / "reg" / "2_dog", 2, start=5)
    prior = {"weight": 1, "folder": str(tmp_path / "reg")}
    found = gathered(base, SUBJECT, images=str(tmp_path), subject="dog", prior=prior)
    said = [(one.prompt_builder.prompts()[0], one.repeats) for one in found.instances.examples]
    assert said == [("sks dog, sitting", 10), ("sks dog", 10), ("sks dog outside", 3)]
    assert found.class_images is not None
    assert [(one.prompt_builder.texts[0], one.repeats) for one in found.class_images.examples] == [("dog", 2)] * 2


def test_masks_weigh_the_loss(base: Base) -> None:
    diff, target = torch.randn(3, 4, 6, 5), torch.zeros(3, 4, 6, 5)
    mask = (torch.rand(3, 1, 6, 5) > 0.6).float()
    times, rows = torch.tensor([10, 500, 900]), range(3)
    squares, shown = diff.double().numpy() ** 2, mask.double().numpy()
    latents = Latents([(one, torch.zeros_like(one)) for one in target])
    frame = Crop((40, 48), (40, 48), (0, 0), (40, 48))
    encoded = Encoded(latents, [frame] * 3, list(mask[:, 0]), {})
    examples = [Example(f"{row}", range(row, row + 1), PromptBuilder(("",))) for row in rows]
    places = [ExampleVariant(one, row, 0) for row, one in enumerate(examples)]
    for outside, normalize in ((0.0, True), (0.2, True), (0.2, False)):
        masks = Masks(use=True, outside=outside, normalize=normalize)
        weight = Examples(encoded, examples, masks=masks).weight_map(places)
        counts = outside + (1 - outside) * shown
        wanted = (squares * counts).mean((1, 2, 3)) / (counts.mean((1, 2, 3)) if normalize else 1)
        found = forward_process(base).loss_per_sample(diff, target, times, weight)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)
    process = forward_process(base)
    torch.testing.assert_close(
        process.loss_per_sample(diff, target, times, torch.ones_like(mask)),
        process.loss_per_sample(diff, target, times),
    )


def test_masks_of_pictures_come_with_their_batches(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 3, (64, 64))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 24, 64))
    mask.save(data / "01_mask.png")
    settings: dict[str, Any] = {"images": str(data), "prior": {"weight": 0}}
    found = gathered(base, "style", **settings, masks={"use": True}).instances
    batch = SampleStream(found, forward_process(base), 1, CPU, 0).batch(0, 3)
    names = [one.example.name for one in batch.variants]
    assert batch.mask is not None
    shares = [float((one > 0.5 * one.max()).float().mean()) for one in batch.mask]
    assert shares == pytest.approx([24 / 64 if name == "01.png" else 1.0 for name in names], rel=0.01)
    errors = (0.3 * batch.noisy - batch.target).double().square().mean(1, keepdim=True)
    wanted = [float((own * shown).sum() / shown.sum()) for own, shown in zip(errors, batch.mask, strict=True)]
    assert float(batch.loss(forward_process(base), 0.3 * batch.noisy)) == pytest.approx(np.mean(wanted), rel=1e-4)
    assert (
        SampleStream(gathered(base, "style", **settings).instances, forward_process(base), 1, CPU, 0).batch(0, 3).mask
        is None
    )


def test_a_share_is_held_out_the_same_in_every_run(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "all", 10)
    found = gathered(base, "style", images=str(data), prior={"weight": 0}, validation={"share": 0.3, "pairs": 12})
    other = gathered(base, "style", images=str(data), prior={"weight": 0}, validation={"share": 0.3}, seed=9)
    names = [one.name for one in found.instances.examples]
    assert len(names) == 7
    assert [one.name for one in other.instances.examples] == names
    assert found.held_out is not None
    assert sum(len(pairs.timesteps) for pairs, _, _ in held_out(forward_process(base), found.held_out, 12).groups) == 12
    kept = {one.content for one in found.instances.examples}
    for number, file in enumerate(sorted(data.iterdir())):  # the other way round
        file.rename(data / f"turned-{9 - number}.png")
    turned = gathered(base, "style", images=str(data), prior={"weight": 0}, validation={"share": 0.3})
    assert {one.content for one in turned.instances.examples} == kept
    with pytest.raises(DiffgraftError, match="leaves none to train on"):
        gathered(base, "style", images=str(folder(tmp_path / "one", 1)), validation={"share": 0.3})


def test_long_prompts_are_refused_or_read_whole_as_asked(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "all", 5)
    for number in range(5):
        (data / f"{number:02}.txt").write_text("a sks " + "very " * 90 + "good dog", "utf-8")
    settings: dict[str, Any] = {"images": str(data), "subject": "dog", "prior": {"weight": 0}}
    with pytest.raises(DiffgraftError, match=r"prompt of 00.png, 01.png, 02.png and 2 more is too long.*chunk"):
        gathered(base, SUBJECT, **settings, long_prompts="refuse")
    assert gathered(base, SUBJECT, **settings, long_prompts="chunk").prompts is not None
    for number in range(5):
        (data / f"{number:02}.txt").write_text("a sks " + "very " * 20_000, "utf-8")
    with pytest.raises(DiffgraftError, match=r"would be cut off: very very .* …\. Shorten it") as told:
        gathered(base, SUBJECT, **settings, long_prompts="refuse")
    assert len(str(told.value)) < 500
    (data / "00.txt").write_text("a sks " + "very " * 100_000, "utf-8")
    with pytest.raises(DiffgraftError, match=r"00\.txt has 500,006 bytes, but at most 262,144"):
        gathered(base, SUBJECT, **settings)


def test_a_run_over_all_of_it(base: Base, tmp_path: Path) -> None:
    """Buckets, cuts, mirrored, masks, tags, dropout, long prompts in pieces, validation: it trains and resumes."""
    data = folder(tmp_path / "data", 3)
    folder(data, 2, (50, 100), start=3)
    for number in range(4):
        (data / f"{number:02}.txt").write_text(f"a dog, {'large, ' * (40 * number)}in the snow, at night", "utf-8")
    Image.new("L", (90, 60), 200).save(data / "01_mask.png")
    settings: dict[str, Any] = {
        **SHORT,
        "batch": 2,
        "images": str(data),
        "buckets": {"use": True},
        "crop": "random",
        "flip": True,
        "masks": {"use": True, "outside": 0.1},
        "tags": {"shuffle": True, "drop": 0.1, "keep": 1},
        "caption_dropout": 0.2,
        "long_prompts": "chunk",
        "validation": {"share": 0.2, "every": 2, "pairs": 4},
        "sample_prompts": "a dog",
        "insert_trigger": True,
    }
    run = train(SUBJECT, base=base, output=tmp_path / "run", **settings)
    assert [entry["step"] for entry in run.metrics if "validation" in entry] == [2, 4, 6]
    assert (run.folder / "best.safetensors").is_file()
    wanted = run.adapter_file.read_bytes()
    run.adapter_file.unlink()
    for step in (6,):
        for file in (run.folder / "checkpoints" / f"step-{step:06}").iterdir():
            file.unlink()
        (run.folder / "checkpoints" / f"step-{step:06}").rmdir()
    again = train(base=base, resume=run.folder)
    assert again.adapter_file.read_bytes() == wanted
    assert list(again.metrics) == list(run.metrics)
