"""Reinforcement learning: samples, pool, rollout, advantages, losses, curriculum, temperature, the driver."""
