"""The search for a schedule: prompts, dense work done once, candidates of a wanted cost, their evaluation, a choice."""
