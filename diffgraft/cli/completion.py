"""Shell completion of recipes and methods, whose names are listed without importing them."""


def recipe_words(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that begin with `incomplete`."""
    from importlib.resources import files

    names = (file.name for file in files("diffgraft.recipes").iterdir())
    return sorted(
        name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name.startswith(incomplete)
    )


def method_words(incomplete: str) -> list[str]:
    """Return the names of methods that begin with `incomplete`."""
    from diffgraft.adapters.listing import method_summaries

    return [name for name in method_summaries() if name.startswith(incomplete)]
