"""Measuring a checkpoint: scores, ablation, time, and the report of a run."""
