"""Imports of modules that lie beside a job file, so that two jobs which each have a `model.py` do not mix them up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_loaded: dict[Path, dict[str, ModuleType]] = {}


@contextmanager
def siblings(folder: Path) -> Iterator[None]:
    """Import from `folder` first, inside the block.

    What was imported stays known to Python until another folder's turn comes, and returns with the folder's next one.
    """
    _make_way(folder)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _remember(folder, set(sys.modules) - before)


def _make_way(folder: Path) -> None:
    for other in _loaded.keys() - {folder}:
        for name in _loaded[other]:
            sys.modules.pop(name, None)
    for name in {file.stem for file in folder.glob("*.py")} - sys.stdlib_module_names:
        if name in sys.modules and not _lies_in(sys.modules[name], folder):
            del sys.modules[name]
    sys.modules.update(_loaded.get(folder, {}))


def _remember(folder: Path, names: set[str]) -> None:
    own = {name: sys.modules[name] for name in names if _lies_in(sys.modules[name], folder)}
    _loaded.setdefault(folder, {}).update(own)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)
