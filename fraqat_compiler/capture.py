"""Capture: a PyTorch model and example inputs become one FX graph of functional ATen calls.

The graph's weights are `get_attr` nodes under the user's own parameter names, and every node knows the user's module
and source line it came from. The model is captured in eval mode and is not changed; its tensors are shared, not copied.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import CaptureError, DataError, UsageError
from fraqat_compiler.ops import op_name
from fraqat_compiler.slice_writes import DECOMPOSITIONS as SLICE_WRITES

Tracer = Literal["export", "symbolic_trace"]
TRACERS: tuple[Tracer, ...] = ("export", "symbolic_trace")

# Recurrent nets have no quantizable form as one op: they are unrolled over time into linear layers and gates.
_UNROLLED = (
    torch.ops.aten.lstm.input,
    torch.ops.aten.gru.input,
    torch.ops.aten.rnn_tanh.input,
    torch.ops.aten.rnn_relu.input,
)
# One time step of the same, sums over named dimensions, which become permutes and matmuls, and Kronecker products,
# which become outer ones; torch.export's table knows how.
_COMPOSITES = (
    torch.ops.aten.einsum.default,
    torch.ops.aten.kron.default,
    torch.ops.aten.lstm_cell.default,
    torch.ops.aten.gru_cell.default,
    torch.ops.aten.rnn_tanh_cell.default,
    torch.ops.aten.rnn_relu_cell.default,
)
_RANDOM_PREFIXES = ("aten.rand", "aten.normal", "aten.bernoulli", "aten.multinomial", "aten.uniform", "aten.poisson")
LONGEST_UNROLL = 512

_REMEDIES = (
    (
        ("data-dependent", "GuardOnDataDependent", "guard on", "Eq(u", "data dependent"),
        "The graph must not depend on values of tensors: replace the Python branch or loop by torch.where or masking, "
        "or pass the decision as a Python constant.",
    ),
    (("numpy",), "Replace NumPy calls on tensors by torch functions."),
    (("nonzero", "unbacked", "boolean"), "Replace ops whose output size depends on values (nonzero, boolean masks)."),
    (("Proxy", "symbolically traced"), 'Use the default tracer "export", which runs Python control flow.'),
    (("inplace", "in-place", "mutat"), "Avoid in-place changes of inputs or buffers in forward()."),
)
_DEFAULT_REMEDY = "Check that model(*example_inputs) uses torch ops only; torch.export's own message is above."


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tracer: Tracer = "export",
) -> GraphModule:
    """Capture `model` on example inputs.

    Args:
        model: any module; captured in eval mode, its training flags are restored.
        args, kwargs: example inputs; tensors, or tuples, lists and dicts of them. Their shapes become the graph's.
        tracer: "export" (torch.export), or "symbolic_trace" to trace the Python code first by torch.fx, which keeps
            no values of example inputs but cannot follow control flow.

    Returns:
        GraphModule called like the model, with `get_attr` nodes for weights and `meta["val"]` on every node.

    Raises:
        DataError: the example inputs do not fit the model.
        CaptureError: the model cannot be captured, holds NaN or infinite weights, or weights of another float type than
            float32, or changes its buffers; with the user's source line.
    """
    if tracer not in TRACERS:
        raise UsageError(f"unknown tracer {tracer!r}.", f"Known: {', '.join(TRACERS)}.")
    kwargs = dict(kwargs or {})
    _refuse_broken_weights(model)
    _refuse_other_floats(model, args, kwargs)
    with _eval_mode(model), torch.no_grad():
        _try_example_inputs(model, args, kwargs)
        traced = _symbolic_trace(model) if tracer == "symbolic_trace" else model
        return _export(traced, args, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    try:
        with _quiet_export():
            program = torch.export.export(model, args, kwargs, strict=False)
        _refuse_long_unrolling(program.graph_module)
        known = torch.export.default_decompositions()
        written_out: dict[Any, Any] = {op: known[op] for op in _COMPOSITES}
        program = program.run_decompositions(written_out | dict(get_decompositions(_UNROLLED)) | SLICE_WRITES)
        _refuse_unrepeatable(program.graph_module)
        _refuse_state(program)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise _capture_error(error) from error
    return _as_graph_module(program)


def _as_graph_module(program: torch.export.ExportedProgram) -> GraphModule:
    """The program with its weights as attributes, without the guard code that newer releases add."""
    guards = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    graph_module = program.module(**guards)
    assert isinstance(graph_module, GraphModule)
    for write_back in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        graph_module.graph.erase_node(write_back)  # the caller's input, which forward() changed, is left alone
    for node in list(graph_module.graph.nodes):
        if node.op in ("get_attr", "call_module") and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Drop what torch.export says beside its exception: half a graph on stderr, warnings of torch about itself.

    What the user's forward() has to say was heard when it ran on the example inputs.
    """
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _symbolic_trace(model: nn.Module) -> GraphModule:
    try:
        return torch.fx.symbolic_trace(model)
    except Exception as error:  # the tracer runs the user's code on proxies
        raise _capture_error(error) from error


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _refuse_broken_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta" or not tensor.is_floating_point():
            continue
        if torch.isnan(tensor).any() or (isinstance(tensor, nn.Parameter) and torch.isinf(tensor).any()):
            raise CaptureError(
                f"the model's tensor {name!r} holds NaN or infinite values.", "Load a checkpoint with finite weights."
            )


def _refuse_other_floats(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The simulation of the quantizers, and what the file computes between them, is float32."""
    weights = [(f"the model's tensor {name!r}", tensor) for name, tensor in model.named_parameters()]
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    inputs = [(f"tensor {index} of the example inputs", leaf) for index, leaf in enumerate(leaves)]
    for name, tensor in [*weights, *inputs]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CaptureError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; a model is quantized from float32.",
                "Call .float() on the model, and on what example_inputs() and the data functions yield.",
            )


def _try_example_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        model(*args, **kwargs)
    except Exception as error:  # whatever forward() raises on inputs that do not fit
        raise DataError(
            f"the model does not run on its example inputs ({describe_inputs(args, kwargs)}): "
            f"{_first_line(error)}{_user_location(error)}.",
            "Make example_inputs() return what forward() takes.",
        ) from error


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Types and shapes of inputs in one line, for messages."""
    parts = [_describe(value) for value in args] + [f"{name}={_describe(value)}" for name, value in kwargs.items()]
    return ", ".join(parts) or "no inputs"


def _describe(value: Any) -> str:
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if leaves and leaves[0] is not value:
        return f"{type(value).__name__} of {', '.join(_describe(leaf) for leaf in leaves)}"
    return repr(value)


def _refuse_long_unrolling(graph_module: GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in _UNROLLED:
            continue
        batch_first = bool(node.args[-1])
        steps = node.args[0].meta["val"].shape[1 if batch_first else 0]
        if steps > LONGEST_UNROLL:
            raise CaptureError(
                f"{node.target} over {steps} time steps would unroll into more than {LONGEST_UNROLL} copies.",
                f"Give example inputs of at most {LONGEST_UNROLL} steps, or keep the recurrent part outside the model.",
            )


def _refuse_unrepeatable(graph_module: GraphModule) -> None:
    """A compiled graph has fixed shapes and gives the same answer to the same inputs."""
    for node in graph_module.graph.nodes:
        if node.op == "output":
            _refuse_plain_outputs(node)
        if op_name(node).startswith(_RANDOM_PREFIXES):
            raise CaptureError(
                f"forward() draws random numbers ({op_name(node)}{user_line(node)}).",
                "Draw them outside and pass them as an input.",
            )
        tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
        if any(not isinstance(size, int) for tensor in tensors for size in tensor.shape):
            raise CaptureError(
                f"the size of what {op_name(node)} yields depends on values of tensors{user_line(node)}.",
                "Replace it by torch.where or a mask of fixed size, or keep it outside the model.",
            )


def _refuse_state(program: torch.export.ExportedProgram) -> None:
    changed = program.graph_signature.buffers_to_mutate
    if changed:
        raise CaptureError(
            f"forward() changes the model's tensor {next(iter(changed.values()))!r}; a compiled graph keeps no state "
            "from one call to the next.",
            "Take it as an input and return the new value as an output.",
        )


def _refuse_plain_outputs(output: Node) -> None:
    plain = [leaf for leaf in pytree.tree_leaves(output.args[0]) if not isinstance(leaf, Node | None)]
    if plain:
        raise CaptureError(
            f"forward() returns {plain[0]!r} ({type(plain[0]).__name__}) beside tensors.",
            "Return tensors only; what is constant need not be computed by the model.",
        )


def user_line(node: Node) -> str:
    """` at model.py:3`, the innermost frame of the user's code that made a node; empty when unknown."""
    frames = re.findall(r'File "[^"]*?([^"/]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""


def _capture_error(error: Exception) -> CaptureError:
    text = f"{type(error).__name__} {error}"
    remedy = next((remedy for keys, remedy in _REMEDIES if any(key in text for key in keys)), _DEFAULT_REMEDY)
    return CaptureError(f"the model cannot be captured{_user_location(error)}: {_first_line(error)}.", remedy)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")


def _user_location(error: Exception) -> str:
    """` at file.py:12 (code)` of the deepest frame outside torch and this package; empty when there is none."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    own = [frame for frame in frames if "<" not in frame.filename]
    if not own:
        return ""
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno} (`{own[-1].line}`)"
