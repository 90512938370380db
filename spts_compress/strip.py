"""The stock checkpoint back out of an exported one, byte for byte."""

import shutil
from pathlib import Path

from .errors import UserError
from .export import BASE_CONFIG, BASE_INDEX, BASE_WEIGHTS, CARRIED, PROXIES
from .loadable import INDEX, WEIGHTS
from .store import writing
from .verify import require


def strip(folder: Path, target: Path) -> list[str]:
    """Write the base model's own files into the new folder `target` and return their names.

    Raises:
        UserError: if `folder` is no whole checkpoint of this toolkit, or `target` exists.
    """
    require(folder)
    if target.exists():
        raise UserError(f"{target} exists; give another --output")
    names = {BASE_CONFIG: "config.json", BASE_INDEX: INDEX, BASE_WEIGHTS: WEIGHTS}
    files = [p for p in folder.glob("*.safetensors") if p.name != PROXIES]
    files += [p for pattern in CARRIED for p in folder.glob(pattern)]
    files += [p for p in (folder / BASE_CONFIG, folder / BASE_INDEX) if p.is_file()]
    with writing(target) as partial:
        partial.mkdir()
        for file in files:
            shutil.copyfile(file, partial / names.get(file.name, file.name))
    return sorted(names.get(file.name, file.name) for file in files)
