"""The demo: a made-up subject that the embedded base has never seen, and the story of teaching it."""
