"""split-low-rank: the same function, a smaller rest, and a branch that keeps its own width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fraqat_compiler
from fraqat_compiler import Job
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.ops import module_path
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.passes.split_low_rank import SplitLowRank
from fraqat_compiler.pipeline_text import to_text


class Net(nn.Module):
    """Two linears with a few large directions, one too small for a branch, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False))
        self.small = nn.Linear(32, 2)
        self.tied = nn.Linear(32, 32)
        with torch.no_grad():
            for layer in (self.block[0], self.block[2]):
                strong = torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
                layer.weight.add_(strong * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.small(self.tied(y) + self.tied(x))


def _graph() -> tuple[GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    return capture(Net(), (x,)), x


def test_the_branch_and_the_rest_are_the_weight() -> None:
    graph, x = _graph()
    expected, weight = graph(x), graph.get_parameter("block.0.weight").detach().clone()
    result = SplitLowRank(rank=2).run(graph, PassContext())
    assert result.modified
    assert [change.split(":")[0] for change in result.changes] == ["block.0.weight", "block.2.weight"]
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)
    down, up = (graph.get_parameter(f"block.0.low_rank.{name}") for name in ("down", "up"))
    assert (down.shape, up.shape) == ((2, 32), (48, 2))
    rest = graph.get_parameter("block.0.weight")
    torch.testing.assert_close(rest + up @ down, weight, rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.matrix_norm(rest, 2), values[2], rtol=1e-3, atol=1e-5)
    assert values[2] < 0.2 * values[1]


def test_the_branch_is_a_module_inside_the_linear() -> None:
    graph, _ = _graph()
    SplitLowRank(rank=2).run(graph, PassContext())
    paths = {module_path(node) for node in graph.graph.nodes}
    assert {"block.0", "block.0.low_rank", "block.2.low_rank"} <= paths


@pytest.mark.parametrize("options", [SplitLowRank(rank=20), SplitLowRank(rank=2, skip="block")], ids=to_text)
def test_nothing_is_done_where_nothing_is_gained(options: SplitLowRank) -> None:
    graph, _ = _graph()
    before = str(graph.graph)
    assert not options.run(graph, PassContext()).modified
    assert str(graph.graph) == before


def test_it_is_done_once() -> None:
    graph, x = _graph()
    SplitLowRank(rank=2).run(graph, PassContext())
    expected = graph(x)
    assert not SplitLowRank(rank=2).run(graph, PassContext()).modified
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="rank 0"):
        SplitLowRank(rank=0)


def test_compiled_the_branch_has_8_bits_and_the_error_of_4_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, probe = Net().eval(), torch.randn(16, 32)
    job = Job(
        "net",
        lambda: model,
        lambda: (torch.zeros(16, 32),),
        calibration_data=lambda: [(probe,)],
        evaluate=lambda run: {"error": float((run(probe) - model(probe)).detach().square().mean())},
    )
    options: dict[str, Any] = {"weights": "4,tied=8,small=8", "activations": "16", "steps": 0}
    reports = [
        fraqat_compiler.compile(job, output=tmp_path / name, recipe=recipe, **options).report
        for name, recipe in (("plain", ""), ("split", "split-low-rank{rank=4}"))
    ]
    errors = [report["metrics"]["quantized"]["error"] for report in reports]
    assert errors[1] < 0.7 * errors[0]
    bits = {layer["name"]: layer["weight_bits"] for layer in reports[1]["layers"]}
    assert (bits["block.0"], bits["block.0.low_rank"]) == (4, 8)
    assert reports[1]["parity"]["onnx_unoptimized"]["max_lsb"] <= 1
    assert reports[1]["pipeline"].count("split-low-rank{rank=4}") == 1


def test_a_branch_of_wider_activations_leaves_its_layers_input_alone() -> None:
    """As SVDQuant has it: 16 bits within the branch, 8 into it and around it."""
    graph, _ = _graph()
    SplitLowRank(rank=2).run(graph, PassContext())
    student = InsertFakeQuant(activations="8,*low_rank=16").run(graph, PassContext()).model
    widths = {
        (module_path(node), node.args[0].name): student.get_submodule(str(node.target)).spec.bit_width
        for node in student.graph.nodes
        if node.op == "call_module" and isinstance(student.get_submodule(str(node.target)), ActivationFakeQuantize)
    }
    inside = [width for (path, _), width in widths.items() if path.endswith("low_rank")]
    around = [width for (path, _), width in widths.items() if not path.endswith("low_rank")]
    assert inside == [16] * 4 and around and set(around) == {8}
