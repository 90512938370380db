"""The base model, the text, and what the dense model does on it, layer by layer."""
