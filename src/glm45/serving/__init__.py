"""Serving: an OpenAI-compatible server with a chat page, and the same chat in a terminal, on top of the engine."""
