"""Where to compute: the device that `--device` means for this process, and the machine it is in."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from .errors import UserError, reason


def choose(name: str) -> str:
    """The device of this process. `auto` is a CUDA device if there is one, and else the CPU; where a machine runs
    several processes they take its GPUs in turn, so that there may be more processes than GPUs.

    Raises:
        UserError: if the device does not exist or can't be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        if torch.zeros(1, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not usable here: {reason(error)}; take auto, cpu, cuda, or cuda:1") from None
    return name


def in_words(device: str) -> str:
    """A device for people to read."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device


def hardware(device: str) -> dict[str, Any]:
    """The machine and the versions a measurement was made with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "spts_compress": __version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
