"""The methods, one module each, which defines `METHOD`, or `KINDS` or `NETWORKS` that are only read from files."""
