"""Prompts that say little but the new word, so that the word has to say the rest.

Textual inversion shows a picture under many such prompts (Gal et al. 2022, arXiv:2208.01618, section 4 and appendix D).
"""

OBJECT = (
    "a {trigger}",
    "a photo of a {trigger}",
    "a picture of a {trigger}",
    "a close-up of a {trigger}",
    "a small {trigger}",
    "one {trigger}, nothing else",
    "a good picture of the {trigger}",
    "a bright photo of the {trigger}",
    "the {trigger} seen from the side",
    "this is a {trigger}",
)
STYLE = (
    "a picture in the style of {trigger}",
    "a painting in the style of {trigger}",
    "a drawing, {trigger} style",
    "{trigger} style",
    "something made in {trigger} style",
    "a small picture in the style of {trigger}",
    "a scene, {trigger} style",
    "a study in the style of {trigger}",
)
TEMPLATES = {"object": OBJECT, "style": STYLE}
