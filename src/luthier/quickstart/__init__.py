"""The first run: its data, its recipe, and the tour that shows what training changed."""
