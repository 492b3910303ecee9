"""What the tests of the ONNX passes share: frozen graphs, lowered ones, and running them for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.ir_verify import verify_onnx
from fraqat_compiler.parity import Parity
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.targets.htp import HtpTarget

PREPARE = "remove-no-ops,fold-batch-norm,decompose-attention"
EXPORT = "freeze-bit-width,export-onnx"
LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants,pack-int4"


class Applied(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def fake_quantized(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any
) -> GraphModule:
    """The captured model with calibrated fake quants."""
    graph = PassManager.from_text(PREPARE).run(capture(model.eval(), args, kwargs)).model
    graph = InsertFakeQuant(**options).run(graph, PassContext()).model
    calibrate(graph, [kwargs or args])
    return graph


def lowered(graph: GraphModule, pipeline: str = LOWER) -> gs.Graph:
    """The ONNX graph that a pipeline makes, verified."""
    result: gs.Graph = PassManager.from_text(pipeline).run(graph).model
    verify_onnx(result)
    return result


def run_onnx(graph: gs.Graph, tensors: list[torch.Tensor], folder: Path) -> list[np.ndarray]:
    """Outputs of a graph, computed by onnxruntime from a saved and verified file without any optimization."""
    path = folder / "model.onnx"
    onnx_io.save(graph, path)
    feeds = parity.name_arrays([tensor.name for tensor in graph.inputs], tensors)
    return list(parity.onnx_runner(path, optimized=False)(feeds).values())


def distance(graph: GraphModule, onnx_graph: gs.Graph, args: tuple[Any, ...], folder: Path) -> float:
    """Greatest distance between the fake-quantized torch graph and onnxruntime, in steps of the output's quantizer."""
    with torch.no_grad():
        expected = parity.flat_inputs(graph(*args))
    actual = run_onnx(onnx_graph, parity.flat_inputs(args), folder)
    scales = parity.output_scales(graph)
    pairs = zip(expected, actual, scales, strict=True)
    return max(float(np.abs(one.numpy() - other).max() / scale) for one, other, scale in pairs if scale)


def htp_parity(
    model: nn.Module,
    x: torch.Tensor,
    activations: int,
    folder: Path,
    target: HtpTarget | None = None,
    weights: int = 8,
) -> Parity:
    """The HTP library's emulator against onnxruntime, on the file that the htp target lowers a model to."""
    target = target or HtpTarget()
    ctx = PassContext(target=target, example_inputs=((x,), {}))
    text = f"{target.prepare_pipeline()},insert-fake-quant{{weights={weights} activations={activations}}}"
    graph = PassManager.from_text(text).run(capture(model.eval(), (x,)), ctx).model
    calibrate(graph, [(x,)])
    path = folder / "model.onnx"
    lowered_graph: gs.Graph = PassManager.from_text(target.lower_pipeline()).run(graph, ctx).model
    onnx_io.save(lowered_graph, path)
    onnx_io.verify(path)
    feeds = {lowered_graph.inputs[0].name: x.numpy()}
    expected = parity.onnx_runner(path, optimized=False)(feeds)
    actual = target.run(target.compile(path, folder), feeds)
    return parity.compare([expected], [actual], dict(zip(expected, parity.output_scales(graph), strict=True)))


def ops(graph: gs.Graph) -> list[str]:
    """Op types in the order of the graph."""
    return [node.op for node in graph.nodes]


def constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    """Constants by name."""
    return {name: tensor for name, tensor in graph.tensors().items() if isinstance(tensor, gs.Constant)}
