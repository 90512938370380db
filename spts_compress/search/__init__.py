"""The search for a schedule: prompts, dense work done once, candidates, their evaluation, and the choice."""
