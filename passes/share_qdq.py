"""share-qdq."""

from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import onnx_graphsurgeon as gs
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult


@dataclass(frozen=True)
class ShareQdq(OnnxPass):
    """In the making."""

    name: ClassVar[str] = "share-qdq"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        return PassResult(model, modified=False)
