"""PPO with a portable policy, trained on a surrogate of the score or directly."""
