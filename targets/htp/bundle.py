"""A folder that runs on the phone: the context binary, one sample with its outputs, and the commands, as text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from fraqat_compiler.manifest import sha256
from fraqat_compiler.target import Arrays, Artifact, Sample
from fraqat_compiler.targets.htp.context_model import graph_name, read_context
from fraqat_compiler.targets.htp.quantized_io import Codes, quantized
from fraqat_compiler.targets.htp.socs import Soc


def write_bundle(
    artifact: Artifact, chip: Soc, options: Mapping[str, str], sample: Sample, emulated: Arrays, folder: Path
) -> None:
    """Write the bundle into an empty folder. Raw files hold what the graph itself takes and gives: codes, or floats.

    Args:
        artifact: EPContext model and context binary.
        chip: what they are for.
        options: of ONNX Runtime's QNN provider.
        sample: inputs and expected outputs.
        emulated: the emulator's outputs of that sample, by name.
        folder: where to.
    """
    for file in artifact.files:
        shutil.copyfile(file, folder / file.name)
    codes = read_context(artifact.path).codes
    sample, emulated = _coded(sample, codes), quantized(emulated, codes)
    package = files("fraqat_compiler.targets.htp")
    (folder / "run.py").write_text(package.joinpath("bundle_run.py").read_text(encoding="utf-8"), encoding="utf-8")
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "model": artifact.path.name,
        "graph": graph_name(artifact.path),
        "soc": {name: artifact.details[name] for name in ("soc", "htp_arch", "vtcm_bytes", "qairt_version")},
        "provider_options": dict(options),
        "inputs": _written(sample.inputs, codes, folder, "inputs"),
        "outputs": [
            entry | _distances(sample, emulated, entry["name"])
            for entry in _written(sample.expected, codes, folder, "expected")
        ],
    }
    listed = " ".join(f"{entry['name']}:={entry['file']}" for entry in manifest["inputs"])
    (folder / "input_list.txt").write_text(f"{listed}\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(artifact, chip, manifest, folder.name), encoding="utf-8")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _coded(sample: Sample, codes: Mapping[str, Codes]) -> Sample:
    """The sample as the graph takes and gives it; a step between codes is 1."""
    steps = {**sample.steps, **dict.fromkeys(codes, 1.0)}
    return Sample(quantized(sample.inputs, codes), quantized(sample.expected, codes), steps)


def _written(arrays: Arrays, codes: Mapping[str, Codes], folder: Path, kind: str) -> list[dict[str, Any]]:
    (folder / kind).mkdir()
    entries = []
    for index, (name, array) in enumerate(arrays.items()):
        file = f"{kind}/{index}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.raw"
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        little.tofile(folder / file)
        entry = {"name": name, "file": file, "dtype": array.dtype.name, "shape": list(array.shape)}
        entries.append(entry | _meaning(codes.get(name)))
    return entries


def _meaning(code: Codes | None) -> dict[str, Any]:
    return {} if code is None else {"scale": code.scale, "zero_point": code.zero_point}


def _distances(sample: Sample, emulated: Arrays, name: str) -> dict[str, float]:
    """How far the emulator is off, and how far the phone may be: one quantization step more, or float32's rounding."""
    exact = sample.expected[name].astype(np.float64)
    distance = float(np.max(np.abs(exact - emulated[name]), initial=0.0))
    rounding = float(np.finfo(np.float32).eps * np.max(np.abs(exact), initial=0.0))
    return {
        "emulator_distance": distance,
        "allowed_distance": distance + 1.001 * sample.steps.get(name, 0.0) + rounding,
    }


def _readme(artifact: Artifact, chip: Soc, manifest: Mapping[str, Any], folder: str) -> str:
    text = files("fraqat_compiler.targets.htp").joinpath("bundle_readme.md").read_text(encoding="utf-8")
    (binary,) = (file.name for file in artifact.files if file != artifact.path)
    return Template(text).substitute(
        graph=manifest["graph"],
        part=chip.part,
        arch=chip.htp_arch,
        version=artifact.details["qairt_version"] or "of the compiler",
        devices=f" ({', '.join(chip.devices)})" if chip.devices else "",
        binary=binary,
        model=manifest["model"],
        inputs=_lines(manifest["inputs"]),
        outputs=_lines(manifest["outputs"]),
        folder=folder,
    )


def _lines(entries: list[dict[str, Any]]) -> str:
    return "\n".join(map(_line, entries))


def _line(entry: Mapping[str, Any]) -> str:
    line = f"- `{entry['name']}`: {entry['dtype']} {entry['shape']}, `{entry['file']}`"
    if "scale" not in entry:
        return line
    return f"{line}; value = (code - {entry['zero_point']}) * {entry['scale']!r}"
