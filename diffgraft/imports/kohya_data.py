"""Data sets of sd-scripts: its dataset_config, or folders named by arguments, as subsets that are all alike or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.data.inventory import kohya_folders
from diffgraft.errors import DiffgraftError
from diffgraft.imports.account import Account, short
from diffgraft.imports.counting import count_pictures
from diffgraft.imports.reading import beside

PER_SUBSET = ("image_dir", "metadata_file", "num_repeats", "is_reg", "class_tokens", "conditioning_data_dir")
"""What each subset has of its own"""
SHARED = (
    *("color_aug", "face_crop_aug_range", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens"),
    *("keep_tokens_separator", "secondary_separator", "caption_separator", "enable_wildcard", "token_warmup_min"),
    *("token_warmup_step", "caption_prefix", "caption_suffix", "custom_attributes", "resize_interpolation"),
    *("caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate", "caption_extension"),
    *("cache_info", "alpha_mask", "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket"),
    *("max_bucket_reso", "min_bucket_reso", "validation_seed", "validation_split", "resolution", "network_multiplier"),
)
"""What may be said of a subset, a data set, or all of them, and is one for all here"""
_ARGUMENTS = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""Keys of data sets that arguments have under another name"""


@dataclass(frozen=True)
class Subset:
    """A folder of pictures."""

    folder: str
    repeats: int = 1
    says: str = ""
    """Prompt of pictures without a caption"""
    is_class: bool = False
    metadata: str = ""
    masks: str = ""

    def count(self, config: Path) -> int | None:
        """Pictures in it, repeats counted; None where it cannot be read."""
        found = count_pictures(beside(self.folder, config))
        return None if found is None else found * self.repeats


@dataclass
class Data:
    """All subsets."""

    subsets: list[Subset] = field(default_factory=list)
    parent: str = ""
    """The folder that holds them all, in kohya's layout"""
    class_parent: str = ""
    """The same of class images"""

    @property
    def instance(self) -> list[Subset]:
        return [one for one in self.subsets if not one.is_class]

    @property
    def of_class(self) -> list[Subset]:
        return [one for one in self.subsets if one.is_class]

    def pictures(self, config: Path) -> int | None:
        """Pictures in an epoch: class images come as often as the others; None where folders cannot be read."""
        counts = [one.count(config) for one in self.instance]
        if not counts or any(count is None for count in counts):
            return None
        has_class = bool(self.of_class or self.class_parent)
        return sum(count for count in counts if count is not None) * (2 if has_class else 1)


def from_arguments(account: Account, config: Path) -> Data:
    """What `train_data_dir`, `reg_data_dir` and `in_json` name."""
    parent, class_parent, table = (account.text(key) for key in ("train_data_dir", "reg_data_dir", "in_json"))
    if table:
        return Data([Subset(parent, account.whole("dataset_repeats") or 1, metadata=table)])
    found = _counted(parent, config, False) + _counted(class_parent, config, True)
    return Data(found, parent, class_parent)


def _counted(parent: str, config: Path, is_class: bool) -> list[Subset]:
    folder = beside(parent, config)
    folders = kohya_folders(folder) if folder is not None else []
    return [Subset(str(one.folder), one.repeats, one.prompt, is_class) for one in folders]


def from_dataset_config(account: Account, told: Mapping[str, Any], where: Path) -> Data:
    """What a dataset_config says; what all subsets share is put among the account's given keys.

    Raises:
        DiffgraftError: it is not laid out as one.
    """
    general, data_sets = told.get("general", {}), told.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(data_sets, list) or not data_sets:
        raise DiffgraftError(
            f"{where} should have [[datasets]] with [[datasets.subsets]], as sd-scripts' dataset_config."
        )
    arguments = {key: account.given.get(_ARGUMENTS.get(key, key)) for key in (*SHARED, *PER_SUBSET)}
    levels: list[Sequence[Mapping[str, Any]]] = []
    for data_set in data_sets:
        subsets = data_set.get("subsets", []) if isinstance(data_set, dict) else None
        if not isinstance(subsets, list) or not all(isinstance(one, dict) for one in subsets):
            raise DiffgraftError(f"{where} should have [[datasets.subsets]] under each of [[datasets]].")
        levels += [(subset, data_set, general, arguments) for subset in subsets]
    for key in told:
        if key not in ("general", "datasets"):
            account.aside(key, told[key], "a dataset_config has [general] and [[datasets]] alone.")
    for level in {id(one): one for stack in levels for one in stack[:3]}.values():
        for key, value in level.items():
            if key not in (*SHARED, *PER_SUBSET, "subsets"):
                account.aside(key, value, "no key of data sets that is known here.")
    own = [stack for stack in levels if not stack[0].get("is_reg")]
    for key in SHARED:
        _share(account, key, [_first(key, stack) for stack in own or levels])
    return Data([_subset(stack) for stack in levels])


def _share(account: Account, key: str, values: Sequence[Any]) -> None:
    """One value for all, where they agree."""
    distinct = [value for row, value in enumerate(values) if value not in values[:row]]
    if len(distinct) > 1:
        account.given.pop(_ARGUMENTS.get(key, key), None)
        shown = " and ".join("unset" if value is None else str(value) for value in distinct)
        account.aside(key, shown, "it differs between the data sets, and is one for all here: set it by hand.")
    elif distinct and distinct[0] is not None:
        account.given[_ARGUMENTS.get(key, key)] = distinct[0]


def _first(key: str, levels: Sequence[Mapping[str, Any]]) -> Any:
    return next((level[key] for level in levels if level.get(key) is not None), None)


def _subset(levels: Sequence[Mapping[str, Any]]) -> Subset:
    said = {key: _first(key, levels) for key in PER_SUBSET}
    repeats = said["num_repeats"]
    if repeats is not None and (not isinstance(repeats, int) or isinstance(repeats, bool)):
        raise DiffgraftError(f"num_repeats={short(repeats)} in the dataset_config should be a whole number.")
    return Subset(
        str(said["image_dir"] or ""),
        1 if repeats is None else repeats,
        str(said["class_tokens"] or ""),
        bool(said["is_reg"]),
        str(said["metadata_file"] or ""),
        str(said["conditioning_data_dir"] or ""),
    )
