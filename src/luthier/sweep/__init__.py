"""Hyperparameter search: many runs of one recipe, each in a process of its own."""
