"""The toolkits that `benchmark_train_step.py` compares, one builder each.

A builder takes a float model and example inputs and returns the same model with weights fake-quantized to 4 bits per
channel and activations to 8 bits per tensor, calibrated and ready to train, by the toolkit's own public API.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

Builder = Callable[[nn.Module, Tensor], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: shown in the table.
        package: distribution that must be installed; None for what torch alone does.
        quantizes: which tensors, since the toolkits differ.
        build: makes the trainable model; it may change the model it is given.
    """

    name: str
    package: str | None
    quantizes: str
    build: Builder

    def missing(self) -> bool:
        """Whether the package is not installed."""
        if self.package is None:
            return False
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(self.package)
            return False
        return True

    def title(self) -> str:
        """Name with the version that is measured."""
        if self.package is None or self.missing():
            return self.name
        return f"{self.name} {metadata.version(self.package)}"

    def make(self, model: nn.Module, example: Tensor) -> nn.Module:
        """Build on a copy of `model`; what the toolkit prints and warns of is swallowed."""
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build(copy.deepcopy(model), example)


def float_model(model: nn.Module, example: Tensor) -> nn.Module:
    """The yardstick: the model as it is."""
    return model


def fraqat(model: nn.Module, example: Tensor) -> nn.Module:
    """Capture, insert and calibrate as `fraqat compile` does."""
    from fraqat_compiler.calibration import calibrate
    from fraqat_compiler.capture import capture
    from fraqat_compiler.pass_manager import PassManager

    insert = PassManager.from_text("insert-fake-quant{weights=4 activations=8}")
    graph: torch.fx.GraphModule = insert.run(capture(model, (example,))).model
    calibrate(graph, [(example,)])
    return graph


class _NaiveLinear(nn.Linear):
    """Linear with the textbook straight-through estimator, `x + (quantized(x) - x).detach()`."""

    activation_scale: float

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear gives it)
        weight_scale = self.weight.detach().abs().amax(1, keepdim=True) / 7
        weight = _straight_through(self.weight, weight_scale, 8)
        activation = _straight_through(input, torch.tensor(self.activation_scale), 128)
        return nn.functional.linear(activation, weight, self.bias)


def _straight_through(x: Tensor, scale: Tensor, half: int) -> Tensor:
    return x + ((x / scale).round().clamp(-half, half - 1) * scale - x).detach()


def naive(model: nn.Module, example: Tensor) -> nn.Module:
    """What one would write by hand in an hour."""

    def calibrate(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.__class__ = _NaiveLinear
        module.activation_scale = float(inputs[0].abs().amax()) / 127  # type: ignore[assignment]

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(calibrate) for module in linears]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return model


def modelopt(model: nn.Module, example: Tensor) -> nn.Module:
    """NVIDIA ModelOpt, the Linear layers only."""
    import modelopt.torch.quantization as mtq

    config = {
        "quant_cfg": {
            "default": {"enable": False},
            "*weight_quantizer": {"num_bits": 4, "axis": 0},
            "*input_quantizer": {"num_bits": 8, "axis": None},
            "*norm*": {"enable": False},
        },
        "algorithm": "max",
    }
    quantized: nn.Module = mtq.quantize(model, config, lambda model: model(example))
    return quantized


def torchao(model: nn.Module, example: Tensor) -> nn.Module:
    """PyTorch's torchao; its activations can only be per token and dynamic."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel")  # type: ignore[attr-defined]
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return model


def aimet(model: nn.Module, example: Tensor) -> nn.Module:
    """Qualcomm AIMET with its own configuration for HTP v79, which quantizes every op's output."""
    with _torchvision_without_its_library():
        from aimet_torch.common import quantsim_config
        from aimet_torch.quantsim import QuantizationSimModel

        folder = Path(str(quantsim_config.__file__)).parent
        config = str(folder / "htp_quantsim_config_v79_per_channel_linear.json")
        sim = QuantizationSimModel(model, example, default_param_bw=4, default_output_bw=8, config_file=config)
    sim.compute_encodings(lambda model: model(example))
    quantized: nn.Module = sim.model
    return quantized


@contextlib.contextmanager
def _torchvision_without_its_library() -> Iterator[None]:
    """AIMET imports torchvision, whose C++ library does not load beside a CPU-only torch; its Python part suffices."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)
    yield


def brevitas(model: nn.Module, example: Tensor) -> nn.Module:
    """Brevitas, the Linear layers only; calibrated, so that no step collects statistics."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": 4,
        "input_quant": Int8ActPerTensorFloat,
        "return_quant_tensor": False,
    }
    quantized: nn.Module = layerwise_quantize(model, compute_layer_map={nn.Linear: (QuantLinear, options)})
    with torch.no_grad(), calibration_mode(quantized):
        quantized(example)
    return quantized


_LINEAR = "Linear: weight, input"
ARMS = (
    Arm("float32", None, "nothing", float_model),
    Arm("fraqat_compiler", None, "every tensor, biases too", fraqat),
    Arm("naive straight-through", None, _LINEAR, naive),
    Arm("ModelOpt", "nvidia-modelopt", _LINEAR, modelopt),
    Arm("torchao", "torchao", "Linear: weight, input per token", torchao),
    Arm("AIMET", "aimet-torch", "weights, every op's output", aimet),
    Arm("Brevitas", "brevitas", _LINEAR, brevitas),
)
