"""Training on answers of its own: prompts, engine, rewards and critic of a run, put together."""
