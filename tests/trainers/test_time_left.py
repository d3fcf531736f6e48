"""What a bar says of the time that is left, held to runs on a clock of their own."""

import io

import pytest

from diffgraft.progress import Advance, Bars, Done, Phase
from diffgraft.trainers.hooks.time_left import TimeLeft

SAMPLES, CHECKPOINT = 10.0, 2.0


class Simulated:
    """A run of 100 steps of a second each, with samples every 20 and checkpoints every 15; the first step is slow."""

    def __init__(self, done: int) -> None:
        self.now, self.done = 1000.0, done
        self.pace = TimeLeft(100, lambda: self.now)
        self.now += 30

    def step(self) -> None:
        self.now += 1
        self.done += 1
        self.pace.end_step()
        for kind, every, seconds in (("samples", 20, SAMPLES), ("checkpoint", 15, CHECKPOINT)):
            if self.done % every == 0:
                with self.pace.pause(kind, every):
                    self.now += seconds


@pytest.mark.parametrize("begun", [0, 46])
def test_the_rest_takes_what_was_said_it_would(begun: int) -> None:
    """Once every kind of pause has come, to the second; after a resume as in a run that was never stopped."""
    run = Simulated(begun)
    assert run.pace.remaining(begun) is None
    run.step()
    assert run.pace.remaining(run.done) == pytest.approx((100 - run.done) * 31)  # nothing better is known
    run.step()
    assert run.pace.remaining(run.done) == pytest.approx(100 - run.done)
    while run.done < begun + 20:
        run.step()
    said = []
    while run.done < 100:
        said.append((run.now, run.pace.remaining(run.done)))
        run.step()
    for when, left in said:
        assert left == pytest.approx(run.now - when)
    assert run.pace.remaining(100) == pytest.approx(0)


def test_steps_that_grow_slower_are_followed() -> None:
    now = 0.0
    pace = TimeLeft(1000, lambda: now)
    for took in [1.0] * 200 + [3.0] * 100:
        now += took
        pace.end_step()
    assert pace.remaining(300) == pytest.approx(700 * 3)


def test_the_bar_shows_it() -> None:
    """The time that is left is the estimate, and no rate is shown, as pauses come between steps."""
    run, stream = Simulated(40), io.StringIO()
    bars = Bars(stream)
    bars(Phase("training", 100, 40))
    for _ in range(25):
        run.step()
        bars(Advance("training", run.done, 100, run.pace.remaining(run.done), {"loss": 0.5}))
    left = 35 + 2 * SAMPLES + 2 * CHECKPOINT
    assert run.pace.remaining(65) == pytest.approx(left)
    shown = str(bars._bars[-1])
    assert f"65/100 [00:00<00:{left:.0f}" in shown
    assert "loss=0.5" in shown
    assert "/s" not in shown
    bars(Done("training", 1.0))
    assert bars._bars == []
