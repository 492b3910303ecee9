"""The host CPU target: what is refused is named, what is compiled is whole, what is measured is the host's."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from fraqat_compiler import compile as compile_for_target
from fraqat_compiler.errors import OutputError, TargetError, UsageError
from fraqat_compiler.losses import relative_error
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import Arrays
from fraqat_compiler.targets.onnxruntime import Level, OnnxRuntimeTarget

INPUTS: Arrays = {"x": np.linspace(-2, 2, 64, dtype=np.float32).reshape(1, 64)}


def model_of(nodes: Sequence[NodeProto], weights: Sequence[TensorProto] = ()) -> ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializer=weights)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def linear(scale: float = 1.0) -> ModelProto:
    weight = scale * np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="fc/MatMul"),
        helper.make_node("Relu", ["product"], ["y"], name="relu/Relu"),
    ]
    return model_of(nodes, [numpy_helper.from_array(weight, "weight")])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "net.onnx"
    path.parent.mkdir()
    onnx.save(linear(), str(path))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def expected(path: Path) -> Arrays:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {"y": session.run(["y"], INPUTS)[0]}


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "saved.onnx"
    onnx.save(model, str(path))
    return path


def saved_outside(folder: Path) -> Path:
    """A model whose weights lie in a file of their own."""
    path = folder / "large.onnx"
    onnx.save(linear(), str(path), save_as_external_data=True, location="large.weights", size_threshold=0)
    return path


@pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])
@pytest.mark.parametrize("offline", [False, True])
def test_every_option_computes_the_model(level: Level, offline: bool, file: Path, output: Path) -> None:
    target = OnnxRuntimeTarget(optimization=level, offline=offline, threads=1)
    artifact = target.compile(file, output)
    np.testing.assert_allclose(target.run(artifact, INPUTS)["y"], expected(file)["y"], rtol=1e-5, atol=1e-6)
    assert parse_target(artifact.target_text) == target
    assert artifact.details["fallback_nodes"] == 0


def test_every_node_that_has_no_kernel_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Frobnicate", ["a"], ["b"], name="unknown"),
        helper.make_node("Relu", ["x"], ["c"], name="odd", slope=3),
        helper.make_node("Gizmo", ["c"], ["d"], name="foreign", domain="acme"),
        helper.make_node("Add", ["b", "d"], ["y"], name="after"),
    ]
    findings = {finding.node: finding for finding in OnnxRuntimeTarget().check(saved(model_of(nodes), tmp_path))}
    assert {name: finding.verdict for name, finding in findings.items()} == {
        "fine": "runs",
        "unknown": "refused",
        "odd": "refused",
        "foreign": "refused",
        "after": "runs",  # its inputs' types are not known: nothing speaks against it
    }
    assert "Frobnicate" in findings["unknown"].reason
    assert "slope" in findings["odd"].reason
    assert all(finding.remedy for finding in findings.values() if finding.verdict == "refused")


def test_nodes_without_names_are_told_apart(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Frobnicate", ["a"], ["y"])]
    verdicts = [finding.verdict for finding in OnnxRuntimeTarget().check(saved(model_of(nodes), tmp_path))]
    assert verdicts == ["runs", "refused"]


def test_a_node_of_a_subgraph_refuses_the_node_that_holds_it(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 64])
    branch = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["inner"])], "branch", [], [value])
    true = numpy_helper.from_array(np.array(True), "true")
    choice = helper.make_node("If", ["true"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    (finding,) = OnnxRuntimeTarget().check(saved(model_of([choice], [true]), tmp_path))
    assert (finding.node, finding.verdict) == ("choice", "refused")
    assert "Frobnicate" in finding.reason


def test_a_model_that_is_wrong_as_a_whole_is_refused(tmp_path: Path) -> None:
    unordered = linear()
    unordered.graph.node.reverse()
    with pytest.raises(TargetError, match=r"saved\.onnx is refused"):
        OnnxRuntimeTarget().check(saved(unordered, tmp_path))


def test_a_refused_model_leaves_nothing(tmp_path: Path, output: Path) -> None:
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"], name="blocks.0/Frobnicate")]
    with pytest.raises(TargetError, match=r"refuses 1 nodes.*blocks\.0/Frobnicate") as caught:
        OnnxRuntimeTarget().compile(saved(model_of(nodes), tmp_path), output)
    assert caught.value.remedy
    assert not list(output.iterdir())


def test_weights_outside_travel_with_the_model(tmp_path: Path, output: Path) -> None:
    path = saved_outside(tmp_path)
    artifact = OnnxRuntimeTarget().compile(path, output)
    assert [file.name for file in artifact.files] == ["model.onnx", "large.weights"]
    assert artifact.bytes > 64 * 64 * 4
    wanted = expected(path)
    path.with_name("large.weights").unlink()
    np.testing.assert_array_equal(OnnxRuntimeTarget().run(artifact, INPUTS)["y"], wanted["y"])


def test_large_weights_stay_outside_an_offline_model(tmp_path: Path, output: Path) -> None:
    path = saved_outside(tmp_path)
    target = OnnxRuntimeTarget(offline=True)
    artifact = target.compile(path, output)
    assert [file.name for file in artifact.files] == ["model.optimized.onnx", "model.optimized.onnx.data"]
    np.testing.assert_allclose(target.run(artifact, INPUTS)["y"], expected(path)["y"], rtol=1e-5, atol=1e-6)


def test_lost_weights_are_named(tmp_path: Path, output: Path) -> None:
    target = OnnxRuntimeTarget()
    target.compile(saved_outside(tmp_path), output)
    (output / "large.weights").unlink()
    with pytest.raises(TargetError, match=r"large\.weights"):
        target.load(output, "onnxruntime")


def test_a_model_is_compiled_where_it_lies(output: Path) -> None:
    """As a compile does: it writes the model into the folder of the artifact."""
    path = output / "model.onnx"
    onnx.save(linear(), str(path))
    before = path.read_bytes()
    artifact = OnnxRuntimeTarget().compile(path, output)
    assert artifact.files == (path,) == tuple(output.iterdir())
    assert path.read_bytes() == before


def test_a_file_that_was_compiled_anew_is_loaded_anew(tmp_path: Path, output: Path) -> None:
    target = OnnxRuntimeTarget()
    first = target.run(target.compile(saved(linear(), tmp_path), output), INPUTS)["y"]
    second = target.run(target.compile(saved(linear(scale=2.0), tmp_path), output), INPUTS)["y"]
    np.testing.assert_allclose(second, 2 * first, rtol=1e-5)


@pytest.mark.parametrize("offline", [False, True])
def test_a_disk_that_fills_leaves_nothing(offline: bool, file: Path, output: Path) -> None:
    """A limit on the size of a file is as near to a full disk as a process can bring itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            OnnxRuntimeTarget(offline=offline).compile(file, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(output.iterdir())


@pytest.mark.parametrize("offline", [False, True])
def test_a_folder_that_cannot_be_written_is_told(offline: bool, file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        OnnxRuntimeTarget(offline=offline).compile(file, tmp_path / "no such folder")


def test_the_profile_is_of_the_nodes_of_this_model(file: Path, output: Path) -> None:
    target = OnnxRuntimeTarget(optimization="none", threads=1)
    profile = target.profile(target.compile(file, output), INPUTS)
    assert profile.source == "host"
    assert profile.latency_ms is not None and profile.latency_ms > 0
    assert {op["name"]: op["op"] for op in profile.ops} == {"fc/MatMul": "MatMul", "relu/Relu": "Relu"}
    times = [op[profile.unit] for op in profile.ops]
    assert times == sorted(times, reverse=True) and times[0] > 0
    assert "threads: 1" in profile.notes[0]
    assert {file.name for file in output.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize("bias", [False, True])
def test_groups_keep_an_outlier_to_themselves(bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32, bias=bias), torch.randn(16, 64)
    with torch.no_grad():
        model.weight[:, 0] *= 40
    x[:, 0] /= 40
    errors = {}
    for size in (0, 16):
        target = f"onnxruntime{{group-size={size}}}"
        options = {"weights": "4", "weight_range": "minmax", "activations": "16", "steps": 0, "target": target}
        result = compile_for_target(model, (x,), output=tmp_path / str(size), **options)
        assert result.report["parity"]["onnx_optimized"]["max_lsb"] <= 1.001
        with torch.no_grad():
            errors[size] = float(relative_error(result.student(x), model(x)))
    assert errors[16] < errors[0] / 2
    nodes = onnx.load(tmp_path / "16" / "model.onnx").graph.node
    sizes = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "block_size"]
    assert set(sizes) == {16}


def test_rows_that_groups_do_not_fill_have_one_scale(tmp_path: Path) -> None:
    target = "onnxruntime{group-size=24}"
    compile_for_target(nn.Linear(64, 32), (torch.randn(2, 64),), output=tmp_path, steps=0, target=target)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert not [attribute for node in nodes for attribute in node.attribute if attribute.name == "block_size"]
    with pytest.raises(UsageError, match="group-size"):
        OnnxRuntimeTarget(group_size=-1)
