"""What torchrun or accelerate launch say to the processes they start; light, since every command asks at once."""

import os


def world_size() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE") or 1)
