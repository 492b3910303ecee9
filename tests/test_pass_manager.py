"""Pipelines, records, failures and reproducers, with passes that change real graphs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import lazy_values
from fraqat_compiler.errors import PassError, QuantizationError, UsageError, VerificationError
from fraqat_compiler.fx_io import load_inputs
from fraqat_compiler.instruments import Instrument
from fraqat_compiler.ir_text import listing
from fraqat_compiler.pass_base import IR, FxPass, OnnxPass, Pass, PassContext, PassResult
from fraqat_compiler.pass_manager import PassManager, node_count
from fraqat_compiler.registry import parse_target
from fraqat_compiler.reproducer import Snapshot, load_model, write_reproducer


@dataclass(frozen=True)
class DropRelu(FxPass):
    """Remove every ReLU, and fail afterwards when asked to."""

    name: ClassVar[str] = "drop-relu"
    fail: bool = False

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        nodes = model.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
        model.recompile()
        if self.fail:
            raise QuantizationError("a tensor has no range.", "Calibrate first.")
        return PassResult(model, bool(nodes), tuple(f"removed {node.name}" for node in nodes))


@dataclass(frozen=True)
class ToOnnx(Pass):
    """An ONNX graph of one Relu, whatever comes in."""

    name: ClassVar[str] = "to-onnx"
    reads: ClassVar[IR] = "fx"
    writes: ClassVar[IR] = "onnx"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        return PassResult(relu_graph(), modified=True)


@dataclass(frozen=True)
class DoubleRelu(OnnxPass):
    """Put a second Relu behind the first, or fail."""

    name: ClassVar[str] = "double-relu"
    fail: bool = False

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        (output,) = model.outputs
        model.outputs = [gs.Variable("z", np.float32, [1, 2])]
        model.nodes.append(gs.Node("Relu", "second", inputs=[output], outputs=model.outputs))
        if self.fail:
            raise PassError("no room.")
        return PassResult(model, modified=True, changes=("added second",))


@dataclass(frozen=True)
class Liar(FxPass):
    """Return what is no result, or no FX graph."""

    name: ClassVar[str] = "liar"
    result: str = "none"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        if self.result == "none":
            return None  # type: ignore[return-value]
        return PassResult(relu_graph(), modified=True)


class Recorder(Instrument):
    def __init__(self, calls: list[tuple[str, int]] | None = None) -> None:
        self.calls = [] if calls is None else calls

    def before_pass(self, step: Pass, model: Any) -> None:
        self.calls.append((f"before {step.name}", node_count(model)))

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        self.calls.append((f"after {step.name}", node_count(result.model)))


def relu_graph() -> gs.Graph:
    x, y = (gs.Variable(name, np.float32, [1, 2]) for name in "xy")
    return gs.Graph([gs.Node("Relu", "first", inputs=[x], outputs=[y])], [x], [y], opset=21)


@pytest.fixture
def graph() -> GraphModule:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    return torch.export.export(model, (torch.randn(1, 2),)).run_decompositions({}).module(check_guards=False)


def test_text_and_pipeline_are_the_same_thing() -> None:
    text = "remove-no-ops,fold-constants{max-elements=9},fold-batch-norm"
    pipeline = PassManager.from_text(text)
    assert [type(step).__name__ for step in pipeline.passes] == ["RemoveNoOps", "FoldConstants", "FoldBatchNorm"]
    assert str(pipeline) == text
    assert PassManager.from_text(str(pipeline)) == pipeline
    assert PassManager.from_text("") == PassManager(())


def test_neighbours_must_speak_the_same_ir() -> None:
    PassManager((DropRelu(), ToOnnx(), DoubleRelu()))
    for wrong in itertools.permutations((DropRelu(), ToOnnx(), DoubleRelu())):
        if [step.name for step in wrong] != ["drop-relu", "to-onnx", "double-relu"]:
            with pytest.raises(UsageError, match=r'"[a-z-]+" reads (fx|onnx) but "[a-z-]+" before it writes'):
                PassManager(wrong)


def test_records_tell_what_each_pass_did(graph: GraphModule) -> None:
    before = node_count(graph)
    model, records = PassManager((DropRelu(), DropRelu(fail=False), ToOnnx(), DoubleRelu())).run(graph)
    assert isinstance(model, gs.Graph)
    first, again, export, double = records
    assert (first.name, first.text, first.modified, first.changes) == (
        "drop-relu",
        "drop-relu",
        True,
        ("removed relu",),
    )
    assert (first.nodes_before, first.nodes_after) == (before, before - 1)
    assert (again.modified, again.changes, again.nodes_after) == (False, (), before - 1)
    assert (export.nodes_before, export.nodes_after) == (before - 1, 1)
    assert double.to_json() == {
        "name": "double-relu",
        "text": "double-relu",
        "seconds": double.seconds,
        "nodes_before": 1,
        "nodes_after": 2,
        "modified": True,
        "changes": ["added second"],
    }
    assert all(record.seconds > 0 for record in records)


def test_instruments_are_called_around_every_pass(graph: GraphModule) -> None:
    recorder, before = Recorder(), node_count(graph)
    PassManager((DropRelu(), ToOnnx())).run(graph, instruments=[recorder])
    assert recorder.calls == [
        ("before drop-relu", before),
        ("after drop-relu", before - 1),
        ("before to-onnx", before - 1),
        ("after to-onnx", 1),
    ]


def test_instruments_are_nested(graph: GraphModule) -> None:
    class Inner(Recorder):
        def before_pass(self, step: Pass, model: Any) -> None:
            self.calls.append(("inner before", 0))

        def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
            self.calls.append(("inner after", 0))

    outer = Recorder()
    PassManager((DropRelu(),)).run(graph, instruments=[outer, Inner(outer.calls)])
    assert [name for name, _ in outer.calls] == ["before drop-relu", "inner before", "inner after", "after drop-relu"]


def test_the_wrong_kind_of_model_is_refused(graph: GraphModule) -> None:
    with pytest.raises(UsageError, match='"double-relu" reads onnx, not a'):
        PassManager((DoubleRelu(),)).run(graph)
    with pytest.raises(PassError, match='"liar" returned NoneType'):
        PassManager((Liar(),)).run(graph)
    with pytest.raises(PassError, match='"liar" writes fx but returned a Graph'):
        PassManager((Liar("onnx"),)).run(graph)


def test_an_error_keeps_its_type_and_gets_notes(graph: GraphModule) -> None:
    with pytest.raises(QuantizationError) as caught:
        PassManager((DropRelu(), DropRelu(fail=True), ToOnnx())).run(graph)
    assert str(caught.value) == "a tensor has no range. Calibrate first."
    assert caught.value.__notes__ == [
        "in pass 2 of 3: drop-relu{fail=true}",
        "pipeline: drop-relu,drop-relu{fail=true},to-onnx",
    ]


def test_a_failed_fx_pass_leaves_its_input_graph(graph: GraphModule, tmp_path: Path) -> None:
    inputs = torch.randn(1, 2)
    expected = graph(inputs)
    ctx = PassContext(target=parse_target("onnxruntime"), example_inputs=((inputs,), {}))
    folder = tmp_path / "out" / "reproducer"
    with pytest.raises(QuantizationError) as caught:
        PassManager((DropRelu(fail=True), ToOnnx())).run(graph, ctx, reproducer=folder)
    assert caught.value.__notes__[-1] == f"reproducer: {folder} (its README.md has the command)"
    assert (folder / "pipeline.txt").read_text() == "drop-relu{fail=true},to-onnx\n"
    assert "QuantizationError: a tensor has no range" in (folder / "error.txt").read_text()
    assert "fraqat opt . -p 'drop-relu{fail=true},to-onnx' --target onnxruntime" in (folder / "README.md").read_text()
    loaded, loaded_inputs = load_model(folder), load_inputs(folder)
    assert isinstance(loaded, GraphModule) and loaded_inputs is not None
    assert torch.equal(loaded(*loaded_inputs[0]), expected)
    with pytest.raises(QuantizationError):
        PassManager((DropRelu(fail=True),)).run(loaded)
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_a_failed_onnx_pass_leaves_its_input_graph(tmp_path: Path) -> None:
    folder = tmp_path / "reproducer"
    for _ in range(2):  # the second replaces the first
        with pytest.raises(PassError):
            PassManager((DoubleRelu(), DoubleRelu(fail=True))).run(relu_graph(), reproducer=folder)
    loaded = load_model(folder)
    assert isinstance(loaded, gs.Graph)
    assert [node.name for node in loaded.nodes] == ["first", "second"]
    assert [tensor.name for tensor in loaded.outputs] == ["z"]


def test_a_stored_onnx_graph_keeps_packed_weights_and_shapes(tmp_path: Path) -> None:
    graph = relu_graph()
    codes, scale = np.array([[-8, 7, 3]], ml_dtypes.int4), np.array(0.5, np.float32)
    weight, y = gs.Variable("weight", np.float32, [1, 3]), graph.outputs[0]
    inputs = [lazy_values.constant("codes", codes), lazy_values.constant("scale", scale)]
    graph.outputs = [gs.Variable("z", np.float32, [2, 3])]
    graph.nodes.append(gs.Node("DequantizeLinear", "dequantize", inputs=inputs, outputs=[weight]))
    graph.nodes.append(gs.Node("Concat", "join", {"axis": 1}, [y, weight], graph.outputs))
    write_reproducer(tmp_path / "r", Snapshot.take(graph), "pack-int4", PassContext(), ValueError("x"))
    loaded = load_model(tmp_path / "r")
    assert np.array_equal(lazy_values.values_of(loaded.tensors()["codes"]), codes)
    assert listing(loaded) == listing(graph)


def test_an_instrument_that_fails_is_reported_like_a_pass(graph: GraphModule, tmp_path: Path) -> None:
    class Refusing(Instrument):
        def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        PassManager((DropRelu(),)).run(graph, instruments=[Refusing()], reproducer=tmp_path / "r")
    assert caught.value.__notes__[0] == "in pass 1 of 1: drop-relu"
    assert any("relu" in node.name for node in load_model(tmp_path / "r").graph.nodes)


def test_a_success_leaves_no_reproducer(graph: GraphModule, tmp_path: Path) -> None:
    PassManager((DropRelu(),)).run(graph, reproducer=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_kept_and_the_error_stays(graph: GraphModule, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(QuantizationError) as caught:
        PassManager((DropRelu(fail=True),)).run(graph, reproducer=tmp_path / "photos")
    assert "no reproducer was written: OutputError" in caught.value.__notes__[-1]
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_a_graph_that_cannot_be_stored_is_said_so(graph: GraphModule, tmp_path: Path) -> None:
    graph.add_submodule("act", nn.GELU())
    relu = next(iter(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)))
    relu.op, relu.target = "call_module", "act"
    note = write_reproducer(tmp_path / "r", Snapshot.take(graph), "drop-relu", PassContext(), ValueError("x"))
    assert "no reproducer was written" in note and "'act'" in note


def test_what_holds_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_model(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="holds no graph"):
        load_model(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(VerificationError, match=r"bad\.onnx cannot be read"):
        load_model(tmp_path / "bad.onnx")
