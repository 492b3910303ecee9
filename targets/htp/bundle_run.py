"""Run the bundle that this file lies in and compare its outputs: `python run.py`, with numpy and onnxruntime-qnn.

On a Snapdragon PC the HTP runs it, on Linux x86-64 its emulator. `python run.py FOLDER` runs nothing and compares what
`qnn-net-run` wrote to FOLDER. Exit status 1 when an output is farther off than the manifest allows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PROVIDER = "QNNExecutionProvider"


def main() -> int:
    """Check the files, get the outputs, print the distances."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != entry["sha256"]:
            sys.exit(f"{name} is damaged: copy the bundle again.")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    outputs = _written(folder, manifest) if folder else _run(manifest)
    distances = [(output, _distance(output, outputs[output["name"]])) for output in manifest["outputs"]]
    for output, distance in distances:
        print(f"{output['name']}: at most {distance:.6g} off, {output['allowed_distance']:.6g} is allowed")
    return int(any(not distance <= output["allowed_distance"] for output, distance in distances))


def _distance(output: dict[str, Any], actual: np.ndarray[Any, Any]) -> float:
    expected = _read(HERE / output["file"], output)
    return float(np.max(np.abs(expected.astype(np.float64) - actual.astype(np.float64)), initial=0.0))


def _run(manifest: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort
    import onnxruntime_qnn

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    device = next(device for device in ort.get_ep_devices() if device.ep_name == PROVIDER)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices([device], backend | manifest["provider_options"])
    session = ort.InferenceSession(str(HERE / manifest["model"]), options)
    feeds = {entry["name"]: _read(HERE / entry["file"], entry) for entry in manifest["inputs"]}
    names = [output["name"] for output in manifest["outputs"]]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _written(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Files of qnn-net-run, which adds `_native` to the names when it keeps the graph's own types."""
    outputs = {}
    for output in manifest["outputs"]:
        paths = [folder / f"{output['name']}{suffix}.raw" for suffix in ("_native", "")]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            sys.exit(f"{folder} holds no {paths[0].name}.")
        outputs[output["name"]] = _read(found, output)
    return outputs


def _read(path: Path, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.fromfile(path, entry["dtype"]).reshape(entry["shape"])


if __name__ == "__main__":
    sys.exit(main())
