"""export-onnx."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import torch
from onnx import defs, helper, shape_inference
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fraqat_compiler import lazy_values, onnx_translate, qdq, quantizer
from fraqat_compiler.capture import describe_inputs, user_line
from fraqat_compiler.errors import PassError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.pass_base import IR, Pass, PassContext, PassResult

OPSETS = (21, 23)  # the first has 4-bit and blocked QDQ, the second RMSNormalization
_INTEGER_BIAS_OPS = frozenset({"Gemm", "Conv", "ConvTranspose", "LayerNormalization", "InstanceNormalization"})


@dataclass(frozen=True)
class ExportOnnx(Pass):
    """Translate the frozen FX graph into ONNX with QuantizeLinear (Q) and DequantizeLinear (DQ).

    Before: `linear(fake_quant(x), fake_quant(W), fake_quant(b))`. After: `Gemm(DQ(Q(x)), DQ(Q(W)), DQ(b codes))` with
    zero points of the type that stores the codes (INT4, UINT8 ...) and biases as int32 codes. Weights stay where they
    are: the graph's constants refer to them. Nodes are named after the user's modules (`blocks.0.attn.qkv/Gemm`),
    inputs and outputs after the model's arguments and keys. It always makes a new graph.
    """

    name: ClassVar[str] = "export-onnx"
    reads: ClassVar[IR] = "fx"
    writes: ClassVar[IR] = "onnx"
    opset: int = 21

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        if self.opset not in OPSETS:
            raise PassError(f"opset {self.opset} is not offered.", f"Choose {' or '.join(map(str, OPSETS))}.")
        _refuse_unstorable(model)
        _refuse_other_floats(model)
        program = _program(model, ctx)
        translated = onnx_translate.translate(program, self.opset)
        values = onnx_translate.detach_values(translated)
        onnx_translate.simplify(translated)
        onnx_translate.refuse_foreign_ops(translated)
        _name_outputs(translated, program)
        graph = gs.import_onnx(shape_inference.infer_shapes(_to_proto(translated)))
        _attach_values(graph, {value.name: tensor for value, tensor in values})
        _finish_quantizers(graph)
        _make_reshapes_static(graph)
        _drop_zero_biases(graph)
        qdq.finish(graph)
        _tidy_nodes(graph)
        return PassResult(graph, modified=True, changes=(f"wrote {len(graph.nodes)} ONNX nodes",))


def _refuse_unstorable(model: GraphModule) -> None:
    """Weights of any width fit into a wider type, but hardware computes activations at the types' own widths."""
    for name, module in model.named_modules():
        if not isinstance(module, ActivationFakeQuantize):
            continue
        spec = module.spec
        if spec.bit_width not in (8, 16) or spec.dynamic:
            kind = "ranges per token" if spec.dynamic else f"{spec.bit_width:g}-bit activations"
            raise PassError(f"{name} has {kind}, which no QDQ file can hold.", "Use static 8- or 16-bit activations.")


def _refuse_other_floats(model: GraphModule) -> None:
    """QuantizeLinear and its scales have one float type, and so has the graph."""
    for node in model.graph.nodes:
        leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
        other = next((leaf.dtype for leaf in leaves if leaf.is_floating_point() and leaf.dtype != torch.float32), None)
        if other is not None:
            raise PassError(
                f"{node.name}{user_line(node)} is {str(other).removeprefix('torch.')}; the graph computes in float32.",
                "Call .float() on the model and its inputs, and leave casts to other float types out of forward().",
            )


# The graph as a torch program


def _program(model: GraphModule, ctx: PassContext) -> ExportedProgram:
    """The graph as a program, in which each fake-quant module is one call of its custom op."""
    args, kwargs = ctx.example_inputs or _captured_inputs(model)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises whatever an op raises
        raise PassError(
            f"the graph cannot be traced on inputs ({describe_inputs(args, kwargs)}): "
            f"{onnx_translate.first_line(error)}.",
            "Give inputs of the shapes that the model was captured with.",
        ) from error


def _captured_inputs(model: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Zeros of the captured shapes, in the structure in which the model takes its inputs."""
    nodes = model.graph.find_nodes(op="placeholder")
    leaves = [torch.zeros(tuple(node.meta["val"].shape), dtype=node.meta["val"].dtype) for node in nodes]
    spec = getattr(model, "_in_spec", None)
    if spec is None:
        return tuple(leaves), {}
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


# From onnx-ir to graphsurgeon


def _name_outputs(model: ir.Model, program: ExportedProgram) -> None:
    """Outputs get their keys in what the model returns: `output`, `output_0`, `logits`."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    taken = {value.name for value in model.graph.inputs}
    for index, value in enumerate(model.graph.outputs):
        name = _key_name(paths[index][0]) if len(paths) == len(model.graph.outputs) else f"output_{index}"
        value.name = name if name not in taken else f"{name}_out"


def _key_name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if not keys or keys[0].isdigit():
        keys.insert(0, "output")
    return "_".join(keys)


def _to_proto(model: ir.Model) -> Any:
    """The model without weights, whose nodes are named `module.path/Op`."""
    for node in model.graph:
        path = onnx_translate.module_path_of(node)
        node.name = f"{path}/{node.op_type}" if path else node.op_type
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.name = "graph"
    return ir.to_proto(model)


def _attach_values(graph: gs.Graph, values: dict[str | None, ir.TensorProtocol]) -> None:
    """Turn the inputs that stand for weights into constants that know where their values lie."""
    stand_ins = [tensor for tensor in graph.inputs if tensor.name in values]
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in values]
    for tensor in stand_ins:
        source = values[tensor.name]
        shape = source.shape.numpy()
        tensor.to_constant(lazy_values.LazyArray(shape, source.dtype.numpy(), source.numpy))


# Quantizers


def _finish_quantizers(graph: gs.Graph) -> None:
    names = qdq.Names(graph)
    zero_points = qdq.SharedConstants(graph, names)
    for node in list(graph.nodes):
        if node.op == "Cast" and qdq.is_constant(node.inputs[0]):
            _fold_bound(graph, node, zero_points)
    for node in list(graph.nodes):
        if node.op == qdq.DEQUANTIZE and qdq.made_by(node.inputs[1], "Mul"):
            _finish_bias(graph, node, names)
    for node in list(graph.nodes):
        if node.op == qdq.QUANTIZE:
            _name_quantizer(node, names)


def _fold_bound(graph: gs.Graph, cast: gs.Node, shared: qdq.SharedConstants) -> None:
    """A zero point, or a bound of codes, becomes a constant of the codes' type; codes themselves do not."""
    typed = cast.outputs[0]
    reader = typed.outputs[0]
    if reader.op not in (qdq.QUANTIZE, qdq.DEQUANTIZE, "Clip") or reader.inputs[0] is typed:
        return
    values = lazy_values.values_of(cast.inputs[0]).astype(lazy_values.numpy_type(cast.attrs["to"]))
    qdq.replace_everywhere(graph, typed, shared.zero_point(values))


def _finish_bias(graph: gs.Graph, node: gs.Node, names: qdq.Names) -> None:
    """Codes and scale of a bias: int32, scale input_scale * weight_scale, as `quantizer.round_bias` has them.

    An op without an integer bias gets the same values in float.
    """
    cast, product = qdq.producer(node.inputs[0]), qdq.producer(node.inputs[1])
    assert cast is not None and product is not None
    bias, result = cast.inputs[0], node.outputs[0]
    input_scale, weight_scale = (torch.from_numpy(lazy_values.values_of(scale)) for scale in product.inputs)
    scale, values = quantizer.bias_scale(input_scale, weight_scale), bias._values

    def codes() -> lazy_values.Array:
        exact = quantizer.bias_codes(torch.from_numpy(values.load()), scale)
        return np.asarray(exact.to(torch.int32))

    if any(reader.op not in _INTEGER_BIAS_OPS for reader in result.outputs):
        floats = lazy_values.LazyArray(bias.shape, np.float32, lambda: codes().astype(np.float32) * scale.numpy())
        qdq.replace_everywhere(graph, result, gs.Constant(names.free(f"{bias.name}_rounded"), floats))
        return
    node.inputs[0] = gs.Constant(names.free(f"{bias.name}_q"), lazy_values.LazyArray(bias.shape, np.int32, codes))
    node.inputs[1] = lazy_values.constant(names.free(f"{bias.name}_scale"), scale.numpy())
    result.name = names.free(f"{bias.name}_dq")


def _name_quantizer(node: gs.Node, names: qdq.Names) -> None:
    """Name codes, values and scale after the tensor that they quantize; nodes too where no module computes it.

    A tensor that the graph computes goes by the name of its fake quant, `layerwise` finds it by that.
    """
    source, scale, codes = node.inputs[0], node.inputs[1], node.outputs[0]
    tensor = source.name if qdq.is_constant(source) else _fake_quant_of(scale) or source.name
    last = codes.outputs[0] if codes.outputs[0].op == qdq.DEQUANTIZE else codes.outputs[0].outputs[0].outputs[0]
    scale.name = names.free(f"{tensor}_scale")
    codes.name = names.free(f"{tensor}_q")
    if last.outputs[0].name.startswith("fake_quantize"):  # a graph output keeps its name
        last.outputs[0].name = names.free(f"{tensor}_dq")
    if qdq.producer(source) is None:
        for quantizer_node in (node, last):
            quantizer_node.name = f"{source.name}/{quantizer_node.op}"


def _fake_quant_of(scale: gs.Tensor) -> str | None:
    """`linear_3` of the module `fake_quant.linear_3`, whose buffer the scale is."""
    owner, _, leaf = scale.name.rpartition(".")
    return owner.removeprefix("fake_quant.") if leaf == "scale" and owner.startswith("fake_quant.") else None


# Tidying


def _make_reshapes_static(graph: gs.Graph) -> None:
    """Write each static shape out: a -1 or a 0 in it makes some runtimes refuse the node."""
    names = qdq.Names(graph)
    shapes = qdq.SharedConstants(graph, names)
    for node in graph.nodes:
        shape = node.outputs[0].shape
        if node.op != "Reshape" or shape is None or not all(isinstance(size, int) and size > 0 for size in shape):
            continue
        node.inputs[1] = shapes.get("shape_" + "x".join(map(str, shape)), np.array(shape, dtype=np.int64))
        node.attrs.pop("allowzero", None)


def _drop_zero_biases(graph: gs.Graph) -> None:
    """A convolution without a bias gets float zeros from the exporter, which would be its only float operand."""
    for node in graph.nodes:
        has_bias = node.op in ("Conv", "ConvTranspose") and len(node.inputs) > 2 and qdq.is_constant(node.inputs[2])
        if has_bias and not lazy_values.values_of(node.inputs[2]).any():
            del node.inputs[2]


def _tidy_nodes(graph: gs.Graph) -> None:
    """Unique names in the order of the graph; attributes in the order of their names, without what is default."""
    taken: set[str] = set()
    for node in graph.nodes:
        name, number = node.name, 0
        while name in taken:
            number += 1
            name = f"{node.name}_{number}"
        taken.add(name)
        node.name = name
        schema = defs.get_schema(node.op, graph.opset, "")
        kept = {key: value for key, value in sorted(node.attrs.items()) if not _is_default(schema, key, value)}
        node.attrs.clear()
        node.attrs.update(kept)


def _is_default(schema: defs.OpSchema, name: str, value: Any) -> bool:
    default = schema.attributes[name].default_value
    if not default.name or isinstance(value, (gs.Graph, gs.Tensor)):
        return False
    known = helper.get_attribute_value(default)
    return bool((known.decode() if isinstance(known, bytes) else known) == value)
