"""The studio: runs, trainings and pictures in a browser, and the same as an HTTP API. All state is in files."""
