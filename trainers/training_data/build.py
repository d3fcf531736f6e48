"""Building the training data of a run: its images with prompts, crops and masks, and the class images."""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import torch
from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.captions import PromptBuilder, is_fixed
from diffgraft.data.class_images import class_images
from diffgraft.data.conditions import ConditionPicture, check_unshared, condition_pictures
from diffgraft.data.frames import Crop, RandomCrops, frames, with_mirrored
from diffgraft.data.inventory import list_names, pluralize
from diffgraft.data.latents import encode_pictures
from diffgraft.data.pictures import Picture, UnreadablePictureError
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.settings import DrawSettings
from diffgraft.rng import generator
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.settings import Prior, Validation
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concept
from diffgraft.trainers.training_data.examples import Example, Examples
from diffgraft.trainers.training_data.holdout import read_held_out, rows_held_out
from diffgraft.trainers.training_data.prompts import captions_of, check_prompts, prompt_builders

_MAX_EPOCH = 5_000_000
DRAWN = 64
"""Number of pictures that the base draws where an objective needs none of the user's"""
_BLACK = 4
"""Largest value, of 255, that counts as black; JPEG compression does not keep 0"""


@dataclass(frozen=True)
class Sample:
    """A training image with its prompts and crops, before it is encoded."""

    concept: DataSettings
    """The settings of its concept"""
    picture: Picture
    prompt_builder: PromptBuilder
    class_prompt_builder: PromptBuilder
    """Builds the class prompt for each of its texts"""
    frames: list[Crop]
    """Its crops, with mirrored ones if the recipe has `flip`"""
    condition: ConditionPicture | None = None
    """Its condition picture; None without a control network"""
    factor: float = 1.0
    """Factor on its loss beside the weight of its concept"""


@dataclass(frozen=True)
class TrainingData:
    """Everything that a run trains and validates with."""

    instances: Examples
    """The training images"""
    class_images: Examples | None
    """Class images; None without prior preservation by pictures"""
    prior_weight: float
    """λ of prior preservation by prediction; 0 without it"""
    held_out: Examples | None
    """Images for validation, which are not trained on"""
    partners: Examples | None
    """The other images of pairs, row by row those of `instances`; None without pairs"""
    prompts: list[str] | None
    """Every prompt that can occur; None if they cannot be listed, since tags are shuffled or dropped"""
    digest: str
    """SHA-256 of the training, class and partner images with their crops, masks and prompts"""


def build_training_data(
    data: DataSettings, validation: Validation, seed: int, base: Base, concepts: ConceptImages
) -> TrainingData:
    """Encode the images of all concepts, and load or generate and encode the class images.

    Raises:
        DiffgraftError: as in `collect_samples`, `split_samples` and `encode_samples`.
    """
    concepts = with_drawn_pictures(concepts, seed, base)
    samples, held_out = split_samples(data, validation, collect_samples(data, concepts, base), base)
    instances = encode_samples(data, base, samples, "encoding pictures")
    partners = partner_examples(data, base, samples, instances)
    classes = class_examples(data, seed, base, samples)
    validation_examples = encode_samples(data, base, held_out, "encoding held-out pictures") if held_out else None
    prompts = all_prompts(data, instances, classes, validation_examples)
    weight, digest = prior_prediction_weight(concepts), data_digest(instances, classes, partners)
    return TrainingData(instances, classes, weight, validation_examples, partners, prompts, digest)


def with_drawn_pictures(concepts: ConceptImages, seed: int, base: Base) -> ConceptImages:
    """Return the concepts, with pictures of its prompt that the base draws, or has in the cache, for one without any.

    On the meta device, where nothing can be drawn, they are blank.
    """
    return [(concept, pictures or _drawn_pictures(concept, seed, base)) for concept, pictures in concepts]


def _drawn_pictures(concept: DataSettings, seed: int, base: Base) -> list[Picture]:
    side, prompt = resolution_of(concept, base), concept.fill(concept.prompt)
    if base.device.type == "meta":
        Image.new("RGB", (side, side)).save(blank := BytesIO(), "PNG")
        drawn = [Picture(f"picture {number}", blank.getvalue) for number in range(DRAWN)]
    else:
        drawn = [picture for _, picture in class_images(base, [prompt], DRAWN, DrawSettings(size=(side, side)), seed)]
    return [replace(picture, captions=(prompt,)) for picture in drawn]


def resolution_of(data: DataSettings, base: Base) -> int:
    """Side in pixels of square training images, by default the base's resolution."""
    return data.resolution or base.resolution


def collect_samples(data: DataSettings, concepts: ConceptImages, base: Base) -> list[Sample]:
    """All training images with their prompts and crops; likely mistakes are issued as warnings.

    Raises:
        DiffgraftError: a prompt is too long and `long_prompts=refuse`; or an epoch is too large; or a mask is black; or
            condition pictures are missing or do not fit.
    """
    samples = []
    for concept, pictures in concepts:
        known = concept.conditions
        conditions = [None] * len(pictures) if known is None else condition_pictures(pictures, known)
        for picture, condition in zip(pictures, conditions, strict=True):
            prompts, class_prompts = prompt_builders(concept, picture)
            crops = _frames(data, picture, base)
            crops = with_mirrored(crops) if data.flip else crops
            factor = data.picture_weights.get(picture.name, 1.0)
            samples.append(Sample(concept, picture, prompts, class_prompts, crops, condition, factor))
    check_unshared([sample.condition for sample in samples if sample.condition is not None])
    _check_repeats(samples)
    prompts_by_image = [(sample.concept, sample.picture, sample.prompt_builder) for sample in samples]
    check_prompts(data.long_prompts, prompts_by_image, base.tokenizer)
    if data.masks.use and not data.masks.outside:
        _check_masks(samples)
    return samples


def _check_repeats(samples: Sequence[Sample]) -> None:
    """Raise DiffgraftError if repeats make an epoch too large to be shuffled in memory."""
    if (count := sum(sample.concept.repeats for sample in samples)) > _MAX_EPOCH:
        raise DiffgraftError(
            f"The repeats make an epoch of {count:,} images, but at most {_MAX_EPOCH:,} are possible: use smaller "
            "repeats; only their ratio decides how often each image is used."
        )


def _frames(data: DataSettings, picture: Picture, base: Base) -> list[Crop]:
    """Crops in which an image is used."""
    random_crops = None
    if data.crop == "random":
        random_crops = RandomCrops(data.crops, data.crop_scale, seed=int(picture.content[:8], 16))
    return frames(picture.size, resolution_of(data, base), data.buckets, base.size_step, random_crops)


def _check_masks(samples: Sequence[Sample]) -> None:
    """Raise DiffgraftError if a mask is black in all crops of its image, so that nothing of it would be trained."""
    for sample in samples:
        mask = _mask_of(sample.picture)
        if mask is not None and all(_is_black(frame.crop(mask)) for frame in sample.frames):
            file = sample.picture.mask_file
            source = f"The mask {file.name}" if file else "The transparency"
            raise DiffgraftError(
                f"{source} leaves nothing of {sample.picture.name} to train on: it is black in all of its crops. "
                "Paint the parts that count white, remove the mask, or set masks.outside above 0."
            )


def _mask_of(picture: Picture) -> Image.Image | None:
    """Mask of an image, or None; images that cannot be opened are skipped later, so their alpha is ignored here."""
    try:
        return picture.mask() if picture.has_mask else None
    except UnreadablePictureError:
        if picture.mask_file is not None:
            raise
        return None


def _is_black(mask: Image.Image) -> bool:
    """Whether a mask in mode L is black everywhere, up to JPEG artifacts."""
    return mask.point([0] * (_BLACK + 1) + [255] * (255 - _BLACK)).getbbox() is None


def split_samples(
    data: DataSettings, validation: Validation, samples: Sequence[Sample], base: Base
) -> tuple[list[Sample], list[Sample]]:
    """Return training and held-out samples; these are from `validation.images`, or a share of each concept's images.

    Raises:
        DiffgraftError: too few images are left to train on, or `validation.images` cannot be read; or there is no
            image of a name in `picture_weights`, or all have the weight 0.
    """
    _check_picture_weights(data, samples)
    concepts = {id(sample.concept): sample.concept for sample in samples}
    if validation.images:
        held_out = collect_samples(data, read_held_out(validation.images, list(concepts.values())), base)
        contents = {sample.picture.content for sample in samples}
        if names := [sample.picture.name for sample in held_out if sample.picture.content in contents]:
            warnings.warn(
                f"{pluralize(len(names), 'image')} of validation.images {'is' if len(names) == 1 else 'are'} also "
                f"training images ({list_names(names)}): their loss does not measure generalization.",
                stacklevel=2,
            )
        return list(samples), held_out
    if not validation.share:
        return list(samples), []
    concept_indices = [[*concepts].index(id(sample.concept)) for sample in samples]
    rows = rows_held_out(validation.share, concept_indices, [sample.picture.content for sample in samples])
    return [sample for row, sample in enumerate(samples) if row not in rows], [samples[row] for row in sorted(rows)]


def _check_picture_weights(data: DataSettings, samples: Sequence[Sample]) -> None:
    """Raise DiffgraftError if `picture_weights` names an image that does not exist, or leaves nothing to train on."""
    names = [sample.picture.name for sample in samples]
    for name in data.picture_weights:
        if name not in names:
            raise DiffgraftError(f"picture_weights.{name} is for no image of the run: {did_you_mean(name, names)}")
    if data.picture_weights and not any(sample.factor for sample in samples):
        raise DiffgraftError("picture_weights gives all images the weight 0, which leaves nothing to train on.")


def encode_samples(data: DataSettings, base: Base, samples: Sequence[Sample], title: str) -> Examples:
    """Encode samples with the VAE; those that cannot be opened are skipped. `title` names the progress bar.

    Raises:
        DiffgraftError: none of them can be opened.
    """
    pictures, crops = [sample.picture for sample in samples], [sample.frames for sample in samples]
    encoded = encode_pictures(base, pictures, crops, masked=data.masks.use, keep=data.cache, title=title)
    if not encoded.rows:
        raise DiffgraftError(f"None of the {len(samples)} images can be opened. Save them again as JPEG or PNG.")
    examples = [
        Example(
            sample.picture.name,
            encoded.rows[index],
            sample.prompt_builder,
            sample.class_prompt_builder,
            sample.concept.repeats,
            sample.concept.weight * sample.factor,
            sample.picture.content
            + (sample.picture.mask_content if data.masks.use else "")
            + ("" if sample.condition is None else sample.condition.content),
            None if sample.condition is None else sample.condition.crop,
        )
        for index, sample in enumerate(samples)
        if index in encoded.rows
    ]
    return Examples(encoded, examples, data.tags, data.caption_dropout, data.masks)


def partner_examples(data: DataSettings, base: Base, samples: Sequence[Sample], instances: Examples) -> Examples | None:
    """Encode the partners of images, in the crops of these; None without pairs.

    Raises:
        DiffgraftError: only one image of a pair can be opened.
    """
    pairs = [(sample, sample.picture.partner) for sample in samples if sample.picture.partner is not None]
    if not pairs:
        return None
    others = [replace(sample, picture=partner) for sample, partner in pairs]
    without_masks = data.model_copy(update={"masks": data.masks.model_copy(update={"use": False})})
    partners = encode_samples(without_masks, base, others, "encoding the other pictures of pairs")
    if partners.encoded.rows != instances.encoded.rows:
        raise DiffgraftError("An image of a pair cannot be opened, while the other can: save it again, or remove both.")
    return partners


def class_examples(data: DataSettings, seed: int, base: Base, samples: Sequence[Sample]) -> Examples | None:
    """Class images of all concepts, weighted by their λ; None without prior preservation by pictures."""
    class_samples: list[Sample] = []
    samples_by_class: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        if (prior := sample.concept.prior_preservation) is not None and prior.by == "pictures":
            # concepts of one class share its images
            key = (prior.model_dump_json(), sample.concept.class_text(None), sample.concept.trigger)
            samples_by_class.setdefault(key, []).append(sample)
    for members in samples_by_class.values():
        concept = members[0].concept
        prior = concept.prior_preservation
        assert prior is not None
        weighted = concept.model_copy(update={"weight": prior.weight})
        images = user_class_images(weighted, prior) if prior.folder else _generated_class(weighted, seed, base, members)
        for repeats, prompt, picture in images:
            crops = frames(picture.size, resolution_of(data, base), data.buckets, base.size_step)
            builder = PromptBuilder((prompt,))
            repeated = weighted.model_copy(update={"repeats": repeats})
            class_samples.append(
                Sample(repeated, picture, builder, builder, with_mirrored(crops) if data.flip else crops)
            )
    if not class_samples:
        return None
    without_masks = data.masks.model_copy(update={"use": False})
    class_data = data.model_copy(update={"masks": without_masks, "caption_dropout": 0.0})
    return encode_samples(class_data, base, class_samples, "encoding class images")


def prior_prediction_weight(concepts: ConceptImages) -> float:
    """λ of prior preservation by prediction; 0 without it.

    Raises:
        DiffgraftError: concepts differ in the kind of prior preservation, or in λ by prediction.
    """
    priors = [prior for concept, _ in concepts if (prior := concept.prior_preservation) is not None]
    weights = {prior.weight for prior in priors if prior.by == "prediction"}
    if weights and (len(weights) > 1 or any(prior.by == "pictures" for prior in priors)):
        raise DiffgraftError(
            "Concepts differ in prior preservation, and some use prior.by=prediction: give all of them the same "
            "prior.by and, with prediction, the same prior.weight."
        )
    return max(weights, default=0.0)


def user_class_images(concept: DataSettings, prior: Prior) -> Iterator[tuple[int, str, Picture]]:
    """Yield repeats, prompt and image for each class image in the user's `prior.folder`.

    Raises:
        DiffgraftError: there is no such folder, or it has no images.
    """
    captions = concept.captions.model_copy(update={"use": True})
    settings = {"images": prior.folder, "layout": "auto", "repeats": 1, "captions": captions}
    settings |= {"prompt": concept.class_text(None), "trigger": ""}
    for folder, pictures in read_concept(concept.model_copy(update=settings), has_setting=False):
        for picture in pictures:
            yield folder.repeats, next(iter(captions_of(folder, picture)), folder.prompt), picture


def _generated_class(
    concept: DataSettings, seed: int, base: Base, samples: Sequence[Sample]
) -> Iterable[tuple[int, str, Picture]]:
    """Yield repeats, prompt and image for each class image that the base generates, or has in the cache."""
    prior = concept.prior_preservation
    assert prior is not None
    captions: list[str | None] = []
    for sample in samples:
        captions += captions_of(sample.concept, sample.picture) or (None,)
    prompts = concept.class_prompts(captions)
    if len(prompts) > prior.images:  # at least one image for each prompt that is used
        rows = torch.randperm(len(prompts), generator=generator(seed))[: prior.images]
        prompts = [prompts[row] for row in sorted(rows.tolist())]
    side = resolution_of(concept, base)
    images_per_prompt = math.ceil(prior.images / len(prompts)) if prompts else 0
    settings = DrawSettings(size=(side, side))
    for prompt, picture in class_images(base, prompts, images_per_prompt, settings, seed) if prompts else ():
        yield 1, prompt, picture


def all_prompts(data: DataSettings, *groups: Examples | None) -> list[str] | None:
    """Every prompt that can occur for these examples; None if they cannot be listed, since tags change."""
    if not is_fixed(data.tags):
        return None
    prompts = [""] if data.caption_dropout or data.long_prompts == "chunk" else []
    for examples in groups:
        for example in examples.examples if examples else ():
            prompts += example.prompt_builder.prompts() + example.class_prompt_builder.prompts()
    return list(dict.fromkeys(prompts))


def data_digest(*groups: Examples | None) -> str:
    """SHA-256 of examples in order: their files, crops, masks, prompts, repeats and weights.

    Fingerprints of checkpoints hold it, so that what is hashed must not change.
    """
    digest = hashlib.sha256()
    for examples in groups:
        for example in examples.examples if examples else ():
            assert examples is not None
            crops = ", ".join(_frame_text(examples.encoded.frames[row]) for row in example.rows)
            prompts, class_prompts = map(_prompts_text, (example.prompt_builder, example.class_prompt_builder))
            text = f"{example.content} [{crops}] {prompts} {class_prompts} {example.repeats} {example.weight}\n"
            digest.update(text.encode())
    return digest.hexdigest()


def _frame_text(frame: Crop) -> str:
    """Text of a frame as it is hashed."""
    return (
        f"Frame(original={frame.original!r}, scaled={frame.scaled!r}, corner={frame.corner!r}, size={frame.size!r}, "
        f"flipped={frame.flipped!r})"
    )


def _prompts_text(builder: PromptBuilder) -> str:
    """Text of an image's prompts as it is hashed."""
    return f"Wording(texts={builder.texts!r}, around={builder.templates!r})"
