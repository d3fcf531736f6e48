"""The tiny world on which the tiny base is trained: things in settings, drawn in styles, with captions."""

from diffgraft.bases.tiny.world.scene import Scene, caption, draw, random_scene
from diffgraft.bases.tiny.world.settings import SETTINGS
from diffgraft.bases.tiny.world.styles import STYLES
from diffgraft.bases.tiny.world.things import COLOURS, THINGS

__all__ = ["COLOURS", "SETTINGS", "STYLES", "THINGS", "Scene", "caption", "draw", "random_scene"]
