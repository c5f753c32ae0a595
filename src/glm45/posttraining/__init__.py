"""Supervised fine-tuning data, rejection sampling, prompt selection, expert iteration."""
