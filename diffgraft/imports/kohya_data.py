"""Data sets of sd-scripts, from a dataset_config or from arguments, as a list of subsets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.data.inventory import kohya_folders
from diffgraft.errors import DiffgraftError
from diffgraft.imports.counting import count_pictures
from diffgraft.imports.import_report import ImportReport, short
from diffgraft.imports.reading import find_file

PER_SUBSET = ("image_dir", "metadata_file", "num_repeats", "is_reg", "class_tokens", "conditioning_data_dir")
"""Keys that have a value for each subset"""
SHARED = (
    *("color_aug", "face_crop_aug_range", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens"),
    *("keep_tokens_separator", "secondary_separator", "caption_separator", "enable_wildcard", "token_warmup_min"),
    *("token_warmup_step", "caption_prefix", "caption_suffix", "custom_attributes", "resize_interpolation"),
    *("caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate", "caption_extension"),
    *("cache_info", "alpha_mask", "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket"),
    *("max_bucket_reso", "min_bucket_reso", "validation_seed", "validation_split", "resolution", "network_multiplier"),
)
"""Keys that may be set for a subset, a data set or all of them, and have a single value in a recipe"""
_ARGUMENTS = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""Key of a data set → argument, where they differ"""


@dataclass(frozen=True)
class Subset:
    """A folder of images in a configuration of sd-scripts, with its repeats and captions."""

    folder: str
    repeats: int = 1
    prompt: str = ""
    """Prompt of images without a caption"""
    is_class: bool = False
    """Whether the images are class images"""
    metadata: str = ""
    """Path of a JSON file with captions"""
    masks: str = ""
    """Folder of masks"""

    def count(self, config: Path) -> int | None:
        """Number of its images times repeats; None if the folder was not found."""
        count = count_pictures(find_file(self.folder, config))
        return None if count is None else count * self.repeats


@dataclass
class Data:
    """All folders of images in a configuration of sd-scripts."""

    subsets: list[Subset] = field(default_factory=list)
    parent: str = ""
    """The folder that contains those of training images, in kohya's layout; empty with a dataset_config"""
    class_parent: str = ""
    """The folder that contains those of class images, in kohya's layout"""

    @property
    def image_subsets(self) -> list[Subset]:
        """The folders of training images, without those of class images (`is_reg`)."""
        return [subset for subset in self.subsets if not subset.is_class]

    @property
    def class_subsets(self) -> list[Subset]:
        """The subsets of class images."""
        return [subset for subset in self.subsets if subset.is_class]

    def pictures(self, config: Path) -> int | None:
        """Number of images in an epoch, with as many class images as others; None if a folder was not found."""
        counts = [subset.count(config) for subset in self.image_subsets]
        if not counts or any(count is None for count in counts):
            return None
        has_class = bool(self.class_subsets or self.class_parent)
        return sum(count for count in counts if count is not None) * (2 if has_class else 1)


def from_arguments(report: ImportReport, config: Path) -> Data:
    """Subsets of the arguments `train_data_dir`, `reg_data_dir` and `in_json`."""
    parent, class_parent, table = (report.text(key) for key in ("train_data_dir", "reg_data_dir", "in_json"))
    if table:
        return Data([Subset(parent, report.integer("dataset_repeats") or 1, metadata=table)])
    subsets = _numbered(parent, config, False) + _numbered(class_parent, config, True)
    return Data(subsets, parent, class_parent)


def _numbered(parent: str, config: Path, is_class: bool) -> list[Subset]:
    folder = find_file(parent, config)
    folders = kohya_folders(folder) if folder is not None else []
    return [Subset(str(numbered.folder), numbered.repeats, numbered.prompt, is_class) for numbered in folders]


def from_dataset_config(report: ImportReport, config: Mapping[str, Any], path: Path) -> Data:
    """Subsets of a dataset_config, read from `path`; values that all subsets share are added to the report's values.

    Raises:
        DiffgraftError: it does not have the structure of a dataset_config.
    """
    general, data_sets = config.get("general", {}), config.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(data_sets, list) or not data_sets:
        raise DiffgraftError(
            f"{path} is not a dataset_config of sd-scripts: it needs [[datasets]] with [[datasets.subsets]]."
        )
    arguments = {key: report.values.get(_ARGUMENTS.get(key, key)) for key in (*SHARED, *PER_SUBSET)}
    levels: list[Sequence[Mapping[str, Any]]] = []
    for data_set in data_sets:
        subsets = data_set.get("subsets", []) if isinstance(data_set, dict) else None
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise DiffgraftError(f"{path} needs [[datasets.subsets]] under each of [[datasets]].")
        levels += [(subset, data_set, general, arguments) for subset in subsets]
    for key in config:
        if key not in ("general", "datasets"):
            report.drop_part(key, config[key], "a dataset_config has only [general] and [[datasets]].")
    for level in {id(level): level for stack in levels for level in stack[:3]}.values():
        for key, value in level.items():
            if key not in (*SHARED, *PER_SUBSET, "subsets"):
                report.drop_part(key, value, "not a known key of data sets.")
    instances = [stack for stack in levels if not stack[0].get("is_reg")]
    for key in SHARED:
        _share(report, key, [_first(key, stack) for stack in instances or levels])
    return Data([_subset(stack) for stack in levels])


def _share(report: ImportReport, key: str, values: Sequence[Any]) -> None:
    """Set a key to the value that all subsets share; drop it if they differ."""
    distinct = [value for row, value in enumerate(values) if value not in values[:row]]
    if len(distinct) > 1:
        report.values.pop(_ARGUMENTS.get(key, key), None)
        listed = " and ".join("unset" if value is None else str(value) for value in distinct)
        report.drop_part(key, listed, "differs between the data sets, but a recipe has a single value: set it by hand.")
    elif distinct and distinct[0] is not None:
        report.values[_ARGUMENTS.get(key, key)] = distinct[0]


def _first(key: str, levels: Sequence[Mapping[str, Any]]) -> Any:
    return next((level[key] for level in levels if level.get(key) is not None), None)


def _subset(levels: Sequence[Mapping[str, Any]]) -> Subset:
    values = {key: _first(key, levels) for key in PER_SUBSET}
    repeats = values["num_repeats"]
    if repeats is not None and (not isinstance(repeats, int) or isinstance(repeats, bool)):
        raise DiffgraftError(f"Invalid value num_repeats={short(repeats)} in the dataset_config: must be an integer.")
    return Subset(
        str(values["image_dir"] or ""),
        1 if repeats is None else repeats,
        str(values["class_tokens"] or ""),
        bool(values["is_reg"]),
        str(values["metadata_file"] or ""),
        str(values["conditioning_data_dir"] or ""),
    )
