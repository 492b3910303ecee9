"""The small model that conformance is tried on, lowered as the target itself asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.target import Arrays, Target

INPUT_SHAPE = (1, 3, 8, 8)
SAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A model with what it must compute.

    Attributes:
        model: the ONNX file, with QDQ as the target's `quant_spec` asks.
        inputs: several inputs, by name.
        outputs: for each input what ONNX Runtime computes on the CPU without optimizations.
        scales: step of each output's quantizer; None for a float output.
    """

    model: Path
    inputs: tuple[Arrays, ...]
    outputs: tuple[Arrays, ...]
    scales: Mapping[str, float | None]


def make_case(target: Target, folder: Path, weights: str = "4", activations: str = "8") -> Case:
    """Bring a network of convolution, ReLU, Flatten and two linear layers through the target's pipelines.

    Raises:
        FraqatError: a pipeline of the target does not parse, or fails.
    """
    network, samples = _network()
    context = PassContext(target=target, example_inputs=((samples[0],), {}), work_dir=folder)
    insert = f"insert-fake-quant{{weights={weights} activations={activations}}}"
    prepare = PassManager.from_text(f"{target.prepare_pipeline()},{insert}")
    student = prepare.run(capture(network, (samples[0],)), context).model
    calibrate(student, [(sample,) for sample in samples])
    graph = PassManager.from_text(target.lower_pipeline()).run(student, context).model
    model = folder / "model.onnx"
    onnx_io.save(graph, model)
    onnx_io.verify(model)
    inputs = tuple({graph.inputs[0].name: sample.numpy()} for sample in samples)
    runner = parity.onnx_runner(model, optimized=False)
    names = [output.name for output in graph.outputs]
    scales = dict(zip(names, parity.output_scales(student), strict=True))
    return Case(model, inputs, tuple(runner(feeds) for feeds in inputs), scales)


def _network() -> tuple[nn.Module, list[Tensor]]:
    """The network and its inputs, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 4)
        )
        samples = [torch.randn(INPUT_SHAPE) for _ in range(SAMPLES)]
    return network.eval(), samples
