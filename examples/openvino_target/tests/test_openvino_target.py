"""OpenVINO for real: what is packed stays packed, what has 8 bits is computed in int8, what is refused is named."""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

pytest.importorskip("openvino", reason="OpenVINO is not installed: make install")
pytest.importorskip("fraqat_openvino", reason="pip install -e examples/openvino_target")

from fraqat_openvino.loaded_model import LoadedModel
from fraqat_openvino.target import MODEL_FILE, WEIGHTS_FILE, OpenVinoTarget

from fraqat_compiler import parity
from fraqat_compiler.conformance import check_target
from fraqat_compiler.conformance_case import Case, make_case
from fraqat_compiler.errors import OutputError, TargetError
from fraqat_compiler.quant_spec import Unquantized
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import Artifact, TensorRequest

ROOT = Path(__file__).parents[3]
TARGET = OpenVinoTarget(threads=1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A convolution and two linear layers in W4A8."""
    return make_case(TARGET, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def artifact(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return TARGET.compile(case.model, tmp_path_factory.mktemp("compiled"))


def codes_of(model: Path, kind: int) -> int:
    """Elements of the weights of one integer type."""
    tensors = onnx.load(str(model)).graph.initializer
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type == kind and len(tensor.dims) > 1)


def network(nodes: list[NodeProto], weights: list[TensorProto], path: Path) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializer=weights)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), str(path))
    return path


@pytest.mark.parametrize("text", ["openvino{threads=1}", "openvino{performance-hint=throughput precision=bf16}"])
def test_it_keeps_the_contract(text: str) -> None:
    assert len(check_target(parse_target(text))) == 15


def test_int4_weights_are_packed_in_the_file_and_multiplied_in_int8(case: Case, artifact: Artifact) -> None:
    packed = codes_of(case.model, TensorProto.INT4) // 2
    assert packed == (8 * 3 * 3 * 3 + 512 * 16 + 16 * 4) // 2
    assert packed < (artifact.path.with_name(WEIGHTS_FILE)).stat().st_size < packed + 600  # scales, biases, shapes
    assert artifact.details["matrix_precisions"] == {"i8": 3}


def test_openvino_by_itself_would_multiply_them_in_float(case: Case) -> None:
    """The reason for `expand_int4`; when this fails, OpenVINO has int8 kernels for int4 weights and it can go."""
    loaded = LoadedModel.open(case.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert loaded.matrix_precisions() == {"f32": 3}


def test_wide_activations_stay_in_float_with_packed_weights(tmp_path: Path) -> None:
    spec = TARGET.quant_spec(TensorRequest("linear", "activation", (1, 4), 16, 16))
    assert isinstance(spec, Unquantized) and "16 bits in float" in spec.reason
    case = make_case(TARGET, tmp_path, weights="4", activations="16")
    artifact = TARGET.compile(case.model, tmp_path)
    assert artifact.details["matrix_precisions"] == {"f32": 3}
    actual = [TARGET.run(artifact, inputs) for inputs in case.inputs]
    assert parity.compare(case.outputs, actual, case.scales).max_abs < 1e-6


@pytest.mark.parametrize("kind", [TensorProto.UINT16, TensorProto.INT16])
def test_openvino_drops_16_bit_quantizers(kind: int, tmp_path: Path) -> None:
    """The reason for leaving wide activations in float: what lies outside the grid is not even clipped."""
    zero_point = 2**15 if kind == TensorProto.UINT16 else 0
    weights = [
        numpy_helper.from_array(np.float32(2**-15), "scale"),
        helper.make_tensor("zero_point", kind, [], [zero_point]),
        numpy_helper.from_array(np.eye(4, dtype=np.float32), "identity"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["values"]),
        helper.make_node("MatMul", ["values", "identity"], ["y"]),
    ]
    artifact = TARGET.compile(network(nodes, weights, tmp_path / "wide.onnx"), tmp_path)
    inputs = np.array([[0.25, 5, -7, 1]], np.float32)
    np.testing.assert_array_equal(TARGET.run(artifact, {"x": inputs})["y"], inputs)


def test_refused_nodes_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first/Relu"),
        helper.make_node("Unknown", ["a"], ["b"], name="odd/Unknown", domain="acme"),
        helper.make_node("Relu", ["b"], ["y"], name="last/Relu"),
    ]
    path, output = network(nodes, [], tmp_path / "odd.onnx"), tmp_path / "output"
    output.mkdir()
    verdicts = {finding.node: (finding.verdict, finding.reason) for finding in TARGET.check(path)}
    assert verdicts["first/Relu"] == ("runs", "")
    assert verdicts["odd/Unknown"] == ("refused", "No conversion rule found for operations: acme.Unknown")
    with pytest.raises(TargetError, match=r"refuses 1 nodes of odd.onnx, first odd/Unknown \(Unknown\)"):
        TARGET.compile(path, output)
    assert not list(output.iterdir())


def test_what_converts_but_has_no_kernel_is_named_too(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.STRING, [4]) for name in ("x", "w")]
    result = helper.make_tensor_value_info("y", TensorProto.BOOL, [4])
    graph = helper.make_graph(
        [helper.make_node("Equal", ["x", "w"], ["y"], name="same/Equal")], "graph", ends, [result]
    )
    path = tmp_path / "strings.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    (finding,) = TARGET.check(path)
    assert (finding.node, finding.verdict) == ("same/Equal", "refused")
    assert "string" in finding.reason and "src/" not in finding.reason


def test_a_device_that_is_not_here_is_told(case: Case, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no device 'TPU' here, only CPU"):
        OpenVinoTarget(device="TPU").check(case.model)


@contextmanager
def small_files_only() -> Iterator[None]:
    """No fixture: pytest itself writes between a test and the end of its fixtures."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(case: Case, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), small_files_only():
        TARGET.compile(case.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_profile_tells_the_kernel_of_each_op(case: Case, artifact: Artifact) -> None:
    profile = TARGET.profile(artifact, case.inputs[0])
    assert profile.source == "host" and profile.latency_ms is not None
    kernels = [op["kernel"] for op in profile.ops if op["op"].startswith(("Convolution", "FullyConnected"))]
    assert len(kernels) == 3 and all(kernel.endswith("_I8") for kernel in kernels)
    assert [op["ms"] for op in profile.ops] == sorted((op["ms"] for op in profile.ops), reverse=True)


def test_the_command_line_compiles_with_it(tmp_path: Path) -> None:
    job = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
def example_inputs():
    return (torch.linspace(-2, 2, 128).reshape(2, 64),)
"""
    (tmp_path / "job.py").write_text(job)
    options = ["--target", "openvino{threads=1}", "--steps", "0", "-o", "out"]
    command = [sys.executable, "-m", "fraqat_compiler", "compile", "job.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(report["target"]["files"]) == sorted([MODEL_FILE, WEIGHTS_FILE])
    assert sum(report["target"]["details"]["matrix_precisions"].values()) == 2
    assert report["parity"]["target"]["max_lsb"] <= 1.01
    assert report["profile"]["source"] == "host"


def test_it_needs_only_what_the_contract_offers() -> None:
    """Every module of fraqat_compiler that the package imports is one that targets/README.md names."""
    sources = [ast.parse(path.read_text()) for path in (ROOT / "examples/openvino_target/src").rglob("*.py")]
    imports = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in imports if node.module and node.module.startswith("fraqat_compiler")}
    offered = set(
        re.findall(r"^\| `(fraqat_compiler[\w.]*)` \|", (ROOT / "targets/README.md").read_text(), re.MULTILINE)
    )
    assert modules and modules <= offered, modules - offered
