"""split-low-rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph, ops
from fraqat_compiler.errors import UsageError
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult
from fraqat_compiler.widths import matches

BRANCH = "low_rank"


@dataclass(frozen=True)
class SplitLowRank(FxPass):
    """Take the largest singular directions of each linear weight out into a branch of their own.

    Before: `linear(x, W, b)`. After: `linear(x, W - U D, b) + linear(linear(x, D), U)` with U D the best approximation
    of W of that rank, so that the coarse grid is left the small rest: SVDQuant (arXiv 2411.05007) without its
    smoothing; trained, it is the SVDQAT that FraQAT's paper (arXiv 2510.14823) compares with. The rest keeps the
    weight's name; D and U are `MODULE.low_rank.down` and `MODULE.low_rank.up`, in a module of that name, so widths can
    be given to them. Does nothing to weights that several ops share, to those that are no larger than the branch would
    be, and to modules that `skip` names.

    Options: `rank`; `skip`, patterns over module names, with commas.
    """

    name: ClassVar[str] = "split-low-rank"
    rank: int = 32
    skip: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"split-low-rank cannot take out rank {self.rank}.", "It is 1 or more.")

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if ops.op_name(node) == "aten.linear" and self._fits(node):
                changes.append(f"{node.args[1].target}: {_split(model, node, self.rank)}")
        if changes:
            fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))

    def _fits(self, node: Node) -> bool:
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr" or len(weight.users) != 1:
            return False
        if any(matches(pattern, ops.module_path(node)) for pattern in self._skipped()):
            return False
        names = [str(other.target) for other in node.graph.nodes if other.op == "get_attr"]
        is_split = f"{_branch_of(str(weight.target))}.down" in names or f"{BRANCH}." in str(weight.target)
        rows, columns = weight.meta["val"].shape
        is_own = names.count(str(weight.target)) == 1
        return is_own and not is_split and self.rank * (rows + columns) < rows * columns

    def _skipped(self) -> list[str]:
        return [pattern for pattern in self.skip.replace(" ", "").split(",") if pattern]


def _split(model: GraphModule, node: Node, rank: int) -> str:
    """Rewrite one linear; returns what the branch holds, for the changes."""
    name = str(node.args[1].target)  # type: ignore[union-attr]
    weight = fx_graph.get_tensor(model, name).detach()
    down, up = _factors(weight, rank)
    prefix = _branch_of(name)
    fx_graph.set_tensor(model, name, nn.Parameter(weight - up @ down))
    after = node.next
    factors = [
        fx_graph.add_constant(model, after, f"{prefix}.{kind}", nn.Parameter(factor))
        for kind, factor in (("down", down), ("up", up))
    ]
    linear: Any = torch.ops.aten.linear.default
    hidden = fx_graph.call(after, linear, (node.args[0], factors[0]))
    branch = fx_graph.call(after, linear, (hidden, factors[1]))
    total = fx_graph.call(after, torch.ops.aten.add.Tensor, (node, branch))
    _place(node, prefix, [*factors, hidden, branch])
    total.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    energy = float(1 - (weight - up @ down).square().sum() / weight.square().sum().clamp_min(1e-30))
    return f"rank {rank} holds {energy:.0%} of its square"


def _branch_of(weight: str) -> str:
    """Name of the branch's module."""
    return f"{weight.rpartition('.')[0]}.{BRANCH}".removeprefix(".")


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D [rank, in], U [out, rank]) of equal size, from the singular value decomposition."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).to(weight.dtype), (left[:, :rank] * root).to(weight.dtype)


def _place(node: Node, prefix: str, branch: list[Node]) -> None:
    """Let the branch be a module inside the linear's own."""
    stack = dict(node.meta.get("nn_module_stack", {})) | {prefix: (prefix, nn.Linear)}
    for part in branch:
        part.meta["nn_module_stack"] = dict(stack)
