"""The cost model: what is counted, how the estimate moves, and that it stands beside the measurements."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fraqat_compiler.errors import TargetError
from fraqat_compiler.registry import parse_target
from fraqat_compiler.targets.htp.cost_model import demand, estimate, known_models, to_profile
from fraqat_compiler.targets.htp.op_counts import OpCount, count_ops
from fraqat_compiler.targets.htp.socs import find_soc

ROOT = Path(__file__).parents[1]
VTCM_MB = 8.0
RATES = known_models()["SM8750"].rates
MATMUL = OpCount("scores", "MatMul", "matmul", 10**9, 10**9, 10**6, 10**6, 0, matrices=8, quantized=True)


def model(nodes: list[onnx.NodeProto], shapes: dict[str, list[int]], weights: dict[str, TensorProto]) -> ModelProto:
    """Inputs with the given shapes; the last node's output is the model's."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = onnx.ValueInfoProto(name=nodes[-1].output[0])
    for name, tensor in weights.items():
        tensor.name = name
    graph = helper.make_graph(nodes, "counted", inputs, [output], initializer=list(weights.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def floats(*shape: int) -> TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32))


def only(made: ModelProto) -> OpCount:
    (count,) = count_ops(made)
    return count


def conv(deep: int, wide: int, groups: int = 1) -> OpCount:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1] * 4, group=groups)
    return only(model([node], {"x": [1, deep, 8, 8]}, {"w": floats(wide, deep // groups, 3, 3)}))


def quantized(weight_type: int, activation_type: int) -> ModelProto:
    """A product whose activations and weights stand behind quantizers."""

    def pair(name: str, zero: str) -> list[onnx.NodeProto]:
        codes = helper.make_node("QuantizeLinear", [name, "s", zero], [f"{name}_q"])
        return [codes, helper.make_node("DequantizeLinear", [f"{name}_q", "s", zero], [f"{name}_d"])]

    nodes = [
        *pair("x", "za"),
        helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["w_d"]),
        helper.make_node("Gemm", ["x_d", "w_d"], ["y"]),
        *pair("y", "za"),
    ]
    weights = {
        "s": numpy_helper.from_array(np.float32(0.1)),
        "za": helper.make_tensor("za", activation_type, [], [0]),
        "zw": helper.make_tensor("zw", weight_type, [], [0]),
        "w": helper.make_tensor("w", weight_type, [512, 512], [1] * 512 * 512),
    }
    return model(nodes, {"x": [64, 512]}, weights)


def test_a_dense_convolution_rounds_its_channels_up_to_tiles() -> None:
    count = conv(48, 64)
    assert (count.kind, count.macs, count.tiled_macs) == ("conv", 64 * 9 * 48 * 64, 64 * 9 * 64 * 64)
    assert (count.read, count.written, count.weights) == (48 * 64, 64 * 64, 64 * 48 * 9)


def test_groups_narrower_than_a_tile_share_one_and_depthwise_is_the_vector_units() -> None:
    assert conv(64, 64, groups=8).tiled_macs == 64 * 9 * 32 * 64
    assert conv(128, 128, groups=2).tiled_macs == 64 * 9 * 2 * 64 * 64
    assert conv(64, 64, groups=64).kind == "depthwise"
    assert conv(64, 64, groups=64).macs == 64 * 9 * 64


def test_a_transposed_convolution_multiplies_each_input_position() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    assert only(model([node], {"x": [1, 64, 8, 8]}, {"w": floats(64, 32, 2, 2)})).macs == 64 * 4 * 64 * 32


def test_products_of_activations_count_their_matrices() -> None:
    count = only(
        model([helper.make_node("MatMul", ["q", "k"], ["y"])], {"q": [1, 12, 50, 64], "k": [1, 12, 64, 50]}, {})
    )
    assert (count.kind, count.matrices, count.macs) == ("matmul", 12, 12 * 50 * 64 * 50)


def test_what_the_compiler_fuses_or_only_views_costs_nothing() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Unsqueeze", ["d", "axes"], ["y"]),
    ]
    constants = {"w": floats(16, 32), "b": floats(32), "axes": numpy_helper.from_array(np.array([0]))}
    assert [count.op for count in count_ops(model(nodes, {"x": [4, 16]}, constants))] == ["MatMul"]


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ([0, 2, 3, 1], []),
        ([0, 3, 1, 2], []),
        ([1, 0, 2, 3], []),
        ([0, 2, 1, 3], ["rows"]),
        ([0, 1, 3, 2], ["transpose"]),
    ],
)
def test_only_transposes_that_move_data_cost(order: list[int], kinds: list[str]) -> None:
    made = model([helper.make_node("Transpose", ["x"], ["y"], perm=order)], {"x": [1, 4, 8, 16]}, {})
    assert [count.kind for count in count_ops(made)] == kinds


@pytest.mark.parametrize("op", ["Gather", "GatherND"])
def test_a_gather_by_computed_indices_moves_its_whole_table(op: str) -> None:
    """A table of activations is laid out in rows first; constant indices are a slice, a constant table has no tiles."""
    index = numpy_helper.from_array(np.zeros((1, 1), np.int64))
    node = helper.make_node(op, ["x", "i"], ["y"])
    computed = only(model([node], {"x": [384, 100], "i": [1, 1]}, {}))
    sliced = only(model([node], {"x": [384, 100]}, {"i": index}))
    looked_up = only(model([node], {"i": [1, 1]}, {"x": floats(384, 100)}))
    assert (computed.kind, computed.written) == ("transpose", 384 * 100)
    assert (sliced.kind, sliced.written) == (looked_up.kind, looked_up.written) == ("copy", 100)


@pytest.mark.parametrize(("weight", "bits"), [(TensorProto.INT4, 4), (TensorProto.INT8, 8)])
@pytest.mark.parametrize(("activation", "wide"), [(TensorProto.UINT8, 8), (TensorProto.UINT16, 16)])
def test_widths_are_those_of_the_quantizers(weight: int, bits: int, activation: int, wide: int) -> None:
    count = only(quantized(weight, activation))
    assert (count.weight_bits, count.activation_bits, count.quantized) == (bits, wide, True)
    assert (count.weight_bytes, count.read_bytes) == (512 * 512 * bits / 8, 64 * 512 * wide / 8)
    assert count.macs == 64 * 512 * 512


def test_an_unknown_shape_is_named() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["y"]), helper.make_node("Cos", ["y"], ["z"])]
    with pytest.raises(TargetError, match="shape of"):
        count_ops(model(nodes, {"x": [4]}, {}))


def test_attention_that_does_not_fit_goes_through_the_memory() -> None:
    large = dataclasses.replace(MATMUL, written=10**8)
    assert demand(MATMUL, VTCM_MB)["ddr"] == 0
    assert demand(large, VTCM_MB)["ddr"] == pytest.approx(200)  # 10^8 elements of 16 bits, in MB
    assert demand(dataclasses.replace(large, matrices=1), VTCM_MB)["ddr"] == 0


def test_a_depthwise_convolution_pays_for_its_products_and_for_its_data() -> None:
    small = dataclasses.replace(MATMUL, kind="depthwise", matrices=1)
    large = dataclasses.replace(small, macs=4 * small.macs)
    assert demand(large, VTCM_MB)["depthwise_16"] == 4 * demand(small, VTCM_MB)["depthwise_16"]
    assert demand(large, VTCM_MB)["elementwise"] == demand(small, VTCM_MB)["elementwise"] > 0


def test_each_op_takes_time_to_start_however_little_it_does() -> None:
    idle = OpCount("idle", "Add", "elementwise", 0, 0, 0, 0, 0, quantized=True)
    made = estimate([idle] * 100, RATES, VTCM_MB)
    assert made.latency_ms - RATES["overhead"] == pytest.approx(100 / RATES["ops"])


def test_ops_and_overhead_add_up_to_the_latency() -> None:
    ops = [MATMUL, dataclasses.replace(MATMUL, kind="conv", weights=10**7), dataclasses.replace(MATMUL, kind="norm")]
    made = estimate(ops, RATES, VTCM_MB)
    assert sum(made.ops) + RATES["overhead"] == pytest.approx(made.latency_ms)
    assert max(made.units.values()) < made.latency_ms < RATES["overhead"] + sum(made.units.values())


def test_more_work_never_takes_less_time() -> None:
    base = estimate([MATMUL], RATES, VTCM_MB).latency_ms
    for field in ("tiled_macs", "read", "written", "weights", "activation_bits"):
        more = dataclasses.replace(MATMUL, **{field: 2 * getattr(MATMUL, field) + 1})
        assert estimate([more], RATES, VTCM_MB).latency_ms >= base, field
    assert estimate([MATMUL, MATMUL], RATES, VTCM_MB).latency_ms > base


def test_every_soc_is_known_and_newer_ones_are_faster() -> None:
    times = {}
    for part, known in known_models().items():
        assert find_soc(part).vtcm_mb == VTCM_MB
        assert all(math.isfinite(rate) and rate > 0 for rate in known.rates.values())
        assert 0 < known.median_error < known.p90_error
        times[part] = estimate([MATMUL], known.rates, VTCM_MB).latency_ms
    assert times["SM8850"] < times["SM8750"] < times["SM8650"]


def test_narrower_weights_and_activations_are_faster(tmp_path: Path) -> None:
    """At equal width of the others; a net that waits for its weights may gain more from the one, or from the other."""
    times = {}
    for activation in (TensorProto.UINT8, TensorProto.UINT16):
        for weight in (TensorProto.INT4, TensorProto.INT8):
            onnx.save(quantized(weight, activation), str(tmp_path / "model.onnx"))
            profile = parse_target("htp").estimate(tmp_path / "model.onnx")
            assert profile is not None and profile.latency_ms is not None
            times[weight, activation] = profile.latency_ms
    (w4a8, w8a8, w4a16, w8a16) = times.values()
    assert w4a8 < w8a8 < w8a16 and w4a8 < w4a16 < w8a16


def test_the_profile_is_labelled_and_tells_its_error() -> None:
    known = known_models()["SM8750"]
    profile = to_profile([MATMUL], estimate([MATMUL], known.rates, VTCM_MB), known)
    assert profile.source == "estimate" and profile.ops[0]["name"] == "scores"
    assert "not measured" in profile.notes[0] and f"{known.p90_error:.0%}" in profile.notes[0]


@pytest.mark.parametrize("text", ["htp{soc=sm8550}", "htp{performance-mode=balanced}", "onnxruntime"])
def test_what_was_not_measured_is_not_estimated(text: str, tmp_path: Path) -> None:
    onnx.save(quantized(TensorProto.INT8, TensorProto.UINT8), str(tmp_path / "model.onnx"))
    assert parse_target(text).estimate(tmp_path / "model.onnx") is None


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    """The fitting script, which is no part of the package."""
    pytest.importorskip("scipy")
    spec = importlib.util.spec_from_file_location("fit_cost_model", ROOT / "tools/fit_cost_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_shipped_rates_explain_latencies_of_public_models(fitting: ModuleType) -> None:
    """Milliseconds on a Galaxy S25 that Qualcomm publishes for its AI Hub models, v0.47.0."""
    published = {
        ("resnet50", "w8a8"): 0.532,
        ("unet_segmentation", "w8a8"): 21.942,
        ("bert_base_uncased_hf", "w8a16"): 7.296,
        ("stable_diffusion_v1_5/unet", "w8a16"): 60.021,
        ("stable_diffusion_v1_5/vae", "w8a16"): 177.163,
        ("whisper_small", "float"): 60.15,
    }
    for (name, precision), ms in published.items():
        made = fitting.latency_ms(fitting.amounts(name, *fitting.BITS[precision], precision != "float"), RATES)
        assert made == pytest.approx(ms, rel=0.3), name


def test_sana_is_ordered_by_its_widths(fitting: ModuleType) -> None:
    """The paper measured 66 ms at W4A8 and 95 ms at W4A16; the rates were not fitted to either."""
    widths = ((4, 8), (8, 8), (4, 16), (8, 16))
    times = [fitting.latency_ms(fitting.amounts("sana_600m", *pair, True), RATES) for pair in widths]
    assert times == sorted(times)
    assert times[0] == pytest.approx(66, rel=0.5) and times[2] == pytest.approx(95, rel=0.5)


def test_rows_whose_time_does_not_scale_are_told_apart(fitting: ModuleType) -> None:
    """By how they change from SoC to SoC, never by their error; what is small is mostly overhead."""

    def series(name: str, *times: float) -> list[Any]:
        return [
            fitting.Row(name, part, "float", "onnx", ms)
            for part, ms in zip(fitting.PARTS.values(), times, strict=False)
        ]

    stuck = series("segformer_base", 82.4, 74.1, 74.1)
    rows = stuck + series("vit", 7.2, 5.0, 3.7) + series("mobilenet_v2", 0.34, 0.30, 0.29) + series("bert", 9.0)
    assert fitting.unscaled(rows) == set(stuck)


def test_a_runtime_that_makes_a_graph_of_its_own_is_counted_by_it(fitting: ModuleType) -> None:
    """BERT's head has one row to do where the token is selected before it, 384 in ONNX Runtime."""
    rows = [fitting.Row("bert_base_uncased_hf", "SM8750", "float", runtime, 1.0) for runtime in ("qnn_dlc", "onnx")]
    selected, published = (fitting._amounts_of(row) for row in rows)
    head = 768 * 30522 / 1e9
    assert published["matrix_float"] - selected["matrix_float"] == pytest.approx(384 * head - head, rel=0.03)
    assert published["transpose_float"] > 2 * selected["transpose_float"]
    assert rows[0].family == rows[1].family == "BERT"


def test_only_rows_that_differ_in_nothing_but_precision_are_ordered(fitting: ModuleType) -> None:
    measured = [("w8a16", "onnx", 2.0), ("w8a8", "onnx", 1.0), ("float", "onnx", 3.0), ("w8a8", "tflite", 4.0)]
    rows = [fitting.Row("vit", "SM8750", *values) for values in measured]
    pairs = fitting.pairs_of_precisions([fitting.Error(row, row.ms) for row in rows])
    names = [tuple(error.row.precision for error in pair) for pair in pairs]
    assert names == [("w8a8", "w8a16"), ("w8a8", "float"), ("w8a16", "float")]


def test_the_fit_recovers_rates_from_latencies_that_follow_them(fitting: ModuleType) -> None:
    """On rows made by the model itself, the estimate for networks that were left out is right."""
    truth = fitting._CENTER + 0.5 * fitting._SPREAD * np.cos(np.arange(len(fitting._CENTER)))
    rows = [
        fitting.Row(name, part, precision, "qnn_dlc", 1.0)
        for name in ("resnet50", "vit", "mobilenet_v2", "segformer_base", "whisper_tiny", "depth_anything")
        for part in fitting.PARTS.values()
        for precision in fitting.BITS
    ]
    rows = [dataclasses.replace(row, ms=fitting._estimate(truth, row)) for row in rows]
    kept = [row for row in rows if row.model != "vit"]
    point = fitting.fit(kept)
    wrong = [fitting.Error(row, fitting._estimate(point, row)).relative for row in rows]
    prior = [fitting.Error(row, fitting._estimate(fitting._CENTER, row)).relative for row in rows]
    assert np.abs(wrong).max() < 0.1 < np.abs(prior).max()
