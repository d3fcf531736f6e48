"""Entry point of ``python -m diffgraft``, which runs the command line."""

from diffgraft.cli.startup import run

run()
