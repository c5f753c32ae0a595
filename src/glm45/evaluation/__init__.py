"""Tasks, scorers and runners against the engine or any OpenAI-style endpoint."""
