"""Settings of other tools that have no meaning for bases of flow matching."""

from diffgraft.bases.flow import FlowFamily
from diffgraft.imports.import_report import ImportReport


def drop_meaningless(report: ImportReport) -> None:
    """Drop from the recipe what bases of flow matching refuse, with the reason that they give."""
    for key, why in FlowFamily.unsupported.items():
        report.withdraw(key, f"it has no meaning for flow matching: {why}.")
