"""Optimisers, schedules, stages, the loop, checkpoints, parallelism, health."""
