"""Measures, one file each; outside packages add theirs through the entry point group ``diffgraft.measures``."""
