"""Wall-clock time and memory: dense and SPTS in turn, where time goes, and what a machine's own speed allows."""
