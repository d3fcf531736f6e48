"""Text for terminals and logs."""


def printable(text: object) -> str:
    """`text` on one line, with what a terminal would act upon written out, as Python does in strings.

    Captions, headers, file names and settings may come from anybody, and a terminal takes control characters in them
    for commands: to fill the clipboard, to set the window's title, or to forge a line of output.
    """
    return "".join(char if char.isprintable() else _written_out(char) for char in str(text))


def _written_out(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
