"""Saving and loading captured graphs: exact for real ones, harmless for hostile ones."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fraqat_compiler.calibration import calibrate
from fraqat_compiler.errors import VerificationError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize
from fraqat_compiler.fx_codec import decode, encode
from fraqat_compiler.fx_io import GRAPH_FILE, load_graph, load_inputs, save_graph, save_inputs
from fraqat_compiler.instruments import Verification
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.quant_spec import QuantSpec


class Network(nn.Module):
    """Tied weights, buffers of both kinds, a constant, containers in and out, a convolution, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("position", torch.randn(4, 8))
        self.register_buffer("shift", torch.randn(8), persistent=False)
        self.factors = torch.tensor([0.5, 2.0])

    def forward(self, ids: Tensor, extra: dict[str, Tensor], *, scale: Tensor) -> dict[str, Any]:
        x = self.embedding(ids) + self.position + self.shift
        for layer in self.layers:
            x = functional.gelu(layer(x))
        first, second = torch.split(self.convolution(x), 2, dim=1)
        x = torch.cat([first * self.factors[0], second * float("inf")], dim=1).clamp(-1, 1)
        return {"logits": self.head(x) * scale, "pair": (extra["a"] + 1, x[:, 1:3])}


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.GraphModule:
    program = torch.export.export(model.eval(), args, kwargs).run_decompositions({})
    return program.module(check_guards=False)


@pytest.fixture(scope="module")
def inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randint(0, 10, (2, 4)), {"a": torch.ones(3)}), {"scale": torch.rand(1)}


@pytest.fixture
def graph(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> fx.GraphModule:
    return capture(Network(), *inputs)


@pytest.fixture(scope="module")
def saved(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_graph(capture(Network(), *inputs), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved graph, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "graph"))


def insert(graph: fx.GraphModule, after: fx.Node, name: str, module: FakeQuantize) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(after):
        node = graph.graph.call_module(name, (after,))
    node.meta = dict(after.meta)
    after.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return len(left) == len(right) and all(map(equal, left, right))


def test_a_captured_graph_comes_back_the_same(graph: fx.GraphModule, inputs: Any, tmp_path: Path) -> None:
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    args, kwargs = inputs
    assert equal(loaded(*args, **kwargs), graph(*args, **kwargs))
    assert loaded.code == graph.code
    assert list(loaded.state_dict()) == list(graph.state_dict())
    assert loaded.head.weight is loaded.embedding.weight
    assert isinstance(loaded.head.weight, nn.Parameter) and loaded.head.weight.requires_grad
    assert loaded.training == graph.training


def test_shapes_module_paths_and_source_lines_come_back(graph: fx.GraphModule, tmp_path: Path) -> None:
    save_graph(graph, tmp_path)
    for old, new in zip(graph.graph.nodes, load_graph(tmp_path).graph.nodes, strict=True):
        assert (old.name, old.op, str(old.target)) == (new.name, new.op, str(new.target))
        assert old.meta.get("nn_module_stack") == new.meta.get("nn_module_stack")
        assert old.meta.get("stack_trace") == new.meta.get("stack_trace")
        if isinstance(old.meta.get("val"), Tensor):
            assert (old.meta["val"].shape, old.meta["val"].dtype) == (new.meta["val"].shape, new.meta["val"].dtype)


def test_saving_twice_gives_the_same_bytes(graph: fx.GraphModule, tmp_path: Path) -> None:
    save_graph(graph, tmp_path / "a")
    save_graph(load_graph(tmp_path / "a"), tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_fake_quant_modules_come_back_with_their_state(graph: fx.GraphModule, inputs: Any, tmp_path: Path) -> None:
    (weight,) = (node for node in graph.graph.nodes if node.target == "layers.0.weight")
    insert(graph, weight, "quantizers.weight", WeightFakeQuantize(QuantSpec(4.5, axis=0), "weight", (8,)))
    activation = ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False))
    activation.set_range(torch.tensor(-0.2), torch.tensor(1.0))
    gelu = next(node for node in graph.graph.nodes if "gelu" in node.name)
    insert(graph, gelu, "quantizers.gelu", activation)
    graph.recompile()
    args, kwargs = inputs
    before = graph(*args, **kwargs)
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    assert loaded.get_submodule("quantizers.weight").spec == QuantSpec(4.5, axis=0)
    assert equal(loaded(*args, **kwargs), before)
    assert torch.equal(loaded.get_submodule("quantizers.gelu").scale, activation.scale)
    assert loaded.get_submodule("quantizers.gelu").zero_point.dtype == torch.int32


class Block(nn.Module):
    """Attention, normalization and a feed-forward half with BatchNorm, as compiles meet them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.feed = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).reshape(2, 4, 2, 12).transpose(1, 2).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(8, 8)
        return self.scale(self.feed(mixed)).relu()


def test_a_quantized_graph_comes_back_at_every_stage(tmp_path: Path) -> None:
    data = torch.randn(2, 4, 8)
    graph = capture(Block(), (data,))
    watch = [Verification()]
    preparing = PassManager.from_text(
        "remove-no-ops,fold-constants,fold-batch-norm,decompose-attention,insert-fake-quant{weights=4.5}"
    )
    graph, _ = preparing.run(graph, instruments=watch)
    calibrate(graph, [data])
    for module in graph.modules():
        if isinstance(module, WeightFakeQuantize) and module.role == "weight":
            module.set_bit_width(4)
    save_graph(graph, tmp_path / "trained")
    assert torch.equal(load_graph(tmp_path / "trained")(data), graph(data))

    PassManager.from_text("freeze-bit-width").run(graph, instruments=watch)
    save_graph(graph, tmp_path / "frozen")
    loaded = load_graph(tmp_path / "frozen")
    assert torch.equal(loaded(data), graph(data))
    assert all(module.frozen for module in loaded.modules() if isinstance(module, WeightFakeQuantize))
    assert [node.meta.get("quantization") for node in loaded.graph.nodes] == [
        node.meta.get("quantization") for node in graph.graph.nodes
    ]


def test_a_graph_without_data_stays_without(graph: fx.GraphModule, tmp_path: Path) -> None:
    graph.to("meta")
    graph.head.weight = graph.embedding.weight  # `to` unties them
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    assert loaded.head.weight.is_meta and loaded.head.weight is loaded.embedding.weight
    assert loaded.head.weight.shape == (10, 8)


def test_memory_layout_is_kept(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    graph = capture(model, (torch.randn(1, 3, 6, 6),))
    save_graph(graph, tmp_path)
    assert load_graph(tmp_path).weight.stride() == graph.weight.stride()


def test_symbolic_dimensions_are_text(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=9)
    program = torch.export.export(nn.Linear(3, 3), (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
    graph = program.run_decompositions({}).module(check_guards=False)
    save_graph(graph, tmp_path)
    nodes = json.loads((tmp_path / GRAPH_FILE).read_text())["nodes"]
    assert any(isinstance(node["meta"]["val"]["shape"][0], str) for node in nodes if node["op"] == "placeholder")
    data = torch.randn(7, 3)
    assert torch.equal(load_graph(tmp_path)(data), graph(data))


class Output(NamedTuple):
    left: Tensor
    right: Tensor


class NamedOutput(nn.Module):
    def forward(self, max: Tensor) -> Output:  # noqa: A002 - FX renames arguments that shadow builtins
        return Output(max.sqrt(), torch.softmax(max, -1))


def test_a_named_tuple_comes_back_as_a_tuple(tmp_path: Path) -> None:
    graph = capture(NamedOutput(), (torch.ones(2, 3),))
    save_graph(graph, tmp_path)
    assert equal(load_graph(tmp_path)(torch.ones(2, 3)), tuple(graph(torch.ones(2, 3))))


def test_values_survive_the_codec() -> None:
    value = (
        [1, -2.5, True, None, "text", float("-inf")],
        (slice(1, None, 2), torch.float16, torch.device("cpu"), torch.channels_last, torch.strided),
        {"a": (), 3: [()]},
    )
    assert decode(json.loads(json.dumps(encode(value), allow_nan=False)), {}) == value


def test_what_cannot_be_stored_is_named(graph: fx.GraphModule, tmp_path: Path) -> None:
    gelu = next(node for node in graph.graph.nodes if "gelu" in node.name)
    gelu.target = functional.gelu
    with pytest.raises(VerificationError, match="cannot hold a call of"):
        save_graph(graph, tmp_path)
    graph.add_submodule("act", nn.GELU())
    gelu.op, gelu.target = "call_module", "act"
    with pytest.raises(VerificationError, match="'act' of class torch"):
        save_graph(graph, tmp_path)


def test_inputs_come_back(tmp_path: Path) -> None:
    inputs = ((torch.ones(2), [torch.zeros(1), 3]), {"flag": True, "nested": OrderedDict(x=torch.eye(2).T)})
    save_inputs(inputs, tmp_path)
    loaded = load_inputs(tmp_path)
    assert loaded is not None
    (first, (zeros, three)), kwargs = loaded
    assert torch.equal(first, torch.ones(2)) and torch.equal(zeros, torch.zeros(1)) and three == 3
    assert kwargs["flag"] is True and torch.equal(kwargs["nested"]["x"], torch.eye(2))
    assert load_inputs(tmp_path / "nothing") is None


# --- hostile documents --------------------------------------------------------------------------------------------

PAYLOAD = "__import__('pathlib').Path('TOUCHED').touch()"


def edit_first(op: str, /, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        next(node for node in document["nodes"] if node["op"] == op).update(changes)

    return edit


def edit_signature(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["signature"].update(changes)


def add_module(name: str, class_name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["modules"].update({name: {"class": class_name, "config": {}}})


def rename_tensor(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        document["tensors"][name] = {"kind": "buffer", "same_as": "position"}
        edit_first("get_attr", target=name)(document)

    return edit


HOSTILE = {
    "function outside torch": edit_first("call_function", target="os.system"),
    "function reached through torch.ops": edit_first("call_function", target="load_library.__func__.__globals__"),
    "attribute of an operator": edit_first("call_function", target="aten.linear.__class__"),
    "operator that opens files": edit_first("call_function", target="aten.from_file.default"),
    "method call": edit_first("call_function", op="call_method", target="__reduce__"),
    "code in a node name": edit_first("call_function", name=f"x={PAYLOAD};y"),
    "code in a keyword": edit_first("call_function", kwargs={"dict": [[f"x={PAYLOAD}", 1]]}),
    "code in a placeholder": edit_first("placeholder", target=f"ids={PAYLOAD}"),
    "code in an attribute": edit_first("get_attr", target=f'x", {PAYLOAD}, "y'),
    "code in a tensor name": rename_tensor(f'x", {PAYLOAD}, "y'),
    "attribute of the graph module": edit_first("get_attr", target="__class__"),
    "code in an argument name": edit_signature(arguments=[f"ids={PAYLOAD}", "extra", "scale"]),
    "code in a keyword argument": edit_signature(
        inputs={"tuple": [{"tuple": [0]}, {"dict": [[f"x': {PAYLOAD}, 'y", 0]]}]}
    ),
    "keyword as a name": edit_first("call_function", name="class"),
    "class of another package": add_module("m", "subprocess:Popen"),
    "class imported by the package": add_module("m", "fraqat_compiler.fx_io:Path"),
    "function of the package": add_module("m", "fraqat_compiler.fx_io:load_graph"),
    "module that does not exist": add_module("m", "fraqat_compiler.nothing:Thing"),
    "enum that imports": edit_signature(outputs={"__enum__": True}),
    "unknown node": edit_first("call_function", args=[{"node": "nowhere"}]),
    "nodes missing": lambda document: document.pop("nodes"),
    "another version": lambda document: document.update(version=99),
}


def test_the_folder_that_the_hostile_ones_are_made_from_loads(folder: Path) -> None:
    assert len(load_graph(folder).graph.nodes) > 20


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_document_is_refused_and_runs_nothing(
    edit: Callable[[dict[str, Any]], None], folder: Path, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    document = json.loads((folder / GRAPH_FILE).read_text())
    edit(document)
    (folder / GRAPH_FILE).write_text(json.dumps(document).replace("TOUCHED", str(touched)))
    with pytest.raises(VerificationError):
        load_graph(folder)
    assert not touched.exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000], ids=["empty", "list", "null", "cut", "deep"])
def test_a_file_that_is_no_document_is_refused(text: str, folder: Path) -> None:
    (folder / GRAPH_FILE).write_text(text)
    with pytest.raises(VerificationError, match="is damaged"):
        load_graph(folder)


def test_damaged_and_missing_weights_are_named(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(VerificationError, match="is damaged"):
        load_graph(folder)
    weights.unlink()
    with pytest.raises(VerificationError, match="does not exist"):
        load_graph(folder)
