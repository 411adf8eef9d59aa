"""What a sample is worth: verifiers of the library, and any function of the user's own."""

from postgrad.rewards.functions import RewardFunction, RewardSet, RewardSpec, load_rewards

__all__ = ["RewardFunction", "RewardSet", "RewardSpec", "load_rewards"]
