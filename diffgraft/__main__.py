"""``python -m diffgraft`` is the command line."""

from diffgraft.cli.startup import run

run()
