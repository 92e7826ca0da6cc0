"""What a completion is worth: reward functions, services and models, from the recipe."""
