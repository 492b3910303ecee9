"""A graph run op by op on several batches at once, so that what comes next sees what became of the weights before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import Batch, input_values


class GraphWalk:
    """Where the run stands.

    In memory are, for every batch, the tensors that ops further on read: residual streams and skips. What is used up
    between two stops (attention scores, say) is there for one batch at a time.

    Args:
        graph: takes and gives what `run_batch` does.
        batches: the data.
    """

    def __init__(self, graph: GraphModule, batches: Sequence[Batch]) -> None:
        self._graph, self._nodes, self._next = graph, list(graph.graph.nodes), 0
        self._computed = _computed(self._nodes)
        self._last_use = {source: node for node in self._nodes for source in node.all_input_nodes}
        self._owned: dict[Node, Any] = {}  # quantized weights and the like, between two stops
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._batches = [dict(zip(inputs, input_values(graph, batch), strict=True)) for batch in batches]

    def advance_to(self, stop: Node) -> None:
        """Run the ops before a node on all batches."""
        end = self._nodes.index(stop)
        steps = [node for node in self._nodes[self._next : end] if node in self._computed and node.op != "placeholder"]
        self._owned = {}
        for values in self._batches:
            for node in steps:
                values[node] = self._run(node, values)
                self._forget_inputs(node, values)
        self._next = end

    def values_of(self, node: Node) -> Iterator[Any]:
        """What a node before the stop came to, batch by batch; a node behind the stop must read it."""
        return (self._value(node, values) for values in self._batches)

    def _forget_inputs(self, node: Node, values: dict[Node, Any]) -> None:
        for source in node.all_input_nodes:
            if self._last_use[source] is node:
                values.pop(source, None)

    def _value(self, node: Node, values: dict[Node, Any]) -> Any:
        if node in self._computed:
            return values[node]
        if node not in self._owned:
            self._owned[node] = self._run(node, values)
        return self._owned[node]

    def _run(self, node: Node, values: dict[Node, Any]) -> Any:
        if node.op == "get_attr":
            return fx_graph.get_tensor(self._graph, str(node.target))
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self._value(source, values))
        called: Any = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return called(*args, **kwargs)


def _computed(nodes: Sequence[Node]) -> set[Node]:
    """Nodes whose values follow from the inputs; those of the others are the graph's own."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
