"""Prompts with known answers, how a model is asked, and how answers are scored and compared with dense."""
