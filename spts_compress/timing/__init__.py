"""Wall-clock time: dense and SPTS in turn, and where it goes."""
