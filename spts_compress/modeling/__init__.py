"""The modelling code that travels with every exported checkpoint; the search and the reports run the same files."""

from pathlib import Path


def code_files(module: str) -> list[Path]:
    """The files that a checkpoint of a family carries, from the name of the family's own module: that one, and as
    transformers looks for them what it imports from here, and so on."""
    from transformers.dynamic_module_utils import get_relative_import_files  # slow to import

    own = Path(__file__).parent / f"{module}.py"
    return [own, *sorted({Path(file) for file in get_relative_import_files(own)})]
