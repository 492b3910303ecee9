from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx_graphsurgeon.ir.tensor import LazyValues
from rich.console import Console
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import lazy_values
from fraqat_compiler.errors import VerificationError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.instruments import IRDump, Progress, Timing, Verification
from fraqat_compiler.ir_text import listing
from fraqat_compiler.ir_verify import verify
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.quant_spec import QuantSpec


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.proj(self.drop(x)).split([1, 2], dim=1)
        return low.relu(), torch.cat([high, high], dim=1)


@pytest.fixture
def graph() -> GraphModule:
    program = torch.export.export(Network().eval(), (torch.randn(2, 4),))
    return program.run_decompositions({}).module(check_guards=False)


@pytest.fixture
def onnx_graph() -> gs.Graph:
    """x -> Gemm(large weight, small bias) -> Relu -> y."""
    x, hidden, y = (gs.Variable(name, np.float32, [2, 64]) for name in ("x", "hidden", "y"))
    weight = gs.Constant("weight", np.zeros((64, 64), np.float32))
    bias = gs.Constant("bias", np.float32([0.5]))
    gemm = gs.Node("Gemm", "proj/Gemm", {"transB": 1}, [x, weight, bias], [hidden])
    return gs.Graph([gemm, gs.Node("Relu", "proj/Relu", inputs=[hidden], outputs=[y])], [x], [y], opset=21)


def text_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, markup=False, highlight=False, soft_wrap=True), stream


# --- text ---------------------------------------------------------------------------------------------------------


def test_an_fx_listing_shows_ops_shapes_and_module_paths(graph: GraphModule) -> None:
    lines = listing(graph).splitlines()
    assert "%proj_weight : float32[3, 4] = weight proj.weight" in lines
    assert "%x : float32[2, 4] = input x" in lines
    (linear,) = (line for line in lines if line.startswith("%linear "))
    assert linear.startswith("%linear : float32[2, 3] = aten.linear.default(%")
    assert linear.endswith("%proj_weight, %proj_bias)  # proj")
    assert any(line.startswith("%getitem : float32[2, 1] = _operator.getitem(%split") for line in lines)
    assert lines[-1] == "return [%relu, %cat]"


def test_an_fx_listing_shows_how_a_fake_quant_module_quantizes(graph: GraphModule) -> None:
    weight = next(node for node in graph.graph.nodes if node.target == "proj.weight")
    graph.add_submodule("quantizers.w", WeightFakeQuantize(QuantSpec(4.5, axis=0), "weight", (3,)))
    with graph.graph.inserting_after(weight):
        graph.graph.call_module("quantizers.w", (weight,))
    assert "quantizers.w<WeightFakeQuantize: weight, 4.5 bits, symmetric, per-channel>(%proj_weight)" in listing(graph)


def test_an_onnx_listing_shows_types_attributes_and_small_constants(onnx_graph: gs.Graph) -> None:
    assert listing(onnx_graph).splitlines() == [
        "%x : float32[2, 64] = input",
        "%weight : float32[64, 64] = constant",
        "%bias : float32[1] = constant [0.5]",
        "%hidden : float32[2, 64] = Gemm(%x, %weight, %bias) {transB=1}  # proj/Gemm",
        "%y : float32[2, 64] = Relu(%hidden)  # proj/Relu",
        "return %y",
    ]


def test_dumps_are_printed_where_asked(graph: GraphModule) -> None:
    pipeline = PassManager.from_text("remove-no-ops,fold-batch-norm")
    for options, expected in [
        ({"before": ["fold-batch-norm"]}, ["before fold-batch-norm"]),
        ({"after": ["remove-no-ops"]}, ["after remove-no-ops"]),
        ({"after_change": True}, ["after remove-no-ops"]),
        ({"after_all": True}, ["after remove-no-ops", "after fold-batch-norm"]),
        ({}, []),
    ]:
        console, stream = text_console()
        pipeline.run(*copies(graph), instruments=[IRDump(**options, console=console)])
        titles = [line for line in stream.getvalue().splitlines() if line.startswith("//")]
        assert titles == [f"// ----- IR {title} -----" for title in expected]
        assert ("aten.linear.default" in stream.getvalue()) == bool(expected)


def copies(graph: GraphModule) -> tuple[GraphModule]:
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied._codegen = graph.graph._codegen
    return (GraphModule(graph, copied),)


def test_a_dump_folder_holds_the_input_and_every_pass(graph: GraphModule, tmp_path: Path) -> None:
    before = listing(graph)
    PassManager.from_text("remove-no-ops,fold-batch-norm").run(graph, instruments=[IRDump(folder=tmp_path / "ir")])
    files = sorted((tmp_path / "ir").iterdir())
    assert [file.name for file in files] == ["00-input.txt", "01-remove-no-ops.txt", "02-fold-batch-norm.txt"]
    assert files[0].read_text() == before
    assert files[2].read_text() == listing(graph) != before


def test_timing_and_progress_name_every_pass(graph: GraphModule) -> None:
    timing, (console, stream) = Timing(), text_console()
    PassManager.from_text("remove-no-ops,fold-constants{max-elements=5}").run(
        graph, instruments=[Progress(console), timing]
    )
    assert [name for name, _ in timing.seconds] == ["remove-no-ops", "fold-constants"]
    assert "pass fold-constants{max-elements=5}\n" in stream.getvalue()
    console.print(timing.table())
    assert "remove-no-ops" in stream.getvalue() and "100%" not in stream.getvalue().partition("remove-no-ops")[0]


def test_an_empty_timing_still_makes_a_table() -> None:
    console, stream = text_console()
    console.print(Timing().table())
    assert "total" in stream.getvalue()


# --- verification of FX graphs ------------------------------------------------------------------------------------


def find(graph: GraphModule, name: str) -> torch.fx.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def use_before_definition(graph: GraphModule) -> None:
    find(graph, "x").prepend(find(graph, "relu"))


def read_nothing(graph: GraphModule) -> None:
    find(graph, "proj_weight").target = "proj.gone"


def read_a_module(graph: GraphModule) -> None:
    find(graph, "proj_weight").target = "proj"


def record_another_shape(graph: GraphModule) -> None:
    find(graph, "relu").meta["val"] = find(graph, "x").meta["val"]


def replace_a_weight(graph: GraphModule) -> None:
    graph.proj.weight = nn.Parameter(torch.zeros(5, 4))


def swap_arguments(graph: GraphModule) -> None:
    linear = find(graph, "linear")
    linear.args = (linear.args[1], linear.args[0], linear.args[2])


def lose_the_output(graph: GraphModule) -> None:
    graph.graph.erase_node(find(graph, "output"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (use_before_definition, "used before it has been defined"),
        (read_nothing, "nonexistent attribute"),
        (read_a_module, "node proj_weight reads proj, which is a Module"),
        (record_another_shape, r"node relu records float32\[2, 4\] but its result is float32\[2, 1\]"),
        (replace_a_weight, r"records float32\[3, 4\] but the tensor proj.weight is float32\[5, 4\]"),
        (swap_arguments, r"node linear \(aten.linear.default\) refuses its inputs"),
        (lose_the_output, "does not end with its one output"),
    ],
)
def test_a_malformed_fx_graph_is_named(damage: Callable[[GraphModule], None], words: str, graph: GraphModule) -> None:
    verify(graph)
    damage(graph)
    with pytest.raises(VerificationError, match=words):
        verify(graph)


def test_what_depends_on_data_is_left_alone() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero() * 2

    program = torch.export.export(Nonzero(), (torch.tensor([0.0, 1.0]),))
    verify(program.run_decompositions({}).module(check_guards=False))


# --- verification of ONNX graphs ----------------------------------------------------------------------------------


def make_cycle(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]


def repeat_a_name(graph: gs.Graph) -> None:
    graph.nodes[1].name = graph.nodes[0].name


def produce_twice(graph: gs.Graph) -> None:
    graph.nodes[0].outputs[0].name = "y"


def read_what_nobody_makes(graph: gs.Graph) -> None:
    graph.nodes[1].inputs[0] = gs.Variable("ghost", np.float32, [2, 64])


def lose_a_producer(graph: gs.Graph) -> None:
    graph.nodes.pop()


def misspell_an_op(graph: gs.Graph) -> None:
    graph.nodes[1].op = "Rellu"


def break_a_shape(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[1] = gs.Constant("weight", np.zeros((64, 65), np.float32))


def break_a_type(graph: gs.Graph) -> None:
    graph.outputs[0].dtype = np.dtype(np.int64)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (make_cycle, "cycle: proj/(Gemm -> proj/Relu|Relu -> proj/Gemm)"),
        (repeat_a_name, "node name 'proj/Gemm' is defined more than once"),
        (produce_twice, "tensor 'y' is defined more than once"),
        (read_what_nobody_makes, "proj/Relu .Relu. reads 'ghost', which nothing produces"),
        (lose_a_producer, "the output 'y' is produced by nothing"),
        (misspell_an_op, "checker refuses the graph: .*Rellu"),
        (break_a_shape, "checker refuses the graph"),
        (break_a_type, "checker refuses the graph"),
    ],
)
def test_a_malformed_onnx_graph_is_named(damage: Callable[[gs.Graph], None], words: str, onnx_graph: gs.Graph) -> None:
    verify(onnx_graph)
    damage(onnx_graph)
    with pytest.raises(VerificationError, match=f"(?s){words}"):
        verify(onnx_graph)


def test_watching_leaves_an_onnx_graph_as_it_was(onnx_graph: gs.Graph) -> None:
    onnx_graph.nodes.reverse()  # unsorted is fine for graphsurgeon
    onnx_graph.nodes[1].inputs[2] = lazy_values.constant("lazy", np.float32([0.25]))
    before = listing(onnx_graph)
    assert "%lazy : float32[1] = constant [0.25]" in before
    verify(onnx_graph)
    assert listing(onnx_graph) == before
    assert isinstance(onnx_graph.nodes[1].inputs[2]._values, lazy_values.LazyArray)  # not computed for good


def test_custom_domains_and_packed_weights_are_accepted(onnx_graph: gs.Graph) -> None:
    codes = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [64, 64], b"\x11" * 2048, raw=True)
    graph = gs.import_onnx(gs.export_onnx(onnx_graph))
    scale, table = gs.Constant("scale", np.array(0.5, np.float32)), gs.Variable("table", np.float32, [64, 64])
    packed = gs.Constant("codes", LazyValues(codes))
    graph.nodes.append(gs.Node("DequantizeLinear", "dequantize", inputs=[packed, scale], outputs=[table]))
    graph.nodes[0].inputs[1] = table
    verify(graph)
    assert "%codes : int4[64, 64] = constant\n" in listing(graph)
    graph.nodes[1].op, graph.nodes[1].domain = "Custom", "acme"
    verify(graph)
    assert "= acme::Custom(%hidden)" in listing(graph)


# --- the instrument -----------------------------------------------------------------------------------------------


def test_verification_runs_before_the_first_and_after_every_pass(graph: GraphModule) -> None:
    (good,) = copies(graph)
    PassManager.from_text("remove-no-ops").run(good, instruments=[Verification()])
    record_another_shape(graph)
    with pytest.raises(VerificationError, match="node relu records"):
        PassManager.from_text("remove-no-ops").run(graph, instruments=[Verification()])


@dataclass(frozen=True)
class Secretive(FxPass):
    """Negate the input of every ReLU and keep quiet about it."""

    name: ClassVar[str] = "secretive"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        for node in model.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.neg.default
        return PassResult(model, modified=False)


def test_a_pass_that_hides_its_change_is_found(graph: GraphModule) -> None:
    with pytest.raises(VerificationError, match='"secretive" changed the graph but says that it did not'):
        PassManager((Secretive(),)).run(graph, instruments=[Verification()])
    PassManager((Secretive(),)).run(graph, instruments=[Verification()])  # no ReLU is left to change
