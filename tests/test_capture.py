"""Capture: calling conventions, provenance, and errors that name the user's line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat_compiler.capture import LONGEST_UNROLL, TRACERS, Tracer, capture
from fraqat_compiler.errors import CaptureError, DataError, UsageError
from fraqat_compiler.ops import module_path, op_name


class Net(nn.Module):
    """Tuples and dicts in and out, a buffer, tied weights, dropout, a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("position", torch.randn(4, 16))

    def forward(self, ids: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
        x = self.drop(self.embed(ids) + self.position) * pair[0] + pair[1]
        return {"logits": self.head(self.hidden(x)) * scale, "features": x}


def _net_inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(16, generator=generator), torch.randn(16, generator=generator))
    return (torch.randint(0, 10, (2, 4), generator=generator), pair), {"scale": torch.ones(1)}


@pytest.mark.parametrize("tracer", TRACERS)
def test_graph_equals_the_model_in_eval_mode(tracer: Tracer) -> None:
    model = Net().train()
    args, kwargs = _net_inputs()
    graph = capture(model, args, kwargs, tracer=tracer)
    assert model.training and model.drop.training
    expected = model.eval()(*args, **kwargs)
    actual = graph(*args, **kwargs)
    assert list(actual) == ["logits", "features"]
    for name in expected:
        assert torch.equal(actual[name], expected[name])


def test_tied_weights_stay_one_tensor() -> None:
    graph = capture(Net(), *_net_inputs())
    reads = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and "weight" in str(node.target)}
    users = [node for node in graph.graph.nodes if op_name(node) in ("aten.embedding", "aten.linear")]
    tied = {node.args[0 if op_name(node) == "aten.embedding" else 1].target for node in users}
    assert len(reads) == 2
    assert len(tied) == 2  # the tied one, and the hidden layer's


def test_nodes_know_the_users_modules() -> None:
    graph = capture(Net(), *_net_inputs())
    paths = {module_path(node) for node in graph.graph.nodes if op_name(node) == "aten.linear"}
    assert paths == {"hidden.0", "head"}


def test_lstm_is_unrolled_into_linear_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model, x = Recurrent().eval(), torch.randn(2, 5, 8)
    graph = capture(model, (x,))
    names = [op_name(node) for node in graph.graph.nodes]
    assert "aten.linear" in names and not any("lstm" in name for name in names)
    torch.testing.assert_close(graph(x), model(x))
    with pytest.raises(CaptureError, match="time steps"):
        capture(model, (torch.randn(1, LONGEST_UNROLL + 1, 8),))


def test_control_flow_on_values_names_the_users_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the line to name
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_capture.py:\d+ \(`if x.sum\(\) > 0") as caught:
        capture(Branch(), (torch.ones(3),))
    assert "torch.where" in str(caught.value)


def test_inputs_that_do_not_fit_are_named_with_their_shapes() -> None:
    with pytest.raises(DataError, match=r"float32\[2, 3\]"):
        capture(nn.Linear(4, 4), (torch.ones(2, 3),))


def test_nan_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"'0\.weight'"):
        capture(model, (torch.ones(1, 4),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_and_inputs_of_other_float_types_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match=rf"'weight' is {str(dtype)[6:]}.*\.float\(\)"):
        capture(nn.Linear(4, 4).to(dtype), (torch.ones(1, 4, dtype=dtype),))
    with pytest.raises(CaptureError, match=rf"tensor 1 of the example inputs is {str(dtype)[6:]}"):
        capture(nn.Bilinear(4, 4, 2), (torch.ones(1, 4), torch.ones(1, 4, dtype=dtype)))


def test_a_model_that_changes_its_buffers_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(CaptureError, match=r"'calls'.*Take it as an input"):
        capture(Counter(), (torch.ones(3),))


def test_inputs_that_forward_changes_are_left_alone() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x * 2

    graph = capture(InPlace(), (torch.ones(3),))
    x = torch.ones(3)
    assert torch.equal(graph(x), torch.full((3,), 4.0))
    assert torch.equal(x, torch.ones(3))


def test_torch_says_nothing_beside_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CaptureError):
            capture(Branch(), (torch.ones(3),))
    assert capfd.readouterr() == ("", "")


def test_unknown_tracers_are_refused() -> None:
    with pytest.raises(UsageError, match="export, symbolic_trace"):
        capture(nn.Linear(1, 1), (torch.ones(1, 1),), tracer="jit")  # type: ignore[arg-type]


def test_the_models_tensors_are_shared_not_copied() -> None:
    model = nn.Linear(4, 4)
    graph = capture(model, (torch.ones(1, 4),))
    assert graph.get_parameter("weight") is model.weight
    assert F.linear(torch.ones(1, 4), model.weight, model.bias).equal(graph(torch.ones(1, 4)))
