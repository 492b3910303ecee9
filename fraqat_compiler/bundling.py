"""`fraqat bundle`: a finished compile as a folder that runs on its hardware."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fraqat_compiler.errors import OutputError, VerificationError
from fraqat_compiler.manifest import changed_files
from fraqat_compiler.progress import Progress
from fraqat_compiler.replay import loaded, reference
from fraqat_compiler.report import read_report
from fraqat_compiler.target import Sample


def bundle(folder: Path, output: Path, progress: Progress | None = None) -> list[str]:
    """Make a folder with all that one needs to run a compiled artifact on the hardware; returns its files.

    Args:
        folder: output folder of a compile.
        output: the folder to make; must be missing or empty. It is there whole or not at all.
        progress: hears of slow work.

    Raises:
        VerificationError: `folder` holds no finished compile, or its files have changed.
        TargetError: the target makes no bundle, or the artifact does not run.
        OutputError: `output` is not empty, or cannot be written.
    """
    report, progress = read_report(folder), progress or Progress()
    changed = changed_files(folder)
    if changed:
        raise VerificationError(f"{folder} is not as it was compiled: {'; '.join(changed)}.", "Compile again.")
    output = output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output} is not empty.", "Name a new folder with -o.")
    target, artifact = loaded(folder, report, progress)
    steps = {name: step for name, step in report.get("output_scales", {}).items() if step is not None}
    sample = Sample(*reference(folder), steps)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fraqat-", dir=output.parent) as scratch, progress.phase("bundle"):
            made = Path(scratch) / output.name
            made.mkdir()
            target.bundle(artifact, sample, made)
            made.replace(output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.", "Free disk space.") from error
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
