"""The stabilizers of one fine-tune, together: when they act, and what of them goes into checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule

from fraqat_compiler.bit_width_scheduler import BitWidthScheduler
from fraqat_compiler.fine_tune_config import FineTuneConfig
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.stabilizers import STABILIZERS, Acting, QuantizedWeight, Subjects

_PREFIX = "stabilizer."


class Stabilizing:
    """Calls each stabilizer in the last stage, in the order of STABILIZERS: what freezes has the last word."""

    def __init__(
        self,
        config: FineTuneConfig,
        scheduler: BitWidthScheduler,
        student: GraphModule,
        parameters: Mapping[str, Tensor],
    ) -> None:
        weights = [
            QuantizedWeight(name, parameters[name], module)
            for name, module in weight_quantizers(student)
            if module.role == "weight" and name in parameters
        ]
        subjects = Subjects(weights, parameters)
        order = list(STABILIZERS)
        options = sorted(config.stabilizers, key=lambda option: order.index(option.name))
        self._acting: dict[str, Acting] = {option.name: option.bind(subjects) for option in options}
        self._scheduler, self._steps = scheduler, config.steps
        self._device = next(iter(parameters.values())).device
        self.begin_stage()

    def begin_stage(self) -> None:
        """A stage begins; in the last one they start, in one that was gone back to they forget."""
        for acting in self._acting.values():
            acting.state = {}
            if self._scheduler.in_last_stage:
                acting.begin()

    def add_gradients(self) -> None:
        """Between backward and the clipping of gradients."""
        if self._acting and self._scheduler.in_last_stage:
            for acting in self._acting.values():
                acting.add_gradients(self._progress())

    def after_step(self) -> None:
        """After the optimizer's step."""
        if self._acting and self._scheduler.in_last_stage:
            for acting in self._acting.values():
                acting.after_step(self._progress())

    def finish(self) -> None:
        """After the last step."""
        for acting in self._acting.values():
            acting.finish()

    def tensors(self) -> dict[str, Tensor]:
        """What they remember, by name."""
        return {
            f"{_PREFIX}{name}:{key}": tensor
            for name, acting in self._acting.items()
            for key, tensor in acting.state.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what they remembered from a checkpoint's tensors."""
        for name, acting in self._acting.items():
            own = f"{_PREFIX}{name}:"
            kept = {key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)}
            acting.state = {key: tensor.to(self._device) for key, tensor in kept.items()}

    def _progress(self) -> float:
        """Share of the last stage that is done."""
        first = self._scheduler.stretches[-1].first
        return (self._scheduler.last_step - first) / (self._steps - first)
