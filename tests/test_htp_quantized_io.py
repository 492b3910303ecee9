"""htp{io=quantized}: the compiled graph takes and gives codes, and what reaches the user is as with floats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.bundling import bundle
from fraqat_compiler.errors import TargetError
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.context_model import read_context, weight_bytes
from fraqat_compiler.targets.htp.quantized_io import Codes, quantized, strip_boundary
from fraqat_compiler.targets.model_file import read_model

needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


class TwoInputs(nn.Module):
    """One input is quantized, the other holds indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.up = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.up(x + self.table(ids)))
        return hidden, self.head(hidden)


def compiled(folder: Path, io: str) -> Path:
    torch.manual_seed(0)
    inputs = (torch.randn(4, 16), torch.tensor([1, 2, 3, 4]))
    fraqat_compiler.compile(TwoInputs(), inputs, output=folder, target=f"htp{{io={io}}}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("io")
    return {io: compiled(root / io, io) for io in ("float", "quantized")}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_codes_are_those_of_quantize_linear(dtype: str) -> None:
    levels = np.iinfo(dtype).max
    codes = Codes(dtype, 6 / levels, levels // 2)
    values = np.random.default_rng(0).uniform(-5, 5, 500).astype(np.float32)
    node_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [
        numpy_helper.from_array(np.float32(codes.scale), "scale"),
        helper.make_tensor("zero", node_type, [], [codes.zero_point]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [500])],
        [helper.make_tensor_value_info("q", node_type, [500]), helper.make_tensor_value_info("y", 1, [500])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    from onnxruntime import InferenceSession

    q, y = InferenceSession(model.SerializeToString()).run(None, {"x": values})
    np.testing.assert_array_equal(codes.quantized(values), q)
    np.testing.assert_array_equal(codes.values(q), y)


@needs_htp
def test_the_graph_takes_codes_and_the_results_are_the_same(folders: dict[str, Path]) -> None:
    reports = {io: json.loads((folder / "report.json").read_text()) for io, folder in folders.items()}
    details = {io: report["target"]["details"] for io, report in reports.items()}
    names = {io: detail["quantized_io"] for io, detail in details.items()}
    assert names == {"float": [], "quantized": ["output_0", "output_1", "x"]}
    parities = {io: report["parity"]["target"] for io, report in reports.items()}
    assert parities["quantized"] == pytest.approx(parities["float"], rel=1e-5)

    types = [value.type.tensor_type.elem_type for value in context_values(folders["quantized"])]
    assert sorted(types) == sorted([TensorProto.UINT8, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT8])
    assert {value.type.tensor_type.elem_type for value in context_values(folders["float"])} == {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    first, second = ([value.name for value in context_values(folder)] for folder in folders.values())
    assert first == second


def context_values(folder: Path) -> list[onnx.ValueInfoProto]:
    graph = read_model(folder / "htp_context.onnx").graph
    return [*graph.input, *graph.output]


@needs_htp
def test_a_fresh_process_loads_and_runs_it(folders: dict[str, Path]) -> None:
    folder = folders["quantized"]
    program = """
import sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
from fraqat_compiler.registry import parse_target
folder = Path(sys.argv[1])
target = parse_target("htp{io=quantized}")
kept = load_file(folder / "reference.safetensors")
inputs = {name[6:]: array for name, array in kept.items() if name.startswith("input:")}
save_file(target.run(target.load(folder, sys.argv[2]), inputs), folder.parent / "fresh.safetensors")
"""
    subprocess.run([sys.executable, "-c", program, str(folder), "htp{io=quantized}"], check=True)
    fresh, kept = load_file(folder.parent / "fresh.safetensors"), load_file(folder / "reference.safetensors")
    scales = json.loads((folder / "report.json").read_text())["output_scales"]
    for name, values in fresh.items():
        assert np.max(np.abs(values - kept[f"output:{name}"])) <= 2.01 * scales[name]


@needs_htp
def test_its_bundle_holds_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle(folders["quantized"], tmp_path / "phone", Progress())
    manifest = json.loads((tmp_path / "phone/manifest.json").read_text())
    assert {entry["dtype"] for entry in manifest["outputs"]} == {"uint8"}
    inputs = {entry["name"]: entry for entry in manifest["inputs"]}
    assert {name: entry["dtype"] for name, entry in inputs.items()} == {"x": "uint8", "ids": "int64"}
    stored = load_file(folders["quantized"] / "reference.safetensors")
    raw = {name: np.fromfile(tmp_path / "phone" / entry["file"], entry["dtype"]) for name, entry in inputs.items()}
    np.testing.assert_array_equal(raw["ids"], stored["input:ids"])
    values = (raw["x"].reshape(4, 16) - inputs["x"]["zero_point"] * 1.0) * inputs["x"]["scale"]
    assert np.max(np.abs(values - stored["input:x"])) <= 0.501 * inputs["x"]["scale"]
    assert "scale" not in inputs["ids"]
    done = subprocess.run([sys.executable, str(tmp_path / "phone/run.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_htp
def test_the_binary_is_held_against_the_packed_weights(folders: dict[str, Path]) -> None:
    folder = folders["float"]
    details = json.loads((folder / "report.json").read_text())["target"]["details"]
    packed = weight_bytes(read_model(folder / "model.onnx"))
    assert details["weight_bytes"] == packed > 0
    ratio = (folder / "htp_context_qnn.bin").stat().st_size / packed
    assert details["binary_bytes_per_weight_byte"] == pytest.approx(ratio, abs=1e-3)


@needs_htp
def test_a_context_model_that_no_compile_wrote_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("htp_context.onnx", "htp_context_qnn.bin"):
        (tmp_path / name).write_bytes((folders["float"] / name).read_bytes())
    model = onnx.load(str(tmp_path / "htp_context.onnx"))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "htp_context.onnx"))
    with pytest.raises(TargetError, match=r"htp_context\.onnx is no compiled model"):
        HtpTarget().load(tmp_path, "htp")


@needs_htp
def test_weights_beside_the_model_come_along_and_no_path_gets_into_the_binary(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    binaries = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        model = onnx.load(str(folders["quantized"] / "model.onnx"))
        onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="w.data", size_threshold=0)
        artifact = HtpTarget(io="quantized").compile(folder / "model.onnx", folder)
        binaries.append([file.read_bytes() for file in artifact.files])
    assert binaries[0] == binaries[1]


def test_values_that_are_no_floats_are_refused() -> None:
    codes = {"x": Codes("uint8", 0.1, 0)}
    with pytest.raises(TargetError, match="x is given as int64, but has values in float32"):
        quantized({"x": np.zeros(3, np.int64)}, codes)


def edge_model(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(3), "z")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", *outputs)]
    return helper.make_model(helper.make_graph(nodes, "graph", values[:1], values[1:], constants))


def quantizer(source: str, codes: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, "s", "z"], [codes])


def dequantizer(codes: str, values: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [codes, "s", "z"], [values])


def test_an_input_that_is_an_output_keeps_its_quantizers_on_one_side() -> None:
    model = edge_model([quantizer("x", "q"), dequantizer("q", "y")], ["y"])
    assert set(strip_boundary(model, Path())) == {"x"}
    onnx.checker.check_model(model, full_check=True)


def test_an_input_that_is_also_read_in_float_stays_in_float() -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    model = edge_model(
        [quantizer("x", "q"), dequantizer("q", "v"), helper.make_node("Neg", ["v"], ["w"]), relu], ["y", "w"]
    )
    assert strip_boundary(model, Path()) == {}


def test_an_output_that_the_graph_goes_on_with_is_given_in_codes() -> None:
    nodes = [quantizer("x", "q"), dequantizer("q", "v"), helper.make_node("Relu", ["v"], ["r"]), quantizer("r", "c")]
    nodes += [dequantizer("c", "y"), helper.make_node("Neg", ["y"], ["w"])]
    model = edge_model(nodes, ["y", "w"])
    assert set(strip_boundary(model, Path())) == {"x", "y"}
    onnx.checker.check_model(model, full_check=True)
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [TensorProto.UINT8, TensorProto.FLOAT]


class Wide(nn.Module):
    """Intermediate results that all live until the end: more than 1 MiB of VTCM holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels, 32, 3, padding=1) for channels in (3, 32, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            kept.append(x)
        return torch.stack(kept).sum(0)


@needs_htp
def test_spill_fill_memory_is_told(tmp_path: Path) -> None:
    target = "htp{vtcm-mb=1 spill-fill=true}"
    assert parse_target(target) == HtpTarget(vtcm_mb=1, spill_fill=True)
    fraqat_compiler.compile(Wide(), (torch.randn(1, 3, 128, 128),), output=tmp_path, target="onnxruntime")
    scratch = tmp_path / "htp"
    scratch.mkdir()
    sizes = []
    for spill_fill in (False, True):
        HtpTarget(vtcm_mb=1, spill_fill=spill_fill).compile(tmp_path / "model.onnx", scratch)
        sizes.append(read_context(scratch / "htp_context.onnx").spill_fill_bytes)
    assert sizes[0] == 0
    assert sizes[1] > 1_000_000
