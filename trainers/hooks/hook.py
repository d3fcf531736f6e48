"""The contract of a hook: something that a run does besides its steps.

The training loop calls all hooks in order. To add a hook, subclass `Hook` in a new file of this package, override the
methods it needs, and add it to the list in `diffgraft.trainers.run.train_adapter`.
"""

from collections.abc import Collection

from diffgraft.trainers.state import TrainingState


class Hook:
    """Base class of hooks; every method does nothing, and may be overridden."""

    name = ""
    """Name of the hook in estimates of the time that is left"""
    every = 0
    """Steps between two calls of `run`; 0 if they are not periodic"""

    def begin(self, state: TrainingState) -> None:
        """Called once before the first step, after the newest checkpoint was loaded into `state`."""

    def after_backward(self) -> None:
        """Called in every step after the gradients are computed, before the optimizer updates the parameters."""

    def is_overdue(self, state: TrainingState) -> bool:  # noqa: ARG002
        """Whether a resumed run has to call `run` for `state.step`, as it stopped right after that step."""
        return False

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        """Whether to call `run` after this step; the answer must be equal on all processes.

        `asked` contains `sample` or `save` if a `Control` has requested it.
        """
        return False

    def run(self, state: TrainingState) -> None:
        """Do the hook's work after a step; called on all processes together, of which only the main one writes."""

    def interrupted(self, state: TrainingState) -> None:
        """Called when the run stops or fails between two steps, before the exception propagates."""

    def end(self, state: TrainingState) -> None:
        """Called once after the last step, when the parameters have the values that are saved."""

    def close(self) -> None:
        """Called last, whether the run succeeded or failed."""
