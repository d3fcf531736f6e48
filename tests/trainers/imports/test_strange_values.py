"""Any key with any value: a recipe comes of it, or a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffgraft.errors import DiffgraftError
from diffgraft.imports import convert_config, kohya_gui, kohya_keys, onetrainer_keys

STRANGE: list[Any] = [
    [],
    {},
    "x",
    -1,
    True,
    3.5,
    [1, 2],
    ["a=b"],
    {"a": 1},
    1e30,
    "1e400",
    float("nan"),
    [None],
    10**400,
    "9" * 5000,
]
"""The last two are a whole number that no float holds, and a name that no file has."""
NETWORK = {"network_module": "networks.lora", "train_data_dir": "/nowhere"}
GUI = {"max_resolution": "512,512", "LoRA_type": "LyCORIS/LoKr"}
ONETRAINER = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}


def nested(key: str, value: Any) -> dict[str, Any]:
    """A key with dots as OneTrainer has it."""
    *outer, last = key.split(".")
    found: Any = {last: value}
    for name in reversed(outer):
        found = {name: [found] if name == "concepts" else found}
    return found


@pytest.mark.parametrize(
    "value", STRANGE, ids=lambda value: str(value)[:9] if isinstance(value, str) else type(value).__name__
)
def test_strange_values_are_answered(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    tried = [{**start, key: value} for key in kohya_keys.DEFAULTS for start in (NETWORK, {"token_string": "t"})]
    tried += [{**GUI, key: value} for key in {*kohya_gui.READ, *kohya_gui.RENAMED, *kohya_gui.ARGUMENTS}]
    tried += [
        {**ONETRAINER, **nested(key, value)} for key in [*onetrainer_keys.DEFAULTS, "unet", "samples", "__version"]
    ]
    tried += [{**ONETRAINER, "concepts": [{"path": "p", key: value}]} for key in onetrainer_keys.CONCEPT]
    answered = 0
    for config in tried:
        file.write_text(json.dumps(config), "utf-8")
        try:
            convert_config([file]).sections()
        except DiffgraftError as error:
            answered += 1
            assert len(str(error)) < 1000  # noqa: PT017  (either outcome will do)
            assert str(error).endswith((".", "?"))  # noqa: PT017  (either outcome will do)
    assert 0 < answered < len(tried)
