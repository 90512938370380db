"""spts-compress: turn a Hugging Face causal language model into a skip-ready checkpoint (SPTS, arXiv 2601.13155)."""

__version__ = "0.2.0"
