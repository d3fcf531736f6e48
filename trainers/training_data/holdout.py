"""Which pictures a run is validated with: a share of each concept's, or a folder of its own, each by its own words."""

from collections.abc import Sequence

from diffgraft.data.captions import mentions
from diffgraft.data.inventory import named
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.training_data.concepts import ConceptImages, read_part
from diffgraft.trainers.training_data.prompts import captions_of


def rows_held_out(share: float, concepts: Sequence[int], contents: Sequence[str]) -> set[int]:
    """Rows of the pictures that are held out, of each concept the same share, those whose contents' hashes are least.

    Args:
        share: of the pictures that is held out.
        concepts: for each picture a number that its concept has.
        contents: for each picture the hash of its content.

    Raises:
        DiffgraftError: too few pictures would be left to learn from.
    """
    of_each = {key: [row for row, own in enumerate(concepts) if own == key] for key in dict.fromkeys(concepts)}
    counts = {key: min(round(share * len(rows)), len(rows) - 1) for key, rows in of_each.items()}
    if len(of_each) == 1 and share * len(concepts) >= len(concepts) - 0.5:
        counts = {}
    elif not any(counts.values()):  # at least one, of those of which there are most
        counts[max(of_each, key=lambda key: len(of_each[key]))] = 1
    if any(count >= len(of_each[key]) for key, count in counts.items()) or not counts:
        raise DiffgraftError(
            f"validation.share={share} of {len(concepts)} pictures leaves none to learn from: give more pictures, or "
            "a folder of others as validation.images."
        )
    return {row for key, rows in of_each.items() for row in sorted(rows, key=lambda row: contents[row])[: counts[key]]}


def read_held_out(folder: str, learnt: Sequence[DataSettings]) -> ConceptImages:
    """The pictures of `validation.images`, numbered folders as well, each with the settings of the concept it shows.

    Raises:
        DiffgraftError: there are none, or nothing says which concept they show.
    """
    concepts = list({(one.trigger, one.prompt, one.noun): one for one in learnt}.values())
    own = {"images": folder, "layout": "auto", "repeats": 1}
    folders = list(read_part(concepts[0].model_copy(update=own), has_setting=False))
    if len(folders) == 1 and folders[0][0].prompt == concepts[0].prompt:  # a flat one
        return _of_one_folder(folder, concepts, folders[0][1])
    found: ConceptImages = []
    for part, pictures in folders:
        called = [one for one in concepts if mentions(part.prompt, one.trigger)]
        nouns = [one for one in concepts if one.noun and mentions(part.prompt, one.noun)]
        if called:
            found.append((called[0].model_copy(update={"prompt": part.prompt}), pictures))
        elif len(concepts) == 1 or len(nouns) == 1:  # its name says which it is, and not how it is called
            found.append(((nouns or concepts)[0], pictures))
        else:
            raise DiffgraftError(
                f"Nothing says which concept {part.images} shows, which is to be validated with: put its trigger into "
                f"the folder's name (1_{concepts[0].trigger} …)."
            )
    return found


def _of_one_folder(folder: str, concepts: Sequence[DataSettings], pictures: Sequence[Picture]) -> ConceptImages:
    found: ConceptImages = [(one, []) for one in concepts]
    silent: list[str] = []
    for picture in pictures:
        captions = captions_of(concepts[0], picture)
        nouns = _shown(captions, [one.noun for one in concepts])
        shown = _shown(captions, [one.trigger for one in concepts]) or (nouns if len(nouns) == 1 else [])
        if not shown and len(concepts) > 1:
            silent.append(picture.name)
        found[shown[0] if shown else 0][1].append(picture)
    if silent:
        raise DiffgraftError(
            f"validation.images={folder} has pictures whose captions, if any, name no concept ({named(silent)}), and "
            "several are learnt: put them into numbered folders that are called as the concepts are "
            "(1_sks dog), or set validation.share instead."
        )
    return [(part, own) for part, own in found if own]


def _shown(captions: Sequence[str], words: Sequence[str]) -> list[int]:
    """Rows of the words that captions have."""
    return [row for row, word in enumerate(words) if word and any(mentions(text, word) for text in captions)]
