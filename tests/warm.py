"""Fresh processes that start warm: forked from one that has imported torch, transformers and others, and none of ours.

What a script sees is a new interpreter, but for the seconds of those imports, which every test would pay again.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from huggingface_hub import constants
from transformers import dynamic_module_utils

_context = multiprocessing.get_context("forkserver")
_families = ("deepseek_v2", "deepseek_v3", "gemma3", "llama", "ministral", "mistral", "mixtral", "olmo2", "phi3")
_families += ("qwen2", "qwen3", "qwen3_moe")
_context.set_forkserver_preload(
    [
        "accelerate",
        "click",
        "pydantic",
        "safetensors.torch",
        "scipy.stats",
        "torch.distributed.tensor",
        "transformers.generation.utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        *(f"transformers.models.{family}.modeling_{family}" for family in _families),
    ]
)


def _read_settings_again() -> None:
    """From the environment, where huggingface_hub and transformers read them once, when they are imported."""
    before = dict(vars(constants))
    importlib.reload(constants)
    changed = {name: value for name, value in vars(constants).items() if name.isupper() and value != before.get(name)}
    # What the test itself loaded with trust_remote_code is on the path that this process was given.
    sys.path[:] = [folder for folder in sys.path if folder != dynamic_module_utils.HF_MODULES_CACHE]
    if cache := os.environ.get("HF_MODULES_CACHE"):
        changed["HF_MODULES_CACHE"] = cache
    for module in list(sys.modules.values()):
        for name in changed.keys() & getattr(module, "__dict__", {}).keys():
            setattr(module, name, changed[name])


def _work(command: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """In the new process: become `python -c CODE ...`, `python -P SCRIPT ...` or `python -m MODULE ...`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _read_settings_again()
    sys.argv = [command[0], *command[2:]]
    try:
        if command[0] == "-c":
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        elif command[0] == "-P":
            runpy.run_path(command[1], run_name="__main__")
        else:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class Started:
    """A process that runs; its output is read once it has ended."""

    def __init__(self, command, environment, folder):
        self.output = tempfile.TemporaryDirectory()
        arguments = [str(part) for part in command]
        values = {str(name): str(value) for name, value in (environment or os.environ).items()}
        where = str(folder or Path.cwd())
        self.command = arguments
        self.process = _context.Process(target=_work, args=(arguments, values, where, self.output.name))
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if self.running():
            self.kill()
        out, err = (Path(self.output.name, name) for name in ("stdout", "stderr"))
        texts = [path.read_text() if path.exists() else "" for path in (out, err)]
        with contextlib.suppress(OSError):
            self.output.cleanup()
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *texts)


def start(*command, env=None, cwd=None) -> Started:
    """Start `python *command`, where the command begins with -c, -P or -m."""
    return Started(command, env, cwd)


def run(*command, env=None, cwd=None) -> subprocess.CompletedProcess:
    """Run `python *command` to its end; the return code and the texts of both streams, as of subprocess.run."""
    return start(*command, env=env, cwd=cwd).finish()
