"""What a bar says of the time that is left, held to runs on a clock of their own."""

import io

import pytest

from diffgraft.trainers.hooks.eta import Pace, PacedBar

SAMPLES, CHECKPOINT = 10.0, 2.0


class Simulated:
    """A run of 100 steps of a second each, with samples every 20 and checkpoints every 15; the first step is slow."""

    def __init__(self, done: int) -> None:
        self.now, self.done = 1000.0, done
        self.pace = Pace(100, lambda: self.now)
        self.now += 30

    def step(self) -> None:
        self.now += 1
        self.done += 1
        self.pace.stepped()
        for kind, every, seconds in (("samples", 20, SAMPLES), ("checkpoint", 15, CHECKPOINT)):
            if self.done % every == 0:
                with self.pace.pause(kind, every):
                    self.now += seconds


@pytest.mark.parametrize("begun", [0, 46])
def test_the_rest_takes_what_was_said_it_would(begun: int) -> None:
    """Once every kind of pause has come, to the second; after a resume as in a run that was never stopped."""
    run = Simulated(begun)
    assert run.pace.left(begun) is None
    run.step()
    assert run.pace.left(run.done) == pytest.approx((100 - run.done) * 31)  # nothing better is known
    run.step()
    assert run.pace.left(run.done) == pytest.approx(100 - run.done)
    while run.done < begun + 20:
        run.step()
    said = []
    while run.done < 100:
        said.append((run.now, run.pace.left(run.done)))
        run.step()
    for when, left in said:
        assert left == pytest.approx(run.now - when)
    assert run.pace.left(100) == pytest.approx(0)


def test_steps_that_grow_slower_are_followed() -> None:
    now = 0.0
    pace = Pace(1000, lambda: now)
    for took in [1.0] * 200 + [3.0] * 100:
        now += took
        pace.stepped()
    assert pace.left(300) == pytest.approx(700 * 3)


def test_the_bar_shows_it() -> None:
    run = Simulated(40)
    bar = PacedBar(range(40, 100), "training", initial=40, total=100, file=io.StringIO(), mininterval=1e9)
    assert "40/100 [00:00<?" in str(bar)
    bar.pace = run.pace
    for _ in range(25):
        run.step()
        bar.update()
    left = 35 + 2 * SAMPLES + 2 * CHECKPOINT
    assert run.pace.left(65) == pytest.approx(left)
    assert f"65/100 [00:00<00:{left:.0f}]" in str(bar)
    assert "/s" not in str(bar)
    assert "s/it" not in str(bar)
    bar.update(35)
    assert "100/100" in str(bar)
    bar.close()
