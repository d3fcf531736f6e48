"""An adapter under the training (`under`): merged into the base while another one is trained on top of it.

Two uses: a training adapter of a distilled base, which undoes the distillation for the time of the training, so that
what is learned does not (`when=training`); and an adapter that will always be used together with the new one, such as a
style that the subject shall fit (`when=always`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import Graft
from diffgraft.trainers.recipe.groups import AdapterSettings, OutputSettings, RuntimeSettings
from diffgraft.trainers.recipe.settings import UnderSettings
from diffgraft.trainers.run.adapter_file import AdapterFile


class Under:
    """The adapter under a training; without one, all its blocks change nothing."""

    def __init__(self, settings: UnderSettings, base: Base, file: AdapterFile | None) -> None:
        """Prepare the adapter of `file`; it is applied within the blocks of `always` and `while_training`.

        Args:
            settings: strength, and when it is applied.
            base: the base that it is merged into.
            file: the adapter; None without one.

        Raises:
            DiffgraftError: the adapter cannot be under another one.
        """
        if file is not None:
            check_under_file(file)
        self._settings, self._base, self._file = settings, base, file
        self._words, self._changes = Graft(base), Graft(base)

    @property
    def is_for_training_only(self) -> bool:
        """Whether samples and the final pictures are drawn without it."""
        return self._settings.when == "training"

    @contextmanager
    def always(self) -> Iterator[None]:
        """Apply the adapter within the block if it is used outside the training as well."""
        with self._applied(not self.is_for_training_only):
            yield

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Apply the adapter within the block if it is used in the training alone."""
        with self._applied(self.is_for_training_only):
            yield

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Restore the base's own weights within the block if the adapter is used in the training alone.

        Its words stay: they change no prompt without them, and words that are trained lie on top of them.
        """
        if self._file is None or not self.is_for_training_only:
            yield
            return
        self._changes.remove()
        try:
            yield
        finally:
            self._merge(self._file.adapter)

    @contextmanager
    def _applied(self, is_now: bool) -> Iterator[None]:
        if self._file is None or not is_now:
            yield
            return
        adapter = self._file.adapter
        if adapter.tokens:
            self._words.set({replace(adapter, deltas={}, networks=()): 1.0})
        try:
            self._merge(adapter)
            self._base.under = f"{self._file.hash} {self._settings.strength}"
            yield
        finally:
            self._base.under = ""
            self._changes.remove()
            self._words.remove()

    def _merge(self, adapter: Adapter) -> None:
        self._changes.set({replace(adapter, tokens={}): self._settings.strength})


def check_under_file(file: AdapterFile) -> None:
    """Check that the adapter of `under.adapter` leaves a denoiser on which another adapter can be trained.

    Raises:
        DiffgraftError: it is a student, which computes in the place of the denoiser.
    """
    if any(network.replaces_denoiser for network in file.adapter.networks):
        raise DiffgraftError(
            f"under.adapter={file.path} is a student, which computes in the place of the base's denoiser, so that "
            "nothing else can be trained on it: write it as a base with `diffgraft merge`, and train on that base."
        )


def check_under(adapter: AdapterSettings, runtime: RuntimeSettings, outputs: OutputSettings) -> None:
    """Check that an adapter under the training can be combined with the other settings.

    Raises:
        DiffgraftError: it cannot.
    """
    under = adapter.under
    if not under.adapter:
        if under != UnderSettings.model_validate({}):
            raise DiffgraftError("under.strength and under.when have no effect without a file: set under.adapter.")
        return
    if runtime.shard != "none":
        raise DiffgraftError(f"under.adapter cannot be combined with shard={runtime.shard}: remove one of them.")
    if adapter.method == "full" and under.when == "training" and outputs.previews:
        raise DiffgraftError(
            "method=full trains the base's own weights, from which samples cannot lift the adapter of under.adapter: "
            "set previews=false, or under.when=always."
        )
