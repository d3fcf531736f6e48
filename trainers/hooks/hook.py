"""The contract of a hook: something that a run does beside its steps.

The training loop calls every hook in order. A new one is a class with the methods that it needs, in a file of this
package, and a line in `diffgraft.trainers.run.train_adapter`.
"""

from collections.abc import Collection

from diffgraft.trainers.state import TrainingState


class Hook:
    """Does nothing, at no time; each method is there to be overridden."""

    name = ""
    """Names it in estimates of the time that is left"""
    every = 0
    """Steps from one time to the next; 0 where it is not regular"""

    def begin(self, state: TrainingState) -> None:
        """Called once, when the state of the newest checkpoint is back in place, before the first step."""

    def after_backward(self) -> None:
        """Called in every step when the gradients are there, before the parameters move."""

    def is_missed(self, state: TrainingState) -> bool:  # noqa: ARG002
        """Whether a run that was stopped right after its last step has yet to do this for it."""
        return False

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        """Whether to `run` after this step, the same on all processes; `asked` has `sample` or `save` on request."""
        return False

    def run(self, state: TrainingState) -> None:
        """Do it, on all processes together; one of them writes."""

    def interrupted(self, state: TrainingState) -> None:
        """Called on a stop or an error between two steps, before it is passed on."""

    def end(self, state: TrainingState) -> None:
        """Called once after the last step, the parameters having the values that are saved."""

    def close(self) -> None:
        """Called last, however the run has ended."""
