"""A captured graph as a folder: `graph.json` (nodes, structure, fake-quant modules) and `weights.safetensors`.

No pickle and no code: loading a folder of unknown origin imports nothing but fraqat_compiler and runs nothing. Names
are checked because FX writes them into the Python code that it generates. Tied tensors are stored once and stay tied;
tensors without data (fake or meta) come back as meta tensors. Containers of a user's own class in inputs or outputs
come back as the dict or tuple that they are.
"""

from __future__ import annotations

import importlib
import json
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import VerificationError
from fraqat_compiler.fx_codec import decode, decode_dtype, encode, encode_dtype, find_function, function_name

GRAPH_FILE = "graph.json"
WEIGHTS_FILE = "weights.safetensors"
INPUTS_FILE = "inputs.json"
INPUT_TENSORS_FILE = "inputs.safetensors"
VERSION = 1

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_PATH = re.compile(r"[\w\-:/ ]+(\.[\w\-:/ ]+)*")  # nothing that could end a string literal in generated code
_MODULE_CLASS = re.compile(r"(fraqat_compiler(?:\.\w+)+):(\w+)")
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, SafetensorError),
)


@dataclass(frozen=True)
class Description:
    """A graph ready to be written: its JSON document, and its tensors, which are shared with the graph."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]


def save_graph(model: fx.GraphModule, folder: Path) -> None:
    """Write a graph into a folder, which is made if needed.

    Raises:
        VerificationError: the graph holds something that the format does not: a user's module that is called, a
            function that is no torch operator, an argument of an unknown type.
    """
    write_description(describe(model), folder)


def write_description(description: Description, folder: Path) -> None:
    """Write what `describe` gave."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / GRAPH_FILE, description.document)
    save_file(_without_shared_storage(description.tensors), folder / WEIGHTS_FILE)


def load_graph(folder: Path) -> fx.GraphModule:
    """The graph that `save_graph` wrote: same node names, arguments, shapes and tensors.

    Raises:
        VerificationError: a file is missing, damaged or of a newer version.
    """
    with _damage_named(folder / GRAPH_FILE):
        document = _read_json(folder / GRAPH_FILE)
        if document["version"] != VERSION:
            raise VerificationError(f"{folder / GRAPH_FILE} has version {document['version']}, not {VERSION}.")
        model = fx.GraphModule(nn.Module(), fx.Graph())
        _attach_modules(model, document["modules"])
        _attach_tensors(model, document["tensors"], load_file(folder / WEIGHTS_FILE))
        model.graph = _build_graph(document, model)
        model.train(document["training"])
        model.graph.lint()
        return model


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged document makes Python raise into one error that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise VerificationError(f"{error.filename or path} does not exist.") from error
    except _DAMAGE as error:
        raise VerificationError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return document


# --- describing ---------------------------------------------------------------------------------------------------


def describe(model: fx.GraphModule) -> Description:
    """The graph as data. Raises like `save_graph`."""
    entries, tensors = _describe_tensors(model)
    document = {
        "version": VERSION,
        "training": model.training,
        "signature": _describe_signature(model.graph._codegen),
        "modules": _describe_modules(model),
        "tensors": entries,
        "nodes": [_describe_node(node) for node in model.graph.nodes],
    }
    return Description(document, tensors)


def _describe_signature(codegen: CodeGen) -> dict[str, Any] | None:
    """Argument names, and inputs and outputs as containers of zeros; None for a graph that flattens nothing."""
    if not isinstance(codegen, _PyTreeCodeGen):
        return None
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "inputs": _skeleton(info.in_spec),
        "outputs": None if info.out_spec is None else _skeleton(info.out_spec),
    }


def _skeleton(spec: pytree.TreeSpec) -> Any:
    return encode(pytree.tree_unflatten([0] * spec.num_leaves, spec))


def _describe_modules(model: fx.GraphModule) -> dict[str, Any]:
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    return {path: _describe_module(path, model.get_submodule(path)) for path in sorted(called)}


def _describe_module(path: str, module: nn.Module) -> dict[str, Any]:
    name = f"{type(module).__module__}:{type(module).__qualname__}"
    to_config = getattr(module, "to_config", None)
    if to_config is None or not _MODULE_CLASS.fullmatch(name):
        raise VerificationError(f"a graph file cannot hold the module {path!r} of class {name}.")
    return {"class": name, "config": to_config()}


def _describe_tensors(model: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entries: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    for name, tensor, kind in _named_tensors(model):
        first = first_names.setdefault(id(tensor), name)
        entries[name] = {"kind": kind, "same_as": first} if first != name else _describe_tensor(tensor, kind)
        if first == name and not _has_no_data(tensor):
            stored[name] = tensor
    return entries, stored


def _named_tensors(model: fx.GraphModule) -> Iterable[tuple[str, Tensor, str]]:
    """(name, tensor, kind) of every parameter, buffer, and constant that a node reads."""
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.add(name)
        yield name, parameter, "parameter"
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        seen.add(name)
        yield name, buffer, "buffer" if name in persistent else "temporary"
    for name in dict.fromkeys(str(node.target) for node in model.graph.find_nodes(op="get_attr")):
        if name not in seen:
            yield name, _attribute(model, name), "constant"


def _attribute(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise VerificationError(f"a graph file cannot hold the attribute {path!r} of type {type(value).__name__}.")
    return value


def _describe_tensor(tensor: Tensor, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "shape": list(tensor.shape),
        "dtype": encode_dtype(tensor.dtype),
        "requires_grad": tensor.requires_grad,
        "stored": not _has_no_data(tensor),
        "dim_order": _dim_order(tensor),
    }


def _has_no_data(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _dim_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest in memory to the fastest: kernels may round differently on another layout."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True) if not tensor.is_contiguous() else []


def _without_shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors wants tensors of their own memory; only views are copied for it."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != plain.nbytes
        seen.add(storage.data_ptr())
        separate[name] = plain.clone() if shared else plain
    return separate


def _describe_node(node: fx.Node) -> dict[str, Any]:
    if node.op == "call_method":
        raise VerificationError(f"a graph file cannot hold the method call {node.name!r}.", "Capture it to ATen first.")
    target = function_name(node.target) if node.op == "call_function" else str(node.target)
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": encode(list(node.args)),
        "kwargs": encode(node.kwargs),
        "meta": _describe_meta(node.meta),
    }


def _describe_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    if "val" in meta:
        described["val"] = _describe_value(meta["val"])
    if meta.get("nn_module_stack"):
        stack = meta["nn_module_stack"].items()
        described["nn_module_stack"] = [[key, path, _class_name(owner)] for key, (path, owner) in stack]
    if meta.get("stack_trace"):
        described["stack_trace"] = meta["stack_trace"]
    if "quantization" in meta:
        described["quantization"] = encode(meta["quantization"])  # what insert-fake-quant noted
    return described


def _class_name(owner: object) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner)


def _describe_value(value: object) -> Any:
    """Shape and dtype; a symbolic dimension is its text."""
    if isinstance(value, Tensor):
        shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
        return {"shape": shape, "dtype": encode_dtype(value.dtype), "device": str(value.device)}
    if isinstance(value, list | tuple):
        return [_describe_value(element) for element in value]
    return None


# --- building -----------------------------------------------------------------------------------------------------


def _attach_modules(model: nn.Module, described: Mapping[str, Any]) -> None:
    for path, entry in described.items():
        owner, name = _owner(model, path)
        owner.add_module(name, _build_module(entry["class"], entry["config"]))


def _build_module(class_name: str, config: dict[str, Any]) -> nn.Module:
    match = _MODULE_CLASS.fullmatch(class_name)
    if match is None:
        raise VerificationError(f"the graph names the class {class_name!r}, which is not part of fraqat_compiler.")
    cls = getattr(importlib.import_module(match[1]), match[2])
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise VerificationError(f"{class_name!r} is not a module that a graph file may hold.")
    module: nn.Module = cls.from_config(config)
    return module


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the attribute `path`, made where it is missing, and the attribute's name."""
    if not _PATH.fullmatch(path):
        raise VerificationError(f"{path!r} is not the name of an attribute.")
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in model._modules:
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    return model, name


def _attach_tensors(model: nn.Module, entries: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    built: dict[str, Tensor] = {}
    for path, entry in entries.items():
        source = entry.get("same_as")
        built[path] = built[source] if source else _build_tensor(path, entry, stored)
        _attach_tensor(*_owner(model, path), built[path], entry["kind"])


def _build_tensor(path: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    shape, dtype = entry["shape"], decode_dtype(entry["dtype"])
    tensor = stored[path] if entry["stored"] else torch.empty(shape, dtype=dtype, device="meta")
    if list(tensor.shape) != shape or tensor.dtype != dtype:
        raise VerificationError(f"{path!r} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}.")
    tensor = _in_dim_order(tensor, entry["dim_order"])
    if entry["kind"] == "parameter":
        return nn.Parameter(tensor, requires_grad=entry["requires_grad"])
    return tensor.requires_grad_(entry["requires_grad"])


def _in_dim_order(tensor: Tensor, order: list[int]) -> Tensor:
    if not order:
        return tensor
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _attach_tensor(owner: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    if kind == "parameter":
        owner.register_parameter(name, cast(nn.Parameter, tensor))
    elif name in owner._buffers:
        owner._buffers[name] = tensor  # of a fake-quant module, which registered it itself
    elif kind == "constant" and not hasattr(owner, name):
        setattr(owner, name, tensor)
    elif kind in ("buffer", "temporary"):
        owner.register_buffer(name, tensor, persistent=kind == "buffer")
    else:
        raise VerificationError(f"{name!r} cannot be an attribute of kind {kind!r}.")


def _build_graph(document: Mapping[str, Any], model: nn.Module) -> fx.Graph:
    graph = fx.Graph(owning_module=None)
    nodes: dict[str, fx.Node] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for entry in document["nodes"]:
        node = _build_node(graph, entry, nodes, document)
        node.meta.update(_build_meta(entry["meta"], mode))
        nodes[node.name] = node
    if document["signature"] is not None:
        graph.set_codegen(_build_signature(document["signature"]))
    return graph


def _build_node(
    graph: fx.Graph, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node], document: Mapping[str, Any]
) -> fx.Node:
    name, op, target = _identifier(entry["name"]), entry["op"], entry["target"]
    if name in nodes:
        raise VerificationError(f"two nodes are named {name!r}.")
    _refuse_target(op, target, document)
    function = find_function(target) if op == "call_function" else target
    args, kwargs = decode(entry["args"], nodes), decode(entry["kwargs"], nodes)
    for key in kwargs:
        _identifier(key)
    node = graph.create_node(op, function, tuple(args), kwargs, name)
    if node.name != name:
        node.name = name  # FX avoids the names of builtins; a pass may have given one all the same
        graph._graph_namespace._used_names.add(name)
    return node


def _refuse_target(op: str, target: str, document: Mapping[str, Any]) -> None:
    """A target must be text that is safe in generated code and that the document itself defines."""
    known = {
        "placeholder": lambda: _identifier(target) == target,
        "get_attr": lambda: target in document["tensors"],
        "call_module": lambda: target in document["modules"],
        "call_function": lambda: isinstance(target, str),
        "output": lambda: target == "output",
    }
    if op not in known or not known[op]():
        raise VerificationError(f"a node cannot be {op!r} of {target!r}.")


def _identifier(name: object) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise VerificationError(f"{name!r} is not a name.")
    return name


def _build_signature(described: Mapping[str, Any]) -> _PyTreeCodeGen:
    arguments = [_identifier(name) for name in described["arguments"]]
    inputs = decode(described["inputs"], {})
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], dict):
        for name in inputs[1]:
            _identifier(name)
    outputs = described["outputs"]
    out_spec = None if outputs is None else pytree.tree_structure(decode(outputs, {}))
    return _PyTreeCodeGen(_PyTreeInfo(arguments, pytree.tree_structure(inputs), out_spec))


def _build_meta(described: Mapping[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    value = _build_value(described.get("val"), mode)
    if value is not None:
        meta["val"] = value
    if "nn_module_stack" in described:
        meta["nn_module_stack"] = {key: (path, owner) for key, path, owner in described["nn_module_stack"]}
    if "stack_trace" in described:
        meta["stack_trace"] = str(described["stack_trace"])
    if "quantization" in described:
        meta["quantization"] = decode(described["quantization"], {})
    return meta


def _build_value(described: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor; None where a dimension is symbolic, since its constraints are not in the file."""
    if described is None:
        return None
    if isinstance(described, list):
        return tuple(_build_value(element, mode) for element in described)
    if not all(isinstance(dim, int) for dim in described["shape"]):
        return None
    with mode:
        return torch.empty(described["shape"], dtype=decode_dtype(described["dtype"]), device=described["device"])


# --- example inputs -----------------------------------------------------------------------------------------------


def save_inputs(inputs: Inputs, folder: Path) -> None:
    """Write positional and keyword inputs beside a graph.

    Raises:
        VerificationError: an input is neither a tensor nor a plain value.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    tensors = {str(index): leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    values = [None if isinstance(leaf, Tensor) else encode(leaf) for leaf in leaves]
    document = {"structure": encode(pytree.tree_unflatten(list(range(len(leaves))), spec)), "values": values}
    _write_json(folder / INPUTS_FILE, document)
    save_file(_without_shared_storage(tensors), folder / INPUT_TENSORS_FILE)


def load_inputs(folder: Path) -> Inputs | None:
    """What `save_inputs` wrote; None when the folder holds no inputs.

    Raises:
        VerificationError: the files are damaged.
    """
    if not (folder / INPUTS_FILE).exists():
        return None
    with _damage_named(folder / INPUTS_FILE):
        document = _read_json(folder / INPUTS_FILE)
        tensors = load_file(folder / INPUT_TENSORS_FILE)
        values = [decode(form, {}) for form in document["values"]]
        leaves = [tensors.get(str(index), value) for index, value in enumerate(values)]
        args, kwargs = pytree.tree_map(leaves.__getitem__, decode(document["structure"], {}))
        return args, kwargs
