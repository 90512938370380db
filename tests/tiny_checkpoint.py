"""A tiny exported checkpoint, without the pipeline around it."""

import torch
from tiny import tiny_base

from spts_compress.calibrate.base_model import resolve
from spts_compress.export import write
from spts_compress.export.verify import write_manifest
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ModelSection
from spts_compress.utils.store import Store

BLOCK = {
    "start": 1,
    "stages": [{"end": 2, "budget": 100, "prune_to": 120}, {"end": 4, "budget": 80}],
    "proxy": {"channels": 1, "rank": 0},
    "recent_tokens": 4,
}


def tiny_checkpoint(folder):
    """The checkpoint `folder`/out of the base `folder`/base."""
    tiny_base(folder / "base")
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    parameters = {
        f"model.layers.{n}.proxy.{name}": torch.zeros(shape, dtype=torch.bfloat16)
        for n in range(1, 5)
        for name, shape in (("down", (1, 32)), ("square", (32,)), ("constants", (2,)))
    }
    (folder / "out").mkdir()
    carried = write.carry(base)
    write.write(base, carried, Schedule.from_dict(BLOCK, 5), parameters, folder / "out")
    (folder / "out/README.md").write_text("# A card\n")
    write_manifest(folder / "out", carried.names)
    return folder / "out"
