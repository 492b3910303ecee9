"""Several compiles in one context binary, which holds the weights that they have in common once.

    python -m fraqat_compiler.targets.htp.combine out/prefill out/decode -o out/both

For graphs of one model in several shapes. The library shares weights as it compiles; its x86 emulator runs the graphs
in the process that compiled them, but does not load such a binary: that takes a device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fraqat_compiler.errors import FraqatError, OutputError, TargetError, UsageError, VerificationError
from fraqat_compiler.manifest import changed_files, sha256
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.progress import Progress
from fraqat_compiler.replay import loaded, reference
from fraqat_compiler.report import read_report
from fraqat_compiler.target import Arrays, Artifact
from fraqat_compiler.targets.htp.client import NO_FALLBACK, QnnError, QnnProcess
from fraqat_compiler.targets.htp.context_model import graph_name, note, weight_bytes
from fraqat_compiler.targets.htp.log_messages import explain
from fraqat_compiler.targets.htp.quantized_io import dequantized, quantized
from fraqat_compiler.targets.htp.target import BINARY_FILE, HtpTarget
from fraqat_compiler.targets.model_file import read_model

MODEL_FILE = "model.onnx"
SHARE = {"ep.share_ep_contexts": "1"}
LAST = {"ep.stop_share_ep_contexts": "1"}


@dataclass(frozen=True)
class Part:
    """One finished compile.

    Attributes:
        name: of its folder, and of its model in the combined one.
        model: its ONNX file.
        target, artifact: what it was compiled for, and to.
        inputs: its stored sample.
    """

    name: str
    model: Path
    target: HtpTarget
    artifact: Artifact
    inputs: Arrays


def combine(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Compile the ONNX files of finished compiles anew, into one context binary.

    Before anything is written each graph runs its stored sample, which must give what its own binary gives, to the bit.

    Args:
        folders: outputs of `fraqat compile` for target htp with the same options; their names differ.
        output: the folder to make; must be missing or empty. It is there whole or not at all.

    Returns:
        What `combined.json` holds: files, sizes, graphs and the options to load them with.

    Raises:
        UsageError: too few folders, two of one name, or other options.
        VerificationError: a folder holds no finished compile, or a graph computes something else in the binary.
        TargetError: the library refuses to put them together.
        OutputError: `output` is not empty, or cannot be written.
    """
    parts, output = _parts(folders), output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output} is not empty.", "Name a new folder with -o.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fraqat-", dir=output.parent) as scratch:
            made = Path(scratch) / output.name
            made.mkdir()
            _compile(parts, made)
            manifest = _manifest(parts, made)
            (made / "combined.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            made.replace(output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.", "Free disk space.") from error
    return manifest


def _parts(folders: Sequence[Path]) -> list[Part]:
    parts = [_part(folder.resolve()) for folder in folders]
    if len(parts) < 2 or len({part.name for part in parts}) < len(parts):
        raise UsageError("a combined binary is made of two or more folders with different names.", "Name them.")
    texts = {to_text(part.target) for part in parts}
    if len(texts) > 1:
        raise UsageError(f"the folders were compiled with different options: {', '.join(sorted(texts))}.", "Use one.")
    return parts


def _part(folder: Path) -> Part:
    report, changed = read_report(folder), changed_files(folder)
    if changed:
        raise VerificationError(f"{folder} is not as it was compiled: {'; '.join(changed)}.", "Compile again.")
    target, artifact = loaded(folder, report, Progress())
    if not isinstance(target, HtpTarget):
        raise UsageError(f"{folder} was compiled for {target.name}, not for htp.", "Compile with --target htp.")
    return Part(folder.name, folder / MODEL_FILE, target, artifact, reference(folder)[0])


def _compile(parts: Sequence[Part], output: Path) -> None:
    """All graphs in one process; the library writes the binary as the last one is compiled."""
    process = QnnProcess()
    boundaries = [part.target.boundary(part.model) for part in parts]
    for part, (content, _) in zip(parts, boundaries, strict=True):
        config = NO_FALLBACK | SHARE | (LAST if part is parts[-1] else {})
        config |= {"ep.context_enable": "1", "ep.context_embed_mode": "0"}
        config |= {"ep.context_file_path": str((output / f"{part.name}.onnx").resolve())}
        options, root = part.target.provider_options(), part.model.parent.parent
        try:
            process.load(part.model, options, config, content=content, root=root, beside=True)
        except QnnError as error:
            raise TargetError(
                f"{part.name} does not go into one binary with the others: {explain(str(error), error.log)}.",
                "Keep the compiles apart.",
            ) from error
    for index, (part, (_, codes)) in enumerate(zip(parts, boundaries, strict=True)):
        actual = dequantized(process.run(quantized(part.inputs, codes), index), codes)
        _require_equal(part, actual)
        note(output / f"{part.name}.onnx", codes, weight_bytes(read_model(part.model)))


def _require_equal(part: Part, actual: Arrays) -> None:
    expected = part.target.run(part.artifact, part.inputs)
    strays = [name for name, array in expected.items() if not np.array_equal(array, actual[name])]
    if strays:
        raise VerificationError(
            f"{part.name} computes another {strays[0]} in the common binary than in its own.",
            "Keep the compiles apart.",
        )


def _manifest(parts: Sequence[Part], folder: Path) -> dict[str, Any]:
    (binary,) = folder.glob("*.bin")
    parts[0].target.proven(binary)
    return {
        "schema_version": 1,
        "target": to_text(parts[0].target),
        "provider_options": parts[0].target.provider_options(),
        "session_config": SHARE,
        "binary": binary.name,
        "bytes": binary.stat().st_size,
        "bytes_apart": sum(part.model.with_name(BINARY_FILE).stat().st_size for part in parts),
        "graphs": {
            part.name: {"model": f"{part.name}.onnx", "graph": graph_name(folder / f"{part.name}.onnx")}
            for part in parts
        },
        "files": {path.name: {"sha256": sha256(path)} for path in sorted(folder.iterdir())},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="outputs of fraqat compile --target htp")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        manifest = combine(options.folders, options.output)
    except FraqatError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
