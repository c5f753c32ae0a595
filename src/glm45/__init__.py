"""The GLM-4.5 system: model, data recipe, training, reinforcement learning, engine, server and evaluation."""

__version__ = "0.1.0"
