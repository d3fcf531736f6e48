"""Rates of parts, blocks and patterns; what is frozen; and text encoders that stop on the way."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.methods.hypernetwork import context_projections
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.files import cache_folder
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.hooks import checkpoint
from diffgraft.trainers.hooks.checkpoint import save_checkpoint
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.optim.lr_scales import freeze_text_parameters
from diffgraft.trainers.optim.optimizers import _FACTORIES, eval_weights, load_eval_weights, new_optimizer
from diffgraft.trainers.recipe.files import load_recipe, save_recipe
from diffgraft.trainers.run import train as run
from diffgraft.trainers.run.fingerprint import differences, run_fingerprint
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.state import TrainingState
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after
from tests.trainers.state_helpers import restored_step, state_of
from tests.trainers.test_optimizers import recipe_of, walk

FAST: dict[str, Any] = {**SHORT, "batch": 2, "checkpoint_every": 0, "prior": {"weight": 0}, "trigger": "<zorp>"}


@pytest.fixture(autouse=True)
def _draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these trainings, and show nothing of what is tested here."""
    monkeypatch.setattr(run, "before_after", lambda *_: Image.new("RGB", (8, 8)))


@pytest.fixture
def go(base: Base, pictures: Path, tmp_path: Path) -> Any:
    """Trains, each time in a new folder."""
    count = iter(range(99))

    def trained(**settings: Any) -> Run:
        given = {**FAST, **settings}
        return train(SUBJECT, base=base, images=pictures, output=tmp_path / f"run-{next(count)}", **given)

    return trained


def moved(done: Run) -> dict[str, float]:
    """Path → how far `up` has gone from zero."""
    return {path: float(delta.leaves["lora_up"].abs().max()) for path, (delta,) in done.adapter.deltas.items()}


def test_each_key_moves_what_it_means_by_so_much(go: Any) -> None:
    """Adam's first step is of the rate's size in every number."""
    one = moved(go(steps=1, text_encoder=True))
    rates = {"unet": 0.5, "M00": 3, "*.attn2.to_v": 2, "text_encoder": 0.25, "*.layers.1.*": 4}
    settings = {"steps": 1, "text_encoder": True, "lr_scale": rates, "options": {"loraplus_ratio": 1.5}}
    found = moved(go(**settings))
    seen = set()
    for path, size in found.items():
        wanted = 0.5
        if path.startswith("unet.mid_block."):
            wanted = 3
        if path.endswith("attn2.to_v"):
            wanted = 2
        if path.startswith("text_encoder."):
            wanted = 4 if ".layers.1." in path else 0.25
        assert size == pytest.approx(1.5 * wanted * one[path], rel=1e-3), path
        seen.add(wanted)
    assert seen == {0.5, 3, 2, 0.25, 4}


def test_the_text_encoder_may_be_all_that_trains(go: Any) -> None:
    done = go(steps=2, text_encoder=True, lr_scale={"unet": 0})
    assert {path.partition(".")[0] for path in done.adapter.modules} == {"text_encoder"}
    assert all(size > 0 for size in moved(done).values())


IDENTITY = run_fingerprint(load_recipe("style", {}), "a base", "pictures")
FROZEN = {"*": 0.0, "*.attn2.*": 1.0}


@pytest.mark.parametrize("method", ["lora", "locon", "loha", "lokr", "full"])
def test_what_has_a_rate_of_zero_is_as_the_base_has_it_and_not_in_the_file(
    method: str, base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it trains, is kept in checkpoints, or is warned of as never moved."""
    seen: list[set[str]] = []
    real = checkpoint.save_checkpoint

    def save(folder: Path, fingerprint: Any, state: TrainingState, **named: Any) -> Path:
        parameters = state.parameters
        layers = {layer for layer in base.unet.modules() if layer._forward_hooks}
        seen.append({name for name, layer in base.unet.named_modules() if layer in layers})
        assert all(".attn2." in name for name in parameters)
        assert {name for name, value in base.unet.named_parameters() if value.requires_grad} <= {
            name.removeprefix("unet.") for name in parameters
        }
        return real(folder, fingerprint, state, **named)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    settings = {**FAST, "steps": 2, "method": method, "lr": 1e-3, "lr_scale": FROZEN}
    done = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert len(done.adapter.modules) == 4 * sum(".attn2." in path for path in _attentions(base)) / 4
    assert all(".attn2." in path for path in done.adapter.modules)
    assert all(".attn2." in path for path in seen[0])
    assert bool(seen[0]) == (method != "full")


def _attentions(base: Base) -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return [path for path, module in base.unet.named_modules() if path.endswith(ends) and isinstance(module, nn.Linear)]


def test_a_frozen_word_stays_where_it_started_and_prompts_are_worked_out_once(
    go: Any, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = type(base.family).encode

    def condition(self: Any, held: Base, prompts: Any, size: Any) -> Any:
        asked.extend(prompts)
        return real(self, held, prompts, size)

    monkeypatch.setattr(type(base.family), "encode", condition)
    start = base.text_encoder.get_input_embeddings().weight[base.tokenizer.convert_tokens_to_ids("dog</w>")].clone()
    done = go(steps=3, method="pivotal", lr_scale={"text_encoder": 0})
    assert torch.equal(done.adapter.tokens["<zorp>"]["text_encoder"][0], start)
    assert asked == ["a <zorp> dog"]
    assert all(size > 0 for size in moved(done).values())
    asked.clear()
    assert not torch.equal(go(steps=3, method="pivotal").adapter.tokens["<zorp>"]["text_encoder"][0], start)
    assert len(asked) == 3 * 2


def test_states_under_a_frozen_word_are_not_kept_for_other_runs(go: Any) -> None:
    """Others have the same word for something else."""

    def kept() -> int:
        return len(list((cache_folder() / "texts").rglob("*.safetensors")))

    go(steps=1, cache=True, trigger="zork")
    before = kept()
    assert before > 0
    go(steps=1, cache=True, method="pivotal", lr_scale={"text_encoder": 0})
    assert kept() == before


@pytest.mark.parametrize("settings", [{"method": "lora"}, {"method": "pivotal"}, {"method": "full", "lr": 1e-3}])
def test_what_the_bare_base_says_is_kept_apart_from_what_the_adapted_one_says(
    settings: dict[str, Any], go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept or worked out anew in every step, losses are the same."""
    given = {"lr": 1e-2, "text_encoder": True, "prior": {"weight": 1, "by": "prediction"}, **settings}
    found = go(steps=5, text_encoder_stop=2, **given).metrics
    monkeypatch.setattr(Denoiser, "freeze_text", lambda _: None)
    anew = go(steps=5, text_encoder_stop=2, **given).metrics
    for name in ("loss", "instance", "prior"):
        assert [one[name] for one in found] == pytest.approx([one[name] for one in anew], rel=1e-4), name


def test_words_and_weights_have_rates_of_their_own(go: Any) -> None:
    plain = go(steps=1, method="pivotal", options={"token_lr_scale": 1, "keep_norm": False}).adapter
    settings = {"lr_scale": {"text_encoder.<zorp>": 3, "unet": 2}, "options": {"token_lr_scale": 2, "keep_norm": False}}
    found = go(steps=1, method="pivotal", **settings).adapter
    still = go(steps=1, method="pivotal", lr_scale={"text_encoder": 0}).adapter
    (start, one, six) = (adapter.tokens["<zorp>"]["text_encoder"] for adapter in (still, plain, found))
    torch.testing.assert_close(six - start, 6 * (one - start), rtol=1e-2, atol=1e-5)
    for path, (delta,) in found.deltas.items():
        before = plain.deltas[path][0].leaves["lora_up"]
        assert float(delta.leaves["lora_up"].abs().max()) == pytest.approx(2 * float(before.abs().max()), rel=1e-3)


def test_networks_are_named_by_their_width(go: Any, base: Base) -> None:
    widths = sorted(context_projections(base.unet))
    assert len(widths) > 1
    live = get_method("hypernetwork").attach(
        base, Spec({}, 1, 1.0, SHORT["seed"], get_method("hypernetwork").read_options({}))
    )
    start = live.adapter({}).networks[0].tensors
    live.detach()
    done = go(steps=2, method="hypernetwork", lr_scale={f"unet.{widths[0]}-*": 0})
    for name, value in done.adapter.networks[0].tensors.items():
        assert torch.equal(value, start[name]) == name.startswith(f"{widths[0]}-"), name
    with pytest.raises(DiffgraftError, match=r"lr_scale\.unet\.96-k matches no trained module: .*'unet\.\d+-k'"):
        go(method="hypernetwork", lr_scale={"unet.96-k": 0})


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"lr_scale": {"OUT11": 2}}, r"lr_scale\.OUT11 matches no trained module: did you mean 'OUT0\d'"),
        (
            {"lr_scale": {"*.atn2.*": 2}},
            r"lr_scale\.\*\.atn2\.\* matches no trained module: .*did you mean '\*\.attn2\.\*'",
        ),
        ({"lr_scale": {"text_encoder": 0.5}}, "no text encoder is.*text_encoder=true"),
        ({"lr_scale": {"*": 0}}, "No module would train: `lr_scale` is 0"),
        ({"lr_scale": {"text_encoder": 0}, "method": "textual-inversion"}, "No module would train"),
        ({"lr_scale": {"unet": -1}}, r"lr_scale\.unet=-1: must be greater than or equal to 0.*: Factors on"),
        ({"lr_scale": {"unet": "much"}}, r"Invalid value lr_scale\.unet='much'"),
        ({"lr_scale": {"unet": 2, "M00": 1}, "optimizer": "prodigy", "lr": 1}, "finds one learning rate for all"),
        (
            {"text_encoder_stop": 2, "text_encoder": True, "optimizer": "prodigy"},
            "it would jump when the text",
        ),
        ({"text_encoder_stop": 2}, "text_encoder_stop=2 has no effect, as no text encoder and no token trains"),
        ({"text_encoder_stop": 2, "method": "hypernetwork"}, "no text encoder and no token trains"),
        ({"text_encoder_stop": 2, "method": "textual-inversion"}, "text_encoder_stop=2 nothing would train after"),
        ({"text_encoder_stop": 2, "text_encoder": True, "lr_scale": {"unet": 0}}, "nothing would train after"),
        (
            {"text_encoder_stop": 2, "text_encoder": True, "lr_scale": {"text_encoder": 0}},
            "no text encoder and no token",
        ),
        ({"text_encoder_stop": 0, "text_encoder": True}, "Invalid value text_encoder_stop=0"),
    ],
)
def test_what_would_do_nothing_is_refused_before_anything_is_written(
    settings: dict[str, Any], answer: str, base: Base, pictures: Path, tmp_path: Path
) -> None:
    before = dict(base.unet.named_parameters())
    with pytest.raises(DiffgraftError, match=answer):
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **{**FAST, **settings})
    if settings.get("optimizer") != "prodigy":  # which is told only when training begins
        assert not (tmp_path / "run").exists()
    assert all(value is before[name] for name, value in base.unet.named_parameters())
    assert not any(module._forward_hooks for module in base.unet.modules())


def test_prodigy_goes_with_what_is_frozen(go: Any) -> None:
    done = go(steps=2, optimizer="prodigy", lr=1, lr_scale={"OUT*": 0})
    assert done.adapter.modules
    assert not any("up_blocks" in path for path in done.adapter.modules)


def test_rates_as_a_command_line_and_a_file_give_them(tmp_path: Path) -> None:
    given = {"OUT05": "0.5", "*.attn2.*": "2", "text_encoder": "0.5", "text_encoder_2": "0"}
    recipe = load_recipe(SUBJECT, {"subject": "dog", **{f"lr_scale.{key}": factor for key, factor in given.items()}})
    assert [*recipe.lr_scale.items()] == [(key, float(factor)) for key, factor in given.items()]
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert [*load_recipe(tmp_path / "mine.yaml", {}).lr_scale.items()] == [*recipe.lr_scale.items()]
    again = load_recipe(
        tmp_path / "mine.yaml", {"lr_scale.OUT05": 1, "options.ranks.unet": 3, "text_encoder_stop": "7"}
    )
    assert [*again.lr_scale] == ["*.attn2.*", "text_encoder", "text_encoder_2", "OUT05"]  # said last, it counts
    assert (again.options, again.text_encoder_stop) == ({"ranks": {"unet": 3}}, 7)
    assert load_recipe(tmp_path / "mine.yaml", {"text_encoder_stop": ""}).text_encoder_stop is None
    assert recipe.fingerprint() != load_recipe(SUBJECT, {"subject": "dog"}).fingerprint()
    with pytest.raises(DiffgraftError, match="did you mean 'lr_scale'"):
        load_recipe(SUBJECT, {"subject": "dog", "lr_scales.unet": 1})


def test_the_order_of_patterns_is_part_of_what_a_run_is() -> None:
    def told(key: str, before: str, after: str) -> list[str]:
        one, other = (
            run_fingerprint(
                load_recipe(SUBJECT, {"subject": "dog", **{f"{key}.{name}": 2 for name in order.split()}}), ""
            )
            for order in (before, after)
        )
        return differences(json.loads(json.dumps(one, sort_keys=True)), other)  # as it lies in a checkpoint

    for key, two in (("lr_scale", "2.0"), ("options.ranks", "2")):
        assert told(key, "unet OUT* M00", "unet OUT* M00") == []
        assert told(key, "unet OUT*", "OUT* unet") == [f"order of {key}: ['unet', 'OUT*'] → ['OUT*', 'unet']"]
        assert told(key, "unet", "unet M00")[0] == f"{key}.M00: unset → {two}"


class Two(Attached):
    """A matrix in the UNet and one in the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        names = ("unet.a.down", "text_encoder.b.down")
        self.values = {name: nn.Parameter(torch.randn(70, 90, generator=generator)) for name in names}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.values)

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return Adapter({}, metadata)

    def detach(self) -> None: ...


def step(held: Two, recipe: Any, optimizer: Any, average: Ema | None, number: int) -> None:
    values = {name: value for name, value in held.values.items() if value.requires_grad}
    walk(recipe, values, optimizer, number)
    if average is not None:
        average.step()


@pytest.mark.parametrize("ema", [0.0, 0.7])
@pytest.mark.parametrize("name", _FACTORIES)
def test_from_the_stop_on_text_has_the_very_same_bits(name: str, ema: float, tmp_path: Path) -> None:
    """Live, at rest and at the end, with weight decay, through checkpoints from before, at and after the stop."""
    if name == "schedule-free" and ema:
        pytest.skip("schedule-free averages the weights itself")
    recipe = recipe_of(name, weight_decay=0.1, **({"ema": ema} if ema else {}))
    stop, last = 4, 10

    def run_through(held: Two, optimizer: Any, average: Ema | None, first: int) -> dict[str, list[torch.Tensor]]:
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in held.values}
        for number in range(first, last):
            if number == max(stop, first):
                freeze_text_parameters(held, optimizer, average)
            step(held, recipe, optimizer, average, number)
            with eval_weights(optimizer, average):
                for key, value in held.values.items():
                    seen[key].append(value.detach().clone())
            state = state_of(number + 1, held.values, optimizer, average)
            save_checkpoint(tmp_path / str(first), IDENTITY, state, keep=99)
        load_eval_weights(optimizer, average)
        for key, value in held.values.items():
            seen[key].append(value.detach().clone())
        return seen

    def fresh() -> tuple[Two, Any, Ema | None]:
        held = Two()
        return held, new_optimizer(recipe, held.values, {}), Ema(held.values, ema) if ema else None

    whole = run_through(*fresh(), 0)
    text, unet = whole["text_encoder.b.down"], whole["unet.a.down"]
    for number in range(stop):
        assert not torch.equal(text[number], text[number + 1]) or number == stop - 1
    assert all(torch.equal(value, text[stop - 1]) for value in text[stop:])  # the value that counted then
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(unet[:-1]))
    live = [load_file(tmp_path / "0" / f"checkpoints/step-{n:06d}/parameters.safetensors") for n in (5, 7, 10)]
    assert all(torch.equal(value["text_encoder.b.down"], text[-1]) for value in live)
    for first in (2, 4, 7):
        place = tmp_path / str(first)
        shutil.copytree(tmp_path / "0" / f"checkpoints/step-{first:06d}", place / f"checkpoints/step-{first:06d}")
        held, optimizer, average = fresh()
        assert restored_step(place, IDENTITY, state_of(0, held.values, optimizer, average)) == first
        again = run_through(held, optimizer, average, first)
        for key, values in again.items():
            assert all(torch.equal(one, other) for one, other in zip(values, whole[key][first:], strict=True)), key


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


STOPPING: list[dict[str, Any]] = [
    {"text_encoder": True, "ema": 0.6, "accumulate": 2},
    {"method": "pivotal", "options": {"vectors": 2}, "weight_decay": 0.1},
    {"method": "pivotal", "optimizer": "schedule-free", "options": {"weights": "loha"}},
    {"method": "full", "text_encoder": True, "lr": 1e-4, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("settings", STOPPING)
def test_a_run_whose_text_encoder_stops_goes_on_with_equal_bits(
    settings: dict[str, Any], base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before, at and after the stop; from there on text does not move, and is worked out once."""
    kept: dict[int, dict[str, torch.Tensor]] = {}
    asked: list[int] = []
    real_save, real_condition = checkpoint.save_checkpoint, type(base.family).encode

    def save(folder: Path, fingerprint: Any, state: TrainingState, **named: Any) -> Path:
        kept[state.step] = {name: value.detach().clone() for name, value in state.parameters.items()}
        return real_save(folder, fingerprint, state, **named)

    def condition(self: Any, held: Base, prompts: Any, size: Any) -> Any:
        asked.append(max(kept, default=0))
        return real_condition(self, held, prompts, size)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(type(base.family), "encode", condition)
    given = {**FAST, "steps": 7, "text_encoder_stop": 3, "checkpoint_every": 1, **settings}
    whole = train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **given)
    accumulate = settings.get("accumulate", 1)
    assert [asked.count(done) for done in range(7)] == [accumulate] * 3 + [1, 0, 0, 0]
    text = {name for name in kept[1] if "text_encoder." in name}
    assert 0 < len(text) < len(kept[1])
    for name in kept[1]:
        steps = [torch.equal(kept[n][name], kept[n + 1][name]) for n in range(1, 7)]
        if name in text:
            assert all(steps[3:]), name  # 4 is the first that was saved after the stop
        else:
            assert not any(steps), name
    assert any(not torch.equal(kept[1][name], kept[3][name]) for name in text)
    for place in (2, 3, 5) if settings.get("ema") else (4,):
        folder = tmp_path / f"cut-{place}"
        with interrupted_after(place):
            train(SUBJECT, base=base, images=pictures, output=folder, **given)
        again = train(base=base, resume=folder)
        assert digest(again.adapter_file) == digest(whole.adapter_file)
        assert list(again.metrics) == list(whole.metrics)


def test_what_is_left_is_what_the_unet_was_trained_beside(go: Any) -> None:
    """The file's text weights are those of the stop, whatever comes after."""
    short = go(steps=3, text_encoder=True, ema=0.6).adapter
    long = go(steps=6, text_encoder=True, ema=0.6, text_encoder_stop=3).adapter
    for path, (delta,) in long.deltas.items():
        same = all(torch.equal(leaf, short.deltas[path][0].leaves[name]) for name, leaf in delta.leaves.items())
        assert same == path.startswith("text_encoder."), path
