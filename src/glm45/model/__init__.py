"""The model as mathematics: configuration, layers, experts, multi-token prediction, hub layout, census."""
