"""What a completion is worth: reward functions, services and models, from the recipe."""

from luthier.rewards.build import REWARDS, Rewards, build_rewards

__all__ = ["REWARDS", "Rewards", "build_rewards"]
