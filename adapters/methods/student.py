"""A student: a smaller denoiser that takes the place of the base's, trained to predict what the base predicts.

Plain knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) of a denoiser. As in BK-SDM (Kim et al. 2023,
arXiv:2305.15798, section 3.1), a student has fewer layers in a block, or no middle, and begins with the weights of the
base that it keeps; it may also have narrower layers, which begin with the first rows and columns of the base's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Options, Spec, only_network
from diffgraft.adapters.patch import to_cpu_float32
from diffgraft.bases import Base
from diffgraft.bases.loading import base_of
from diffgraft.bases.registry import denoisers
from diffgraft.bases.student import StudentSize
from diffgraft.errors import one_line
from diffgraft.third_party import quiet_libraries

PART = "student"
"""Path of a student, and first part of the names of its parameters"""


class StudentOptions(Options):
    """Options of the method `student`: `options.NAME=VALUE`."""

    width: float = Field(1.0, gt=0, le=1)
    """Width of the student's layers, as a share of those of the base"""
    layers: int | None = Field(None, ge=1, le=16)
    """Layers in a block; unset: as many as the base has"""
    middle: bool = False
    """Whether the student has the base's middle block"""


@dataclass(frozen=True, eq=False, repr=False)
class Student(Network):
    """A trained student, in memory."""

    tensors: Mapping[str, Tensor]
    """Weights by the names of the denoiser's class"""
    settings: Mapping[str, Any]
    """Configuration of the denoiser's class"""

    kind = "student"
    replaces_denoiser = True

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        if strength == 0:
            return lambda: None
        if strength != 1:
            raise ValueError(f"it takes the place of the denoiser, and so has the strengths 0 and 1, not {strength:g}")
        denoiser = next(parts[name] for name in denoisers() if name in parts)
        student = self.build(type(denoiser))
        like = next(denoiser.parameters())
        with quiet_libraries():
            student.to(like.device, like.dtype)
        return _replaced(denoiser, student, lambda: True)

    def build(self, kind: Any) -> nn.Module:
        """Build the student as an instance of the denoiser's class, frozen, in float32 on the CPU.

        Raises:
            ValueError: its tensors and settings do not fit together, or it is for another kind of denoiser.
        """
        try:
            with torch.device("meta"):
                student: nn.Module = kind.from_config(dict(self.settings))
            student.load_state_dict({name: value.float() for name, value in self.tensors.items()}, assign=True)
        except Exception as error:  # diffusers raises many kinds of exceptions for wrong settings
            raise ValueError(f"its weights and settings do not fit together: {one_line(error, 300)}") from error
        return student.requires_grad_(False).eval()


class AttachedStudent(Attached):
    """A student that is trained in the place of the denoiser, which computes again where the method is disabled."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        base = target if isinstance(target, Base) else base_of(target)
        options: StudentOptions = spec.options
        self._denoiser = [base.denoiser]  # in a list, so that it is no submodule
        size = StudentSize(options.width, options.layers, options.middle)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            student = base.family.student(base, size)
        self._take(student.to(base.device))

    def _take(self, student: nn.Module) -> None:
        """Let `student` compute in the denoiser's place."""
        self._student = student.requires_grad_(True).train()
        self._undo = _replaced(self._denoiser[0], self._student, lambda: not self.is_disabled)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{PART}.{name}": value for name, value in self._student.named_parameters()}

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        settings = {key: value for key, value in dict(self._student.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
        return Adapter({}, metadata, (Student(to_cpu_float32(self._student.state_dict()), settings),))

    def paths(self) -> dict[str, str]:
        return dict.fromkeys(self.trainable(), PART)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only student of `adapter`, which may be of another size."""
        student = only_network(adapter, Student).build(type(self._denoiser[0]))
        self._undo()
        self._take(student.to(next(self._student.parameters()).device))
        return {PART}

    @property
    def trained_network(self) -> nn.Module:
        return self._student

    def detach(self) -> None:
        self._undo()


class _Replacement:
    """The function `forward` of a denoiser while a student computes for it; students are undone in any order."""

    def __init__(self, denoiser: nn.Module, student: nn.Module, acts: Callable[[], bool]) -> None:
        self.before, self.own = vars(denoiser).get("forward"), denoiser.forward
        self.student, self.acts, self.is_undone = student, acts, False

    def __call__(self, *given: Any, **named: Any) -> Any:
        is_acting = not self.is_undone and self.acts()
        return self.student(*given, **named) if is_acting else self.own(*given, **named)


def _replaced(denoiser: nn.Module, student: nn.Module, acts: Callable[[], bool]) -> Callable[[], None]:
    """Let `student` compute what `denoiser` is called for, while `acts`; return a function that ends it."""
    replacement = _Replacement(denoiser, student, acts)
    denoiser.forward = replacement

    def undo() -> None:
        replacement.is_undone = True
        while isinstance(top := vars(denoiser).get("forward"), _Replacement) and top.is_undone:
            if top.before is None:
                del denoiser.forward
            else:
                denoiser.forward = top.before

    return undo


def is_replaced(denoiser: nn.Module) -> bool:
    """Whether a student computes in the place of a denoiser."""
    return isinstance(vars(denoiser).get("forward"), _Replacement)


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the student from tensors and settings; whether they fit together is seen when it is built."""
    return Student(dict(tensors), dict(settings))


METHOD = Method(
    name="student",
    summary="a smaller denoiser in the place of the base's, trained to predict the same; with the recipe `student`",
    attach=AttachedStudent,
    options=StudentOptions,
    unsupported={
        **NO_FACTORS,
        "layers": "it is a whole denoiser",
        "text_encoder": "it is a whole denoiser",
        "compile": "the base's denoiser is what would be translated",
    },
    read_network=read_network,
)
