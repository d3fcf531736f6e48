"""The judge: a small classifier of the tiny world's pictures.

It predicts the thing, setting, style and colour that a 64 × 64 picture shows. Its features serve as an embedding for
comparing pictures of the tiny world.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffgraft.bases.tiny.world import COLOURS, SETTINGS, STYLES, THINGS, Scene

LABELS: Mapping[str, tuple[str, ...]] = {
    "thing": tuple(THINGS),
    "setting": tuple(SETTINGS),
    "style": tuple(STYLES),
    "colour": ("own", *COLOURS),
}
"""Label kind → its class names, in the order of the classifier's outputs; "own" means the thing's original colours."""


def labels_of(scene: Scene) -> list[int]:
    """Return the true class index of a scene for each label kind, in the order of `LABELS`."""
    return [LABELS[kind].index(getattr(scene, kind) or "own") for kind in LABELS]


class Judge(nn.Module):
    """Convolutional classifier: four strided stages, a feature layer and one linear head for each kind in `LABELS`."""

    def __init__(self, width: int = 24, features: int = 128) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 5 * width)
        stages = []
        for before, after in itertools.pairwise(widths):
            stages += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
            stages += [nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.stages = nn.Sequential(*stages)
        self.to_features = nn.Linear(16 * widths[-1], features)
        self.heads = nn.ModuleDict({kind: nn.Linear(features, len(names)) for kind, names in LABELS.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """Map pictures [n, 3, 64, 64] in -1..1 to features [n, 128], taken before the ReLU that precedes the heads."""
        features: Tensor = self.to_features(self.stages(pictures).flatten(1))
        return features

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the logits [n, classes] of thing, setting, style and colour for pictures [n, 3, 64, 64] in -1..1."""
        features = torch.relu(self.features(pictures))
        return {kind: head(features) for kind, head in self.heads.items()}


def load_judge(folder: Path) -> Judge:
    """Load the judge from ``judge.safetensors`` in `folder`, in float32 and in evaluation mode."""
    judge = Judge()
    weights = load_file(folder / "judge.safetensors").items()
    judge.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in weights})
    return judge.eval()
