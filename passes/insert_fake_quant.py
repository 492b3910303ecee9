"""insert-fake-quant."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph, ops
from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import NORM_OPS, WEIGHTED_OPS, WeightedOp, argument, is_float_tensor, module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult
from fraqat_compiler.passes.resample_by_matrices import RESAMPLING
from fraqat_compiler.passes.split_low_rank import BRANCH
from fraqat_compiler.quant_spec import QuantSpec, RangeMethod, Unquantized
from fraqat_compiler.target import Role, TensorRequest, default_quant_spec
from fraqat_compiler.widths import Widths, matches, require_match


@dataclass(frozen=True)
class InsertFakeQuant(FxPass):
    """Insert a fake-quant module on every tensor that the target wants quantized.

    Before: `linear(x, W, b)`. After: `fq_y(linear(fq_x(x), fq_W(W), fq_b(b, x_scale, W_scale)))`. Weights get one
    module each (tied ones share it), every tensor that an op computes gets one, ops that only move values share their
    input's, and an op whose result goes into a ReLU alone leaves it to the ReLU's. Biases follow the scales of input
    and weight, at int32. Each op notes in `meta["quantization"]` whether it is quantized, or why not. Does nothing to
    ops that `skip` names and to a graph that has fake quants already.

    Options: `weights` and `activations` are widths with overrides by module name (`4,lm_head=8`; `float` leaves a
    layer out; a layer named for a wider activation gets its input and its output at that width); `skip` are module
    patterns, comma-separated; `range_method` and `weight_range` choose how ranges are found; `group_size` splits rows
    of linear weights; `per_tensor` and `asymmetric` change the weights' grid; `dynamic` takes activation ranges per
    token (simulation only).
    """

    name: ClassVar[str] = "insert-fake-quant"
    weights: str = "4"
    activations: str = "8"
    skip: str = ""
    range_method: RangeMethod = "minmax"
    weight_range: RangeMethod = "minmax"
    group_size: int | None = None
    per_tensor: bool = False
    asymmetric: bool = False
    dynamic: bool = False
    strict: bool = False

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        if any(isinstance(module, FakeQuantize) for module in model.modules()):
            return PassResult(model, modified=False)
        quant_spec = ctx.target.quant_spec if ctx.target else default_quant_spec
        insertion = _Insertion(model, self, quant_spec)
        insertion.run()
        fx_graph.finish(model)
        if self.strict:
            _refuse_unexpected_floats(model)
        return PassResult(model, bool(insertion.changes), tuple(insertion.changes))


@dataclass
class _Insertion:
    """The state of one run: which quantizer each tensor ended with."""

    model: GraphModule
    options: InsertFakeQuant
    quant_spec: Callable[[TensorRequest], QuantSpec | Unquantized]
    changes: list[str] = field(default_factory=list)
    readers: Counter[str] = field(init=False)
    weight_quantizers: dict[str, tuple[Node, WeightFakeQuantize] | Unquantized] = field(default_factory=dict)
    factors: set[Node] = field(default_factory=set)  # tensors that end as the second of a product of activations
    quantizer_of: dict[Node, str] = field(default_factory=dict)  # tensor (or its fake quant) -> activation quantizer
    reasons: dict[Node, Unquantized] = field(default_factory=dict)  # op -> why its output stayed float

    def __post_init__(self) -> None:
        self.weights = Widths.parse(self.options.weights)
        self.activations = Widths.parse(self.options.activations)
        self.readers = fx_graph.readers(self.model)
        self.skip = [pattern for pattern in self.options.skip.replace(" ", "").split(",") if pattern]
        modules = {module_path(node) for node in self.model.graph.nodes} - {""}
        modules |= {name for name, _ in self.model.named_modules() if name}
        self.weights.require_known(modules)
        self.activations.require_known(modules)
        for pattern in self.skip:
            require_match(pattern, modules)

    def run(self) -> None:
        original = list(self.model.graph.nodes)
        widths = self._tensor_widths(original)
        for node in original:
            if node.op in ("placeholder", "call_function"):
                self._quantize_operands(node, widths)
                self._quantize_output(node, widths)
                self._quantize_bias(node)
        for node in original:
            if node.op == "call_function":
                node.meta["quantization"] = self._verdict(node)

    # Which tensors share one quantizer, and how wide it is

    def _sharing(self, nodes: Iterable[Node]) -> nx.Graph:
        """Tensors as nodes, an edge where two must hold the same codes."""
        graph = nx.Graph()
        for node in nodes:
            graph.add_node(node)
            source = node.args[0] if node.args else None
            if isinstance(source, Node) and (ops.is_pass_through(node) or self._defers(source, node)):
                graph.add_edge(source, node)
        return graph

    def _tensor_widths(self, nodes: list[Node]) -> dict[Node, float | None]:
        """Activation width of each tensor: the widest that its producers' or its readers' modules were given."""
        widths: dict[Node, float | None] = {}
        for group in nx.connected_components(self._sharing(nodes)):
            wishes = [self.activations.of(module_path(node)) for node in group]
            readers = {user for node in group for user in node.users if op_name(user) in WEIGHTED_OPS}
            named = [path for path in map(module_path, readers) if self._names(path) and not _is_branch(path)]
            wishes += [self.activations.of(path) for path in named]
            width = None if None in wishes else max(wish for wish in wishes if wish is not None)
            widths.update(dict.fromkeys(group, width))
            self.factors |= group if any(_is_factor(node) for node in group) else set()
        return widths

    def _names(self, path: str) -> bool:
        return self.activations.overrides_module(path)

    def _defers(self, producer: Node, user: Node) -> bool:
        """A tensor that goes into a ReLU alone needs no quantizer: the ReLU's own does the same."""
        if op_name(user) not in ops.RANGE_LIMITING_OPS or len(producer.users) != 1:
            return False
        return producer.op == "call_function" and not ops.is_pass_through(producer)

    # Operands that the graph owns

    def _quantize_operands(self, node: Node, widths: dict[Node, float | None]) -> None:
        weighted = _weighted(node)
        if weighted is not None:
            self._quantize_weighted(node, weighted, widths)
            return
        if ops.op_class(node) in ("shape", "other") and op_name(node) not in ("aten.index",):
            return
        if self._skipped(node):
            return
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and is_float_tensor(operand):
                self._quantize_constant(node, operand, widths)

    def _quantize_constant(self, node: Node, operand: Node, widths: dict[Node, float | None]) -> None:
        width = widths.get(node, self.activations.default)
        is_matrix = ops.op_class(node) == "matmul" and operand.meta["val"].ndim == 2
        if width is None:
            return
        if is_matrix and node.args[1] is operand:
            request = self._request(node, "weight", operand, self.weights.of(module_path(node)), width, channel_axis=1)
        else:
            request = self._request(node, "constant", operand, width, width)
        made = self._weight_quantizer(operand, request)
        if not isinstance(made, Unquantized):
            node.replace_input_with(operand, made[0])

    def _quantize_weighted(self, node: Node, weighted: WeightedOp, widths: dict[Node, float | None]) -> None:
        weight_node = argument(node, weighted.weight)
        width = self.weights.of(module_path(node))
        if not isinstance(weight_node, Node) or width is None or self._skipped(node):
            return
        if weight_node.op != "get_attr":
            return
        role: Role = "norm_weight" if weighted.op_class == "norm" else "weight"
        request = self._request(
            node,
            role,
            weight_node,
            width,
            widths.get(node),
            channel_axis=weighted.channel_axis if role == "weight" else None,
        )
        made = self._weight_quantizer(weight_node, request)
        if isinstance(made, Unquantized):
            self.reasons[node] = made
            return
        ops.set_argument(node, weighted.weight, made[0])

    def _quantize_bias(self, node: Node) -> None:
        """Quantize the bias of an op whose weight is quantized, after the op's result, whose scale it may take."""
        weighted = _weighted(node)
        weight = self._module_of(argument(node, weighted.weight)) if weighted else None
        if weighted is None or not isinstance(weight, WeightFakeQuantize):
            return
        bias = argument(node, weighted.bias)
        source = argument(node, weighted.input)
        if not isinstance(bias, Node) or bias.op != "get_attr" or source not in self.quantizer_of:
            return
        activation = self.model.get_submodule(self.quantizer_of[source])
        assert isinstance(activation, ActivationFakeQuantize)
        request = self._request(node, "bias", bias, 32, activation.spec.bit_width)
        spec = self.quant_spec(request)
        if activation.spec.dynamic or isinstance(spec, Unquantized) or weight.spec.group_size is not None:
            return
        if weight.scale.ndim and weight.scale.numel() != bias.meta["val"].numel():
            return
        name = self._add_module(f"{bias.target}", BiasFakeQuantize(spec, "bias"))
        if spec.result_scale and node in self.quantizer_of:
            factors = (self.quantizer_of[node], name)  # its own scale is 1
        else:
            factors = (self.quantizer_of[source], str(argument(node, weighted.weight).target))
        scales = self._scales(node, *factors)
        with self.model.graph.inserting_before(node):
            quantized = self.model.graph.call_module(name, (bias, *scales))
        fx_graph.copy_meta(node, quantized, bias.meta["val"])
        assert weighted.bias is not None
        ops.set_argument(node, weighted.bias, quantized)

    def _scales(self, before: Node, *quantizers: str) -> list[Node]:
        """Nodes that read the scales of quantizers."""
        with self.model.graph.inserting_before(before):
            scales = [self.model.graph.get_attr(f"{owner}.scale") for owner in quantizers]
        for scale in scales:
            value = fx_graph.get_tensor(self.model, str(scale.target))
            fx_graph.copy_meta(before, scale, fx_graph.fake_like(before, value))
        return scales

    def _request(
        self,
        node: Node,
        role: Role,
        tensor: Node,
        bit_width: float | None,
        activation_bit_width: float | None,
        channel_axis: int | None = None,
    ) -> TensorRequest:
        shape = tuple(tensor.meta["val"].shape)
        return TensorRequest(
            op=ops.op_class(node),
            role=role,
            shape=shape,
            bit_width=bit_width if bit_width is not None else 32,
            activation_bit_width=activation_bit_width if activation_bit_width is not None else 32,
            channel_axis=channel_axis,
            depthwise=ops.groups(node) > 1,
            function=op_name(node),
            tied=tensor.op == "get_attr" and self.readers[str(tensor.target)] > 1,
            factor=role == "activation" and tensor in self.factors,
            resampling=tensor.op == "get_attr" and str(tensor.target).endswith(RESAMPLING),
        )

    def _weight_quantizer(
        self, weight_node: Node, request: TensorRequest
    ) -> tuple[Node, WeightFakeQuantize] | Unquantized:
        """The one fake quant of a tensor that the graph owns; a tied tensor asks once, with its first use."""
        name = str(weight_node.target)
        if name in self.weight_quantizers:
            return self.weight_quantizers[name]
        spec = self.quant_spec(request)
        if isinstance(spec, Unquantized):
            self.weight_quantizers[name] = spec
            return spec
        spec = self._adjusted(spec, request)
        module = WeightFakeQuantize(spec, request.role, _scale_shape(spec, request.shape))
        module_name = self._add_module(name, module)
        after = weight_node.next if weight_node.next.op != "get_attr" else _last_get_attr(weight_node)
        with self.model.graph.inserting_before(after):
            quantized = self.model.graph.call_module(module_name, (weight_node,))
        quantized.meta = dict(weight_node.meta)
        self.weight_quantizers[name] = (quantized, module)
        self.changes.append(f"{name}: {module.extra_repr()}")
        return quantized, module

    def _adjusted(self, spec: QuantSpec, request: TensorRequest) -> QuantSpec:
        """The target's spec with the pass's own options laid over it."""
        if request.role != "weight":
            return spec
        spec = dataclasses.replace(spec, range_method=self.options.weight_range)
        if self.options.asymmetric:
            spec = dataclasses.replace(spec, symmetric=False)
        if self.options.per_tensor:
            spec = dataclasses.replace(spec, axis=None)
        divides = self.options.group_size and request.shape[-1] % self.options.group_size == 0
        if divides and request.op == "linear":
            spec = dataclasses.replace(spec, axis=None, group_size=self.options.group_size)
        return spec

    # Tensors that the graph computes

    def _quantize_output(self, node: Node, widths: dict[Node, float | None]) -> None:
        source = node.args[0] if node.args else None
        if ops.is_pass_through(node):
            if source in self.quantizer_of:
                self.quantizer_of[node] = self.quantizer_of[source]  # type: ignore[index]
            return
        if not is_float_tensor(node) or self._skipped(node) or not node.users:  # an unread input sees no data
            return
        if any(self._defers(node, user) for user in node.users):
            return
        width = widths[node]
        if width is None:
            self.reasons[node] = Unquantized("activations left in float by the activations option")
            return
        request = self._request(node, "activation", node, width, width)
        spec = self.quant_spec(request)
        if isinstance(spec, Unquantized):
            self.reasons[node] = spec
            return
        self._insert_activation(node, spec)

    def _insert_activation(self, node: Node, spec: QuantSpec) -> None:
        spec = dataclasses.replace(spec, range_method=self.options.range_method, dynamic=self.options.dynamic)
        name = self._add_module(node.name, ActivationFakeQuantize(spec))
        with self.model.graph.inserting_after(node):
            quantized = self.model.graph.call_module(name, (node,))
        quantized.meta = {key: value for key, value in node.meta.items() if key != "quantization"}
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
        self.quantizer_of[node] = self.quantizer_of[quantized] = name
        self.changes.append(f"{layer_name(node)}: {self.model.get_submodule(name).extra_repr()}")

    def _skipped(self, node: Node) -> bool:
        return any(matches(pattern, module_path(node)) for pattern in self.skip)

    def _add_module(self, tensor_name: str, module: FakeQuantize) -> str:
        """Register a fake quant under a flat, free name that tells its tensor."""
        name = "fake_quant." + tensor_name.replace(".", "_")
        if not hasattr(self.model, "fake_quant"):
            self.model.add_module("fake_quant", torch.nn.Module())
        taken = dict(self.model.get_submodule("fake_quant").named_children())
        while name.removeprefix("fake_quant.") in taken:
            name += "_"
        self.model.add_submodule(name, module)
        return name

    # What became of each op

    def _verdict(self, node: Node) -> dict[str, Any]:
        weighted = _weighted(node)
        weight = self._module_of(argument(node, weighted.weight)) if weighted else None
        verdict: dict[str, Any] = {
            "status": "quantized",
            "reason": "",
            "expected": True,
            "weight_bits": weight.spec.bit_width if weight else None,
            "activation_bits": self._input_bits(node),
            "granularity": weight.spec.granularity if weight else None,
        }
        reason, expected = self._float_reason(node, weighted, weight)
        if reason:
            verdict |= {"status": "float", "reason": reason, "expected": expected}
        return verdict

    def _float_reason(self, node: Node, weighted: WeightedOp | None, weight: FakeQuantize | None) -> tuple[str, bool]:
        """Why an op is not quantized, and whether that was to be expected; an empty reason when it is quantized."""
        value = node.meta.get("val")
        tensors = [
            item for item in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(item, torch.Tensor)
        ]
        if any(item.is_complex() for item in tensors):
            return "computes complex numbers, which no quantizer covers", False
        if not any(item.is_floating_point() for item in tensors):
            return "computes integers, booleans or sizes", True
        if self._skipped(node):
            return "skipped by the skip option", True
        if node in self.reasons:
            return self.reasons[node].reason, True
        needs_weight = weighted is not None and argument(node, weighted.weight) is not None
        if needs_weight and weight is None:
            return self._weight_reason(node, weighted)
        if ops.op_class(node) == "other" and any(map(_is_float_constant, node.all_input_nodes)):
            return f"nothing is known of the constants of {op_name(node)}", False
        deferred = any(self._defers(node, user) for user in node.users)
        if is_float_tensor(node) and node not in self.quantizer_of and not deferred:
            return f"no quantized input reaches this {op_name(node)}", False
        return "", True

    def _weight_reason(self, node: Node, weighted: WeightedOp | None) -> tuple[str, bool]:
        if self.weights.of(module_path(node)) is None:
            return "weights left in float by the weights option", True
        assert weighted is not None
        return f"its weight is computed by {op_name(argument(node, weighted.weight))}, not a constant", False

    def _module_of(self, node: Any) -> FakeQuantize | None:
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        module = self.model.get_submodule(str(node.target))
        return module if isinstance(module, FakeQuantize) else None

    def _input_bits(self, node: Node) -> float | None:
        names = {self.quantizer_of[source] for source in node.all_input_nodes if source in self.quantizer_of}
        modules = [self.model.get_submodule(name) for name in names]
        return max((module.spec.bit_width for module in modules if isinstance(module, FakeQuantize)), default=None)


def _weighted(node: Node) -> WeightedOp | None:
    """Where an op has its weight and bias; None for ops without."""
    return WEIGHTED_OPS.get(op_name(node)) or NORM_OPS.get(op_name(node))


def _is_factor(node: Node) -> bool:
    """Whether a product reads a tensor as its second factor."""
    return any(ops.second_factor(user) is node for user in node.users)


def _is_branch(path: str) -> bool:
    """A low-rank branch takes its layer's input as it is."""
    return path.rpartition(".")[2] == BRANCH


def _is_float_constant(node: Node) -> bool:
    return node.op == "get_attr" and is_float_tensor(node)


def _scale_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    if spec.group_size is not None:
        return (*shape[:-1], shape[-1] // spec.group_size)
    return () if spec.axis is None else (shape[spec.axis],)


def _last_get_attr(node: Node) -> Node:
    """The first node after a run of `get_attr` nodes."""
    while node.op == "get_attr":
        node = node.next
    return node


def _refuse_unexpected_floats(model: GraphModule) -> None:
    floats = [node for node in model.graph.nodes if not node.meta.get("quantization", {"expected": True})["expected"]]
    if not floats:
        return
    lines = "; ".join(
        f"{module_path(node) or node.name} ({op_name(node)}): {node.meta['quantization']['reason']}"
        for node in floats[:5]
    )
    raise QuantizationError(
        f"{len(floats)} ops stayed in float under --strict: {lines}.",
        "Name their modules with skip, or leave --strict out and read the layers table of the report.",
    )
