"""Names for the parts of a prefill, which a profiler sums up."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

UNNAMED = nullcontext()


def part(name: str) -> AbstractContextManager:
    """A context whose work torch.profiler, if it looks on, calls `spts.` and the name. If not, it does nothing: a name
    takes the host as long as launching a kernel."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return UNNAMED
    return record_function(f"spts.{name}")
