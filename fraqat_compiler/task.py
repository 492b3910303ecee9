"""The job's own loss, and the batches that carry labels for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fraqat_compiler.calibration import Batch


@dataclass(frozen=True)
class TaskObjective:
    """A loss of the user's, and what of a training batch the model takes.

    A training batch may hold more than the model's inputs: positional entries after them, or names besides theirs. The
    loss sees all of it, the model its inputs.

    Attributes:
        loss: (outputs, batch) to a scalar tensor.
        example: the example inputs of the job.
    """

    loss: Callable[[Any, Any], Tensor]
    example: Batch

    def inputs_of(self, batch: Batch) -> Batch:
        """The part of a training batch that goes into the model."""
        if isinstance(batch, Mapping) and isinstance(self.example, Mapping):
            return {name: batch[name] for name in self.example if name in batch}
        if isinstance(batch, Mapping | Tensor):
            return batch
        count = 1 if isinstance(self.example, Tensor) else len(self.example)
        return tuple(batch[:count])
