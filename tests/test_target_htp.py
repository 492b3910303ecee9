"""The HTP target on the real library: what it refuses is named, what it computes wrongly known, what it made proven."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import fraqat_compiler
from fraqat_compiler import parity
from fraqat_compiler.errors import OutputError, TargetError
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import Arrays, Artifact, Finding
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.context_binary import read_binary
from fraqat_compiler.targets.htp.log_messages import DEFAULT_REMEDY, explain, remedy_for

pytestmark = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


class Builder:
    """Writes small QDQ models op by op."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, values: object, dtype: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def int4(self, name: str, shape: Sequence[int], *, with_zero_point: bool = True) -> str:
        """A dequantized INT4 weight, per channel along axis 0."""
        codes = np.random.default_rng(0).integers(-7, 8, int(np.prod(shape)))
        self.constants.append(helper.make_tensor(f"{name}_codes", TensorProto.INT4, shape, codes.tolist()))
        inputs = [f"{name}_codes", self.constant(f"{name}_scale", np.full(shape[0], 0.1))]
        if with_zero_point:
            self.constants.append(helper.make_tensor(f"{name}_zero", TensorProto.INT4, shape[:1], [0] * shape[0]))
            inputs.append(f"{name}_zero")
        return self.op("DequantizeLinear", inputs, f"{name}/DequantizeLinear", axis=0)

    def qdq(self, tensor: str, low: float, high: float, bits: int = 8) -> str:
        """The tensor quantized to [low, high] and back."""
        dtype = np.uint8 if bits == 8 else np.uint16
        scale = (high - low) / (2**bits - 1)
        parameters = [
            self.constant(f"{tensor}_scale", scale),
            self.constant(f"{tensor}_zero", round(-low / scale), dtype),
        ]
        codes = self.op("QuantizeLinear", [tensor, *parameters], f"{tensor}/QuantizeLinear")
        return self.op("DequantizeLinear", [codes, *parameters], f"{tensor}/DequantizeLinear")

    def op(self, op: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        output = f"{name}_output" if name else f"output_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def save(self, path: Path, shape: Sequence[int | str], result: str) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [onnx.ValueInfoProto(name=result)],
            initializer=self.constants,
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]
        model: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
        return path


def linear(path: Path) -> Path:
    """W4A8, two layers."""
    b = Builder()
    hidden = b.op("Gemm", [b.qdq("x", -3, 3), b.int4("first", (8, 16))], "block.0/Gemm", transB=1)
    active = b.op("Relu", [b.qdq(hidden, -4, 4)], "block.1/Relu")
    result = b.op("Gemm", [b.qdq(active, -4, 4), b.int4("second", (4, 8))], "block.2/Gemm", transB=1)
    return b.save(path, [1, 16], b.qdq(result, -4, 4))


def unary(path: Path, op: str, shape: Sequence[int], ends: tuple[float, ...], bits: int = 8, **attributes: int) -> Path:
    """One op between quantizers: input range, output range."""
    b = Builder()
    result = b.op(op, [b.qdq("x", *ends[:2], bits)], f"block/{op}", **attributes)
    return b.save(path, shape, b.qdq(result, *ends[2:], bits))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear(tmp_path_factory.mktemp("linear") / "model.onnx")


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return HtpTarget().compile(model, tmp_path_factory.mktemp("compiled"))


def inputs(*shape: int, low: float = -3.0, high: float = 3.0) -> Arrays:
    return {"x": np.random.default_rng(1).uniform(low, high, shape).astype(np.float32)}


def distance(target: HtpTarget, made: Artifact, model: Path, feeds: Arrays, scale: float) -> float:
    """Greatest distance from ONNX Runtime without optimizations, in LSB."""
    (expected,) = parity.onnx_runner(model, optimized=False)(feeds).values()
    (actual,) = target.run(made, feeds).values()
    return float(np.max(np.abs(expected - actual)) / scale)


def by_node(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.node: finding for finding in findings}


# The binary


@pytest.mark.parametrize(
    ("text", "part", "arch", "megabytes"),
    [
        ("htp{soc=sm8550}", "SM8550", 73, 8),
        ("htp{soc=sm8650}", "SM8650", 75, 8),
        ('htp{soc="Galaxy S25" vtcm-mb=2}', "SM8750", 79, 2),
        ('htp{device="Galaxy S24 Ultra"}', "SM8650", 75, 8),
        ("htp{soc=sm8850 optimization=1}", "SM8850", 81, 8),
        ("htp{soc=sc8380xp performance-mode=balanced}", "SC8380XP", 73, 8),
    ],
)
def test_the_binary_proves_what_it_was_made_for(
    text: str, part: str, arch: int, megabytes: int, model: Path, output: Path
) -> None:
    target = parse_target(text)
    assert isinstance(target, HtpTarget)
    made = target.compile(model, output)
    assert made.target_text == text
    assert made.details["fallback_nodes"] == 0
    assert (made.details["soc"], made.details["htp_arch"]) == (part, arch)
    assert made.details["vtcm_bytes"] == megabytes * 2**20
    assert made.details["qairt_version"].startswith("2.")
    assert distance(target, made, model, inputs(1, 16), 8 / 255) <= 1.001


def test_a_binary_for_another_soc_is_refused(artifact: Artifact) -> None:
    other = HtpTarget(soc="sm8550")
    with pytest.raises(TargetError, match=r"built for SM8750.*not for SM8550"):
        other.load(artifact.path.parent, artifact.target_text)
    with pytest.raises(TargetError, match=r"built for SM8750.*not for SM8550"):
        other.run(artifact, inputs(1, 16))


@pytest.mark.parametrize("content", [b"", b"not a context binary" * 100])
def test_what_is_no_binary_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    path.write_bytes(content)
    with pytest.raises(TargetError, match=r"some\.bin"):
        read_binary(path)


# What is refused


def erf(path: Path) -> Path:
    return unary(path, "Erf", [1, 16], (-3, 3, -1, 1))


def rank_6(path: Path) -> Path:
    b = Builder()
    result = b.op("Transpose", [b.qdq("x", -3, 3)], "block/Transpose", perm=[0, 5, 1, 2, 3, 4])
    return b.save(path, [1, 2, 2, 2, 2, 4], b.qdq(result, -3, 3))


def int4_conv3d(path: Path) -> Path:
    b = Builder()
    active = b.op("Relu", [b.qdq("x", -3, 3)], "block/Relu")
    result = b.op("Conv", [b.qdq(active, -3, 3), b.int4("w", (8, 2, 3, 3, 3))], "block/Conv")
    return b.save(path, [1, 2, 8, 8, 8], b.qdq(result, -9, 9))


def foreign_op(path: Path) -> Path:
    b = Builder()
    return b.save(path, [1, 16], b.op("Foo", ["x"], "block/Foo", domain="acme"))


@pytest.mark.parametrize(
    ("make", "node", "reason", "remedy"),
    [
        (erf, "block/Erf", "not supported", "gelu"),
        (rank_6, "block/Transpose", "3110", "at most 5 dimensions"),
        (int4_conv3d, "block/Conv", "1002", "8-bit weights"),
        (foreign_op, "block/Foo", "acme:Foo", "--skip"),
    ],
)
def test_the_refused_node_is_named_with_a_remedy(
    make: Callable[[Path], Path], node: str, reason: str, remedy: str, file: Path, output: Path
) -> None:
    findings = by_node(HtpTarget().check(make(file)))
    refused = {name for name, finding in findings.items() if finding.verdict == "refused"}
    assert refused == {node}
    assert reason in findings[node].reason
    assert remedy in findings[node].remedy
    with pytest.raises(TargetError, match=f"SM8750 refuses node {node} .*{reason}.*{remedy}"):
        HtpTarget().compile(file, output)
    assert [path.name for path in output.iterdir()] == ["htp.log"]
    assert "ONNXRuntimeError" in (output / "htp.log").read_text()


def test_a_node_without_a_name_is_told_by_its_op(file: Path, output: Path) -> None:
    b = Builder()
    result = b.op("Relu", [b.op("Erf", [b.qdq("x", -3, 3)], "")], "")
    b.save(file, [1, 16], result)
    assert [(f.op, f.verdict) for f in HtpTarget().check(file)] == [("Erf", "refused"), ("Relu", "runs")]
    with pytest.raises(TargetError, match=r"\(unnamed\) \(Erf\)"):
        HtpTarget().compile(file, output)


def test_dynamic_shapes_are_refused_at_once(file: Path, output: Path) -> None:
    b = Builder()
    b.save(file, ["batch", 16], b.op("Relu", [b.qdq("x", -3, 3)], "relu"))
    for action in (HtpTarget().check, lambda path: HtpTarget().compile(path, output)):
        with pytest.raises(TargetError, match=r"'x' has dynamic dimensions \(batch\)"):
            action(file)


def test_every_node_of_a_good_model_runs(model: Path) -> None:
    findings = HtpTarget().check(model)
    assert [(finding.node, finding.verdict) for finding in findings] == [
        ("block.0/Gemm", "runs"),
        ("block.1/Relu", "runs"),
        ("block.2/Gemm", "runs"),
    ]


@pytest.mark.parametrize(("make", "verdict"), [(linear, "runs"), (int4_conv3d, "refused")])
def test_weights_may_lie_beside_the_model(make: Callable[[Path], Path], verdict: str, file: Path, output: Path) -> None:
    model = onnx.load(str(make(file)))
    onnx.save(model, str(file), save_as_external_data=True, location="weights", size_threshold=0)
    assert HtpTarget().check(file)[-1].verdict == verdict
    (file.parent / "weights").unlink()
    for action in (HtpTarget().check, lambda path: HtpTarget().compile(path, output)):
        with pytest.raises(TargetError, match="needs weights, which is not beside it"):
            action(file)


# What is accepted and wrong: each rule against the library itself


def gemm(path: Path, *, right: bool) -> Path:
    b = Builder()
    weight = b.int4("w", (8, 16), with_zero_point=right)
    return b.save(path, [1, 16], b.qdq(b.op("Gemm", [b.qdq("x", -3, 3), weight], "op", transB=1), -4, 4))


def root(path: Path, *, right: bool) -> Path:
    b = Builder()
    squared = b.qdq("x", 0, 0.1, 16)
    rooted = b.qdq(b.op("Sqrt", [squared], "sqrt"), 0, 0.32, 16)
    if right:
        result = b.op("Div", [b.qdq(b.constant("one", [1.0]), 0, 1, 16), rooted], "op")
    else:
        result = b.op("Reciprocal", [rooted], "op")
    return b.save(path, [1, 64], b.qdq(result, 0, 10, 16))


def tanh(path: Path, *, right: bool) -> Path:
    shape = [1, 1024] if right else [1, 16, 64]
    b = Builder()
    shifted = b.op("Add", [b.qdq("x", -3, 3, 16), b.qdq(b.constant("shift", [0.1]), 0, 0.2, 16)], "add")
    return b.save(path, shape, b.qdq(b.op("Tanh", [b.qdq(shifted, -3, 3, 16)], "op"), -1, 1, 16))


def softmax(path: Path, *, right: bool) -> Path:
    b = Builder()
    result = b.op("Softmax", [b.qdq("x", -1, 1)], "op", axis=-1)
    return b.save(path, [1, 16, 256], b.qdq(result, 0, 0.0095, 16 if right else 8))


def logarithm(path: Path, *, right: bool) -> Path:
    bits = 8 if right else 16
    b = Builder()
    return b.save(path, [1, 64], b.qdq(b.op("Log", [b.qdq("x", 0, 10, bits)], "op"), 0, 3, bits))


def resize(path: Path, *, right: bool) -> Path:
    b = Builder()
    b.constants.append(helper.make_tensor("roi", TensorProto.FLOAT, [0], []))
    scales = b.constant("scales", [1, 1, 2, 2])
    modes = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor" if right else "floor"}
    result = b.op("Resize", [b.qdq("x", -3, 3), "roi", scales], "op", mode="nearest", **modes)
    return b.save(path, [1, 4, 8, 8], b.qdq(result, -3, 3))


def pool(path: Path, *, right: bool) -> Path:
    """Windows of 4 x 4, whose means span less than those of the 2 x 2 in them; side by side, or overlapping."""
    b = Builder()
    strides = [2, 2] if right else [4, 4]
    result = b.op("AveragePool", [b.qdq("x", -3, 3)], "op", kernel_shape=[4, 4], strides=strides)
    return b.save(path, [1, 4, 16, 16], b.qdq(result, -1, 1))


def mask(path: Path, least: float) -> Path:
    b = Builder()
    added = b.op("Add", [b.qdq("x", -3, 3), b.qdq(b.constant("mask", [[0.0, least] * 32]), least, 0)], "op")
    result = b.op("Softmax", [b.qdq(added, least - 3, 3)], "softmax", axis=-1)
    return b.save(path, [1, 64], b.qdq(result, 0, 0.25))


@pytest.mark.parametrize(
    ("make", "ends", "scale", "reason"),
    [
        (gemm, (-3, 3), 8 / 255, "INT4 weights without a zero point"),
        (root, (0.02, 0.1), 10 / 65535, "Sqrt then Reciprocal"),
        (tanh, (-2.8, 2.8), 2 / 65535, "Tanh at 16 bits"),
        (softmax, (-1, 1), 0.0095 / 255, "Softmax at 8 bits"),
        (logarithm, (0.1, 10), 3 / 255, "range of its result is narrow"),
        (resize, (-3, 3), 6 / 255, "nearest-neighbour"),
        (pool, (-3, 3), 2 / 255, "AveragePool"),
    ],
)
def test_what_a_rule_calls_wrong_is_wrong_and_its_remedy_is_right(
    make: Callable[..., Path],
    ends: tuple[float, float],
    scale: float,
    reason: str,
    file: Path,
    output: Path,
) -> None:
    target, strays = HtpTarget(), {}
    for right in (False, True):
        make(file, right=right)
        finding = by_node(target.check(file))["op"]
        assert finding.verdict == ("runs" if right else "wrong")
        assert right or (reason in finding.reason and finding.remedy)
        (value,) = onnx.load(str(file)).graph.input
        dimensions = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feeds = inputs(*dimensions, low=ends[0], high=ends[1])
        strays[right] = distance(target, target.compile(file, output), file, feeds, scale)
    assert strays[False] > 10 * max(strays[True], 1)


@pytest.mark.parametrize(("least", "verdict"), [(-30.0, "runs"), (-65504.0, "wrong")])
def test_a_large_mask_constant_ruins_what_it_is_added_to(least: float, verdict: str, file: Path, output: Path) -> None:
    target, feeds = HtpTarget(), inputs(1, 64)
    finding = by_node(target.check(mask(file, least)))["op"]
    assert finding.verdict == verdict
    (actual,) = target.run(target.compile(file, output), feeds).values()
    kept = np.exp(feeds["x"]) * [[1, 0] * 32]
    strays = float(np.max(np.abs(actual - kept / kept.sum())))
    assert strays > 0.05 if verdict == "wrong" else strays < 0.02


# Running


def test_the_process_is_kept_and_a_dead_one_is_replaced(artifact: Artifact) -> None:
    target, feeds = HtpTarget(), inputs(1, 16)
    (first,) = target.run(artifact, feeds).values()
    process = target._loaded(artifact)
    assert target._loaded(artifact) is process
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(TargetError, match="ended with status -9"):
        target.run(artifact, feeds)
    (again,) = target.run(artifact, feeds).values()
    np.testing.assert_array_equal(again, first)


def test_each_input_has_its_own_output(artifact: Artifact, model: Path) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        feeds: dict[str, NDArray[np.float32]] = {"x": rng.uniform(-3, 3, (1, 16)).astype(np.float32)}
        assert distance(HtpTarget(), artifact, model, feeds, 8 / 255) <= 1.001


def test_a_profile_counts_cycles_of_the_simulator(artifact: Artifact) -> None:
    profile = HtpTarget().profile(artifact, inputs(1, 16))
    assert (profile.source, profile.unit, profile.latency_ms) == ("simulator", "cycles", None)
    cycles = [op["cycles"] for op in profile.ops]
    assert cycles == sorted(cycles, reverse=True)
    assert sum(cycles) > 0
    assert {"block.0/Gemm", "block.1/Relu", "block.2/Gemm"} & {op["name"].partition("_")[0] for op in profile.ops}
    assert "emulator" in profile.notes[0]


# Missing parts and messages


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        assert "Linux on x86-64 only" in str(HtpTarget.missing())
    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
        assert "glibc 2.35 or newer, here is 2.31" in str(HtpTarget.missing())
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert 'pip install "fraqat_compiler[htp]"' in str(HtpTarget.missing())
        with pytest.raises(TargetError, match="onnxruntime-qnn is not installed"):
            HtpTarget().check(model)


def test_a_full_disk_is_told_and_leaves_nothing(model: Path, output: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # inherited by the library's process
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OutputError, match=r"htp_context_qnn\.bin cannot be written"):
            HtpTarget().compile(model, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("EPFail: [ONNXRuntimeError] : 11 : EP_FAIL : Failed to finalize QNN graph. Code: 1002", "code 1002"),
        ("QNN_COMMON_ERROR_MEM_ALLOC", "MEM_ALLOC"),
        ("Fail: This session contains graph nodes that are assigned to the default CPU EP, but", "has no kernel"),
        ("Fail: [ONNXRuntimeError] : 1 : FAIL : Load model from /a/b.onnx failed:Bad opset.", "Bad opset"),
        ("", "gives no reason"),
    ],
)
def test_errors_are_put_into_words(message: str, expected: str) -> None:
    assert expected in explain(message, "")
    assert "/a/b.onnx" not in explain(message, "")


def test_remedies_fit_the_op() -> None:
    assert "dimensions" in remedy_for("Reshape rank=6 refused")
    assert "8-bit" in remedy_for("Conv rank=5 code 1002")
    assert "other torch ops" in remedy_for("DFT rank=3 Operators of type `DFT` are not supported by QNN EP")
    assert remedy_for("Relu rank=2 refused") == DEFAULT_REMEDY


def test_the_op_to_blame_is_named_and_not_one_that_reads_constants_alone(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.PReLU(), torch.nn.Unflatten(1, (8, 1)), torch.nn.Conv3d(8, 8, (1, 3, 3)))
    with pytest.raises(TargetError, match=r"refuses 1 of .*2/Conv.*does not fit.*8-bit"):
        fraqat_compiler.compile(model, (torch.randn(1, 8, 6, 6),), output=tmp_path, target="htp")
