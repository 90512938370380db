"""The stock checkpoint back out of an exported one, byte for byte."""

import shutil
from pathlib import Path

from ..checkpoint.outputs import new_folder, refuse_in_checkpoint
from .verify import base_names, require


def strip(folder: Path, target: Path) -> list[str]:
    """Write the base model's own files into the new folder `target`, under their own names, which are returned.

    Raises:
        UserError: if `folder` is no whole checkpoint of this toolkit, or `target` is in use or lies in one.
    """
    require(folder)
    refuse_in_checkpoint(target)
    names = base_names(folder)
    with new_folder(target, inputs=[folder]) as partial:
        for exported, name in names.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / exported, partial / name)
    return sorted(names.values())
