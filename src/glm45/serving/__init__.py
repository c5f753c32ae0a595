"""OpenAI-compatible server, chat page and terminal chat on top of the engine."""
