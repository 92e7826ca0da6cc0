"""What a recipe would do, found out without training: data, parameters, memory, time, and every refusal."""
