"""Prompts with known answers, and how answers are scored."""
