"""What is done on the way takes little time; the curves of a run are there while it runs."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffgraft.bases import Base
from diffgraft.generation.plots import running_mean
from diffgraft.trainers import loop
from diffgraft.trainers.hooks import artifacts
from diffgraft.trainers.hooks.throttle import Throttle
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT


@pytest.mark.parametrize(("step", "cost", "growth"), [(0.5, 0.3, 1.0), (0.02, 0.3, 1.1), (40.0, 2.0, 1.0)])
def test_it_takes_a_hundredth_of_the_time(step: float, cost: float, growth: float) -> None:
    now, spent, times = 0.0, 0.0, 0

    def work() -> None:
        nonlocal now, spent, times
        took = cost * growth**times
        now, spent, times = now + took, spent + took, times + 1

    sparing = Throttle(work, clock=lambda: now)
    while now < 20_000:
        now += step
        sparing()
    assert 0.005 < spent / now < 0.0125
    assert times > 20


@pytest.mark.usefixtures("real_loss_plots")
def test_the_curves_of_a_run_are_there_while_it_runs(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the held-out loss at the steps it is of."""
    drawn: list[Figure] = []
    real, accumulate = Figure.savefig, loop.TrainingLoop._accumulate

    def savefig(self: Figure, *words: Any, **named: Any) -> None:
        drawn.append(self)
        real(self, *words, **named)

    def look(*words: Any) -> Any:
        if words[-1] > 0:
            with Image.open(tmp_path / "run" / "loss.png") as image:
                image.load()
        assert len(drawn) == words[-1]
        return accumulate(*words)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(loop.TrainingLoop, "_accumulate", look)
    monkeypatch.setattr(artifacts, "Throttle", lambda work: Throttle(work, expected=0, clock=lambda: 0.0))
    settings: dict[str, Any] = {"subject": "dog", "steps": 5, "batch": 2, "sample_every": 0, "sample_prompts": "a dog"}
    settings |= {"prior": {"images": 2}, "validation": {"share": 0.4, "every": 2, "pairs": 4}}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert len(drawn) == 6  # and at the end
    for figure, last in ((drawn[2], 3), (drawn[-1], 5)):
        (axes,) = figure.axes
        lines = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        steps = list(range(1, last + 1))
        losses = [entry["loss"] for entry in run.metrics[:last]]
        assert lines["loss (running mean)"] == (steps, running_mean(losses))
        assert {"instance (running mean)", "prior (running mean)"} <= set(lines)
        due = [step for step in steps if step % 2 == 0 or step == 5]
        assert lines["validation"] == (due, [run.metrics[step - 1]["validation"] for step in due])
