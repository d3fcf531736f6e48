"""Prompt templates for textual inversion: they say little besides the new token, so that it has to learn the rest.

Each image is trained with many of them (Gal et al. 2022, arXiv:2208.01618, section 4 and appendix D).
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
