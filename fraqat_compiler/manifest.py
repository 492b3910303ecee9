"""manifest.json: the sha256 of every result, and what made it.

It names no host, user, time or absolute path. The same inputs give the same bytes of every file but those under
`not_reproducible`: the reports hold measured seconds, and the manifest holds the reports' digests.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from fraqat_compiler.errors import UsageError, VerificationError
from fraqat_compiler.output_folder import BOOKKEEPING, MAKER, MANIFEST_FILE

PACKAGES = (
    "fraqat_compiler",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnx-graphsurgeon",
    "onnxscript",
    "numpy",
    "qai-hub",
)
NOT_REPRODUCIBLE = (MANIFEST_FILE, "report.html", "report.json")


def write_manifest(folder: Path, report: dict[str, Any]) -> None:
    """Write the manifest of what `folder` holds."""
    content = {
        "schema_version": 1,
        "made_by": MAKER,
        "files": {
            name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in _files(folder)
        },
        "not_reproducible": list(NOT_REPRODUCIBLE),
        "packages": _versions(),
        "seed": report["options"]["seed"],
        "pipeline": report["pipeline"],
        "target": report["target"]["text"],
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_folder(folder: Path) -> None:
    """Raise UsageError where there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}.", "Name the -o folder of a finished compile.")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished compile.

    Raises:
        UsageError: there is no such folder.
        VerificationError: there is no manifest, or it is damaged.
    """
    require_folder(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise VerificationError(
            f"{folder} holds no {MANIFEST_FILE}: no compile finished there.", "Run fraqat compile, or add --resume."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise VerificationError(f"{path} is damaged: {error}.", "Compile again.") from error
    return content


def changed_files(folder: Path) -> list[str]:
    """One line for each file that is missing or not what the manifest says."""
    lines = []
    for name, entry in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{name} is missing")
        elif sha256(path) != entry["sha256"]:
            lines.append(f"{name} has changed since it was compiled")
    return lines


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] not in BOOKKEEPING)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
