"""Measuring a checkpoint: suites of tasks, the method's parts, time, and the report of a run; tables and pictures."""
