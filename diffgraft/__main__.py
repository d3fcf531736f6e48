"""``python -m diffgraft`` is the command line."""

from diffgraft.cli.main import main

main()
