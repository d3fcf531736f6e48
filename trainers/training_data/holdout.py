"""Held-out images for validation: a share of each concept's images, or those of `validation.images`."""

from collections.abc import Sequence

from diffgraft.data.captions import mentions
from diffgraft.data.inventory import list_names
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concept
from diffgraft.trainers.training_data.prompts import captions_of


def rows_held_out(share: float, concepts: Sequence[int], contents: Sequence[str]) -> set[int]:
    """Rows of the held-out images: the same share of each concept, namely those with the smallest content hashes.

    Args:
        share: the share of images to hold out, in 0 … 1.
        concepts: for each image the index of its concept.
        contents: for each image the hash of its content.

    Raises:
        DiffgraftError: too few images would be left to train on.
    """
    rows_of = {key: [row for row, index in enumerate(concepts) if index == key] for key in dict.fromkeys(concepts)}
    counts = {key: min(round(share * len(rows)), len(rows) - 1) for key, rows in rows_of.items()}
    if len(rows_of) == 1 and share * len(concepts) >= len(concepts) - 0.5:
        counts = {}
    elif not any(counts.values()):  # at least one image, of the largest concept
        counts[max(rows_of, key=lambda key: len(rows_of[key]))] = 1
    if any(count >= len(rows_of[key]) for key, count in counts.items()) or not counts:
        raise DiffgraftError(
            f"validation.share={share} of {len(concepts)} images leaves none to train on: add images, or set "
            "validation.images to a folder of other images."
        )
    return {row for key, rows in rows_of.items() for row in sorted(rows, key=lambda row: contents[row])[: counts[key]]}


def read_held_out(folder: str, trained: Sequence[DataSettings]) -> ConceptImages:
    """Return the images of `validation.images`, each with the settings of the concept that it shows.

    Raises:
        DiffgraftError: there are no images, or neither the folder name nor the caption of an image names its concept.
    """
    concepts = list({(concept.trigger, concept.prompt, concept.noun): concept for concept in trained}.values())
    settings = {"images": folder, "layout": "auto", "repeats": 1}
    folders = list(read_concept(concepts[0].model_copy(update=settings), has_setting=False))
    if len(folders) == 1 and folders[0][0].prompt == concepts[0].prompt:  # not numbered
        return _assign_by_captions(folder, concepts, folders[0][1])
    concept_images: ConceptImages = []
    for numbered, pictures in folders:
        by_trigger = [concept for concept in concepts if mentions(numbered.prompt, concept.trigger)]
        by_noun = [concept for concept in concepts if concept.noun and mentions(numbered.prompt, concept.noun)]
        if by_trigger:
            concept_images.append((by_trigger[0].model_copy(update={"prompt": numbered.prompt}), pictures))
        elif len(concepts) == 1 or len(by_noun) == 1:  # the concept is clear, but the folder's name is not its prompt
            concept_images.append(((by_noun or concepts)[0], pictures))
        else:
            raise DiffgraftError(
                f"The concept of the validation images in {numbered.images} is unknown: put its trigger into the "
                f"folder's name (1_{concepts[0].trigger} …)."
            )
    return concept_images


def _assign_by_captions(folder: str, concepts: Sequence[DataSettings], pictures: Sequence[Picture]) -> ConceptImages:
    """Assign the images of a folder to the concepts whose trigger or class noun their captions mention.

    Raises:
        DiffgraftError: there are several concepts, and an image's captions mention none of them.
    """
    concept_images: ConceptImages = [(concept, []) for concept in concepts]
    unassigned: list[str] = []
    for picture in pictures:
        captions = captions_of(concepts[0], picture)
        by_noun = _mentioned(captions, [concept.noun for concept in concepts])
        by_trigger = _mentioned(captions, [concept.trigger for concept in concepts])
        matches = by_trigger or (by_noun if len(by_noun) == 1 else [])
        if not matches and len(concepts) > 1:
            unassigned.append(picture.name)
        concept_images[matches[0] if matches else 0][1].append(picture)
    if unassigned:
        raise DiffgraftError(
            f"validation.images={folder} has images whose captions name no concept ({list_names(unassigned)}), but the "
            "run has several: put them into numbered folders named after the concepts (1_sks dog), or set "
            "validation.share instead."
        )
    return [(concept, assigned) for concept, assigned in concept_images if assigned]


def _mentioned(captions: Sequence[str], words: Sequence[str]) -> list[int]:
    """Indices of the words that any of the captions mentions."""
    return [index for index, word in enumerate(words) if word and any(mentions(text, word) for text in captions)]
