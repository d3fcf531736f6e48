"""Measures: formulas against float64 numpy, on embeddings that are made up."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evidence import Drawings, Evidence, Prompts, Reference, figure, jackknife, mean_over
from diffgraft.evaluation.kernels import cubic, gaussian, mmd2
from diffgraft.evaluation.matching import patch_match
from diffgraft.evaluation.measure import get_measure, measures

SEEDS = 4
PROMPTS = Prompts(("a sks dog", "a sks dog in the snow"), ("a dog", "a dog in the snow"), ("a dog", "dogs", "a dog"))
Array = np.ndarray[Any, np.dtype[np.float64]]


def unit(rng: np.random.Generator, *shape: int) -> Array:
    """Random unit vectors that all point to one side, as those of pictures do."""
    values = rng.normal(size=shape) + 0.7
    out: Array = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return out


class Fake:
    """An encoder of pictures of one colour: all that it tells of a picture is made from its colour."""

    tokenizer = None
    logit_scale = 7.5

    def vectors(self, image: Image.Image, count: int) -> Array:
        return unit(np.random.default_rng(image.getpixel((0, 0))), count, 6)  # type: ignore[arg-type]

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.from_numpy(np.concatenate([self.vectors(image, 1) for image in images]))

    def patches(self, images: Sequence[Image.Image]) -> list[Tensor]:
        return [torch.from_numpy(self.vectors(image, 5 if image.width > 3 else 3)) for image in images]

    def coverage(self, masks: Sequence[Image.Image]) -> list[Tensor]:
        return [torch.tensor([0.0, 0.25, 1.0, 0.5, 0.0])] * len(masks)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(
            np.concatenate([unit(np.random.default_rng(list(text.encode())), 1, 6) for text in prompts])
        )


def pictures(first: int, *shape: int) -> Any:
    """Pictures of one colour each, in nested lists of a shape."""
    if len(shape) == 1:
        return [Image.new("RGB", (5, 4), (first + place, 30, 2)) for place in range(shape[0])]
    return [pictures(first + 16 * row, *shape[1:]) for row in range(shape[0])]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    drawn = Drawings(pictures(0, 2, SEEDS), pictures(40, 3, SEEDS))
    bare = Drawings(pictures(100, 2, SEEDS), pictures(140, 3, SEEDS))
    references = [Reference(image) for image in pictures(200, 3)]
    references[1] = Reference(references[1].image, Image.new("L", (5, 4), 255))
    tasks = ("clip", "dino", "patches", "pickscore")
    encoders = Encoders({task: task for task in tasks}, load=lambda _: Fake())  # type: ignore[arg-type,return-value]
    return Evidence(drawn, bare, PROMPTS, references, encoders, torch.tensor([0.3, 0.5, 0.4, 0.7]))


def embedded(rows: Any) -> Array:
    return np.stack([[Fake().vectors(image, 1)[0] for image in row] for row in rows])


def correlations(patches: Array) -> list[float]:
    """Cosines of all pairs of patches, whose mean over the picture is taken off."""
    centred = patches - patches.mean(0)
    pairs = combinations(range(len(patches)), 2)
    return [float(centred[a] @ centred[b] / np.linalg.norm(centred[a]) / np.linalg.norm(centred[b])) for a, b in pairs]


def expected(name: str, found: Evidence) -> float:
    """What a measure gives for all seeds, in loops over pictures."""
    own = embedded(found.drawn.trained)
    bare, of_class = embedded(found.bare.of_class), embedded(found.drawn.of_class)
    references = np.stack([Fake().vectors(reference.image, 1)[0] for reference in found.references])
    texts = Fake().texts(found.prompts.plain).numpy()
    places = [(p, s) for p in range(2) for s in range(SEEDS)]
    if name in ("clip-i", "dino"):
        return float(np.mean([own[p, s] @ r for p, s in places for r in references]))
    if name in ("clip-t", "pickscore"):
        return float(np.mean([own[p, s] @ texts[p] for p, s in places])) * (7.5 if name == "pickscore" else 1)
    if name == "contrast":
        return float(np.mean([own[p, s] @ texts[p] - own[p, s] @ texts[1 - p] for p, s in places]))
    if name == "diversity":
        return float(np.mean([1 - own[p, a] @ own[p, b] for p in range(2) for a, b in combinations(range(SEEDS), 2)]))
    if name == "drift":
        return float(np.mean([1 - of_class[p, s] @ bare[p, s] for p in range(3) for s in range(SEEDS)]))
    if name == "held-out":
        return float(np.mean([0.3, 0.5, 0.4, 0.7]))
    if name == "structure":
        vectors = []
        for rows in (found.drawn.trained, found.bare.trained):
            patches = [[Fake().vectors(image, 5) for image in row] for row in rows]
            vectors.append([[correlations(one) for one in row] for row in patches])
        agree = [[np.corrcoef(vectors[0][p][s], vectors[1][q][s])[0, 1] for q in range(2)] for p, s in places]
        return float(np.mean([agree[i][p] - agree[i][1 - p] for i, (p, _) in enumerate(places)]))
    if name == "patches":
        values = []
        for p, s in places:
            drawn = Fake().vectors(found.drawn.trained[p][s], 5)
            for reference in found.references:
                known = Fake().vectors(reference.image, 5)
                weights = np.array([0, 0.25, 1, 0.5, 0]) if reference.mask else np.ones(5)
                best = [max(float(patch @ other) for other in drawn) for patch in known]
                values.append(float(np.sum(weights * best) / weights.sum()))
        return float(np.mean(values))
    flat = own.reshape(-1, 6)
    kernel = {
        "kid": lambda a, b: (a @ b + 1) ** 3,
        "cmmd": lambda a, b: math.exp(-float(np.sum((a - b) ** 2)) / 200),
    }[name]
    within = [
        np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]) for x in (flat, references)
    ]
    return float(1000 * (sum(within) - 2 * np.mean([kernel(a, b) for a in flat for b in references])))


@pytest.mark.parametrize("name", sorted(measures()))
def test_a_measure_is_its_formula(name: str, evidence: Evidence) -> None:
    found = get_measure(name).estimator(evidence)(range(SEEDS))
    assert found == pytest.approx(expected(name, evidence), rel=2e-6)


@pytest.mark.parametrize("name", sorted(measures()))
def test_a_measure_of_some_seeds_is_that_of_their_pictures(name: str, evidence: Evidence) -> None:
    kept = [0, 2, 3]

    def few(drawings: Drawings) -> Drawings:
        trained, of_class = (
            [[row[seed] for seed in kept] for row in rows] for rows in (drawings.trained, drawings.of_class)
        )
        return Drawings(trained, of_class)

    assert evidence.losses is not None
    smaller = Evidence(
        few(evidence.drawn), few(evidence.bare), PROMPTS, evidence.references, evidence.encoders, evidence.losses[kept]
    )
    whole, part = (get_measure(name).estimator(one) for one in (evidence, smaller))
    assert whole(kept) == pytest.approx(part(range(3)), rel=1e-6)


def test_patches_are_matched_in_both_directions_with_a_masker(evidence: Evidence) -> None:
    encoders = Encoders(evidence.encoders.sources, evidence.encoders.load, lambda image: Image.new("L", image.size))
    found = get_measure("patches").estimator(replace(evidence, encoders=encoders))([0])
    picture, weights, values = evidence.drawn.trained, np.array([0, 0.25, 1, 0.5, 0]), []
    for row in picture:
        drawn = Fake().vectors(row[0], 5)
        for reference in evidence.references:
            known = Fake().vectors(reference.image, 5)
            own = weights if reference.mask else np.ones(5)
            there = np.sum(own * [max(float(patch @ other) for other in drawn) for patch in known]) / own.sum()
            kept = [patch for patch, share in zip(known, own, strict=True) if share > 0.5]
            back = np.sum(weights * [max(float(patch @ other) for other in kept) for patch in drawn]) / weights.sum()
            values.append((there + back) / 2)
    assert found == pytest.approx(np.mean(values), rel=1e-6)


def test_a_picture_that_follows_no_prompt_has_no_contrast(evidence: Evidence) -> None:
    same = pictures(7, 1, SEEDS) * 2
    found = Evidence(Drawings(same, same), evidence.bare, PROMPTS, evidence.references, evidence.encoders)
    assert get_measure("contrast").estimator(found)(range(SEEDS)) == pytest.approx(0, abs=1e-7)
    assert abs(get_measure("clip-t").estimator(found)(range(SEEDS))) > 0.01


def test_errors_are_those_of_means_and_of_other_estimates() -> None:
    scores = torch.tensor(np.random.default_rng(3).normal(size=(5, 7)))
    value, error = jackknife(mean_over(scores), 7)
    columns = scores.numpy().mean(0)
    assert value == pytest.approx(columns.mean())
    assert error == pytest.approx(columns.std(ddof=1) / math.sqrt(7))

    def largest(kept: Sequence[int]) -> float:
        return float(max(columns[place] for place in kept))

    without = np.array([max(np.delete(columns, place)) for place in range(7)])
    wanted = math.sqrt(6 / 7 * np.sum((without - without.mean()) ** 2))
    assert jackknife(largest, 7)[1] == pytest.approx(wanted)
    assert math.isnan(jackknife(mean_over(scores[:, :1]), 1)[1])


def test_differences_are_paired_by_seed() -> None:
    bare = torch.tensor(np.random.default_rng(4).normal(size=(2, 6)))
    found = figure(mean_over(bare + 0.25), mean_over(bare), 6)
    assert found.gain == pytest.approx(0.25)
    assert found.gain_error == pytest.approx(0, abs=1e-12)
    assert found.error > 0.05


def test_mmd_of_samples_of_one_distribution_is_zero_on_average() -> None:
    rng = np.random.default_rng(5)
    values = [
        [mmd2(torch.from_numpy(unit(rng, 5, 4)), torch.from_numpy(unit(rng, 7, 4)), kernel) for _ in range(300)]
        for kernel in (cubic, gaussian)
    ]
    for found in np.array(values):
        assert abs(found.mean()) < 3 * found.std() / math.sqrt(300)
        assert found.min() < 0
    with pytest.raises(ValueError, match="at least two"):
        mmd2(torch.ones(1, 3), torch.ones(4, 3), cubic)


def test_patches_match_wherever_they_are_and_in_both_directions() -> None:
    rng = np.random.default_rng(6)
    reference, more = unit(rng, 4, 5), unit(rng, 3, 5)
    picture = torch.from_numpy(np.concatenate([more, reference[[2, 0]]]))
    inside = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found = torch.from_numpy(reference)
    assert patch_match(found, inside, picture) == pytest.approx(1)
    shares = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.25])
    best = [max(float(patch @ reference[place]) for place in (0, 2)) for patch in picture.numpy()]
    back = float(np.sum(shares.numpy() * best) / shares.numpy().sum())
    assert patch_match(found, inside, picture, shares) == pytest.approx((1 + back) / 2)
    with pytest.raises(ValueError, match="no patch"):
        patch_match(found, torch.zeros(4), picture)


def test_unknown_measures_are_refused() -> None:
    with pytest.raises(DiffgraftError, match="did you mean 'clip-i'"):
        get_measure("clip_i")
