"""A training run: its folder, its settings checked, its adapter trained and exported."""
