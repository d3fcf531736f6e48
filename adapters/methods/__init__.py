"""The methods, one module each: it holds a `METHOD`, or the `KINDS` or `NETWORKS` that are read from files."""
