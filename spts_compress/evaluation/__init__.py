"""Measures of a checkpoint against its dense base: retrieval tasks, agreement, time."""
