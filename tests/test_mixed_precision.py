"""`--weights auto`: widths by sensitivity in a simulation and in a compile, what the report says of them, resuming."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fraqat_compiler
from fraqat_compiler import Job, simulate, terminal
from fraqat_compiler.auto_widths import parse_auto
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fx_graph import shared_copy
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.mixed_precision import make_plan
from fraqat_compiler.output_folder import SENSITIVITY_FILE
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.precheck import check
from fraqat_compiler.progress import Progress
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.replay import verify_folder
from fraqat_compiler.target import TensorRequest
from fraqat_compiler.targets.onnxruntime import OnnxRuntimeTarget


class Mixer(nn.Module):
    """An own weight above a layer with weights, so that a name covers another."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(24, 24) / 5)
        self.inner = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(F.linear(x, self.gain))
        return out


class Net(nn.Module):
    """Embedding, loud and quiet layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.mixers = nn.ModuleList(Mixer() for _ in range(2))
        self.quiet = nn.Linear(24, 96)
        self.head = nn.Linear(24, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for mixer in self.mixers:
            hidden = mixer(hidden)
        out: Tensor = self.head(hidden) + 0.01 * self.quiet(hidden)[..., :8]
        return out


def _tokens(count: int, seed: int) -> Iterator[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(20, (4, 6), generator=generator),) for _ in range(count))


def _job(seed: int = 0, **functions: Any) -> Job:
    torch.manual_seed(seed)
    model = Net().eval()
    parts: dict[str, Any] = {
        "calibration_data": lambda: list(_tokens(4, 1)),
        "train_data": lambda: list(_tokens(10, 2)),
    }
    return Job("net", lambda: model, lambda: next(_tokens(1, 3)), **(parts | functions))


def _widths(student: nn.Module) -> dict[str, float]:
    graph: Any = student
    return {name: module.spec.bit_width for name, module in weight_quantizers(graph) if module.role == "weight"}


class Heard(Progress):
    """Which phases ran, and how often each spoke up: once when all of it was known."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def start(self, phase: str, total: int | None = None) -> None:
        self.current = phase
        self.steps[phase] = 0

    def update(self, done: int, detail: str = "") -> None:
        self.steps[self.current] += 1


@pytest.mark.parametrize("mean", [4.0, 5.3, 8.0])
def test_every_layer_gets_the_width_that_the_report_names(tmp_path: Path, mean: float) -> None:
    result = simulate(_job(), output=tmp_path, weights=f"auto{{mean-bits={mean}}}", steps=0)
    assigned = result.report["assignment"]
    bits = {layer["name"]: layer["bits"] for layer in assigned["layers"]}
    assert {name.rpartition(".")[0]: width for name, width in _widths(result.student).items()} == bits
    sizes = {layer["name"]: layer["parameters"] for layer in assigned["layers"]}
    used = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
    assert assigned["mean_bits"] == pytest.approx(used)
    assert mean - 4 * 2304 / sum(sizes.values()) < used <= mean + 1e-9
    assert set(bits.values()) <= {4, 8}


def test_the_text_of_the_assignment_gives_the_same_student(tmp_path: Path) -> None:
    result = simulate(_job(), output=tmp_path / "auto", weights="auto{mean-bits=5}", steps=0)
    text = result.report["assignment"]["weights"]
    again = simulate(_job(), output=tmp_path / "named", weights=text, steps=0)
    assert _widths(again.student) == _widths(result.student)
    assert f"weights={text}" in result.report["pipeline"]
    (tokens,) = next(_tokens(1, 5))
    assert torch.equal(again.student(tokens), result.student(tokens))


def test_it_beats_uniform_widths_of_the_same_size_and_says_so(tmp_path: Path) -> None:
    assigned = simulate(_job(), output=tmp_path, weights="auto{mean-bits=5}", steps=0).report["assignment"]
    low, high = assigned["uniform"]
    assert (low["bits"], low["mean_bits"], high["bits"], high["mean_bits"]) == (4, 4, 8, 8)
    for kind in ("predicted_loss", "measured_loss"):
        assert high[kind] < assigned[kind] < low[kind]
    assert assigned["measured_loss"] == pytest.approx(assigned["predicted_loss"], rel=0.6)
    wider = simulate(_job(), output=tmp_path, weights="5", steps=0)
    narrower = simulate(_job(), output=tmp_path, weights=assigned["weights"], steps=0)
    batches = [batch for (batch,) in _tokens(8, 9)]

    def error(result: Any) -> float:
        return sum(float(F.mse_loss(result.student(batch), result.teacher(batch))) for batch in batches)

    with torch.no_grad():
        assert error(narrower) < error(wider)


def test_each_layer_says_why(tmp_path: Path) -> None:
    report = simulate(_job(), output=tmp_path, weights="auto{mean-bits=5},head=8", steps=0).report
    layers = {layer["name"]: layer for layer in report["assignment"]["layers"]}
    assert (layers["head"]["bits"], layers["head"]["reason"]) == (8, "pinned by --weights")
    assert layers["quiet"]["bits"] == 4 and layers["quiet"]["reason"].startswith("lowest: ")
    raised = [layer for layer in layers.values() if layer["reason"].startswith("raised: ")]
    assert raised and all(layer["bits"] == 8 for layer in raised)
    assert sum(layer["share"] for layer in layers.values()) == pytest.approx(1)
    assert {layer["name"]: layer["reason"] for layer in report["layers"] if layer["weight_bits"]} == {
        name: layer["reason"] for name, layer in layers.items()
    }


def test_a_width_that_the_target_does_not_take_is_no_choice(tmp_path: Path) -> None:
    report = simulate(_job(), output=tmp_path, weights="auto{mean-bits=6}", target="htp", steps=0).report
    embed = next(layer for layer in report["assignment"]["layers"] if layer["name"] == "embed")
    assert (embed["bits"], embed["reason"]) == (8, "the target takes 8 only")
    assert embed["losses"]["4"] == embed["losses"]["8"]


def test_low_rank_branches_keep_their_width(tmp_path: Path) -> None:
    recipe = "split-low-rank{rank=2}"
    result = simulate(_job(), output=tmp_path, weights="auto{mean-bits=5 widths=4,6}", steps=0, recipe=recipe)
    branches = {name: width for name, width in _widths(result.student).items() if "low_rank" in name}
    assert len(branches) > 4 and set(branches.values()) == {8}
    reasons = {layer["reason"] for layer in result.report["assignment"]["layers"] if "low_rank" in layer["name"]}
    assert reasons == {"a low-rank branch has 8 bits"}


def test_a_file_holds_the_widths_and_fits_the_size(tmp_path: Path) -> None:
    report = fraqat_compiler.compile(_job(), output=tmp_path, weights="auto{size=6.5kB},head=8", steps=0).report
    assigned = report["assignment"]
    assert assigned["uniform"][0]["bytes"] < assigned["bytes"] <= 6500 < assigned["uniform"][1]["bytes"]
    assert assigned["bytes"] == report["onnx"]["expected_bytes"] - report["onnx"]["structure_bytes"]
    stored = {
        tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if tensor.dims
    }
    kinds = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
    bits = sorted(layer["bits"] for layer in assigned["layers"])
    matrices = [kinds[kind] for name, kind in stored.items() if kind in kinds and "zero_point" not in name]
    assert sorted(width for width in matrices) == bits
    assert any("size=6.5kB went to its tensors" in line for line in report["warnings"])
    page = (tmp_path / "report.html").read_text()
    assert "Widths by sensitivity" in page and assigned["layers"][-1]["reason"] in page
    assert json.loads((tmp_path / "report.json").read_text())["assignment"] == json.loads(json.dumps(assigned))
    assert all(found.holds for found in verify_folder(tmp_path))


def test_the_terminal_shows_the_layers_that_matter_most(tmp_path: Path) -> None:
    report = simulate(_job(), output=tmp_path, weights="auto{mean-bits=5}", steps=0).report
    console = Console(width=160, record=True, file=io.StringIO())
    terminal.show_simulation(console, report, tmp_path)
    text = console.export_text()
    assert "weight widths for mean-bits=5; mse of the weights alone" in text
    assert all(words in text for words in ("all at 4", "assigned", "all at 8", "raised: ", "loss at 4"))


def test_each_layer_is_tuned_down_to_its_own_end(tmp_path: Path) -> None:
    result = simulate(_job(), output=tmp_path, weights="auto{mean-bits=5}", steps=12, schedule="integer", lr=1e-3)
    assert [stage["bits"] for stage in result.report["schedule"]] == [8, 7, 6, 5, 4]
    assert set(_widths(result.student).values()) == {4, 8}


def test_a_resumed_run_has_the_same_widths_and_measures_nothing_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "auto{mean-bits=5}", "steps": 12, "schedule": "integer"}
    first, second = Heard(), Heard()
    one = simulate(_job(), output=tmp_path, progress=first, **options)
    two = simulate(_job(), output=tmp_path, progress=second, resume=True, **options)
    assert (first.steps["sensitivity"], second.steps["sensitivity"]) == (4, 1)
    assert one.report == two.report


def test_another_model_or_choice_is_measured_anew(tmp_path: Path) -> None:
    def ran(job: Job, weights: str) -> int:
        heard = Heard()
        simulate(job, output=tmp_path, weights=weights, steps=0, progress=heard)
        return heard.steps["sensitivity"]

    assert ran(_job(), "auto{mean-bits=5}") == 4
    assert ran(_job(), "auto{mean-bits=6}") == 1  # another budget chooses from the same measurement
    assert ran(_job(), "auto{mean-bits=5 widths=4,5,8}") == 4
    assert ran(_job(seed=1), "auto{mean-bits=5 widths=4,5,8}") == 4
    assert (tmp_path / SENSITIVITY_FILE).is_file()


class Picky(OnnxRuntimeTarget):
    """Knows no 3-bit weights, and makes 8 bits of 6."""

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        if request.role == "weight" and request.bit_width == 3:
            return Unquantized("no kernel")
        width = 8.0 if request.bit_width == 6 else request.bit_width
        return super().quant_spec(dataclasses.replace(request, bit_width=width))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ("3,8", "leaves 0 in float when it is asked for 3 bits.*Leave that width out"),
        ("4,6,8", "gives no layer 6 bits: of 0 it makes 8"),
    ],
)
def test_widths_that_the_target_does_not_know_are_refused(widths: str, message: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.randn(2, 8),), {})
    request = parse_auto(f"auto{{mean-bits=6 widths={widths}}}")
    assert request is not None

    def insert(weights: str) -> GraphModule:
        made: GraphModule = InsertFakeQuant(weights=weights).run(shared_copy(graph), PassContext(Picky())).model
        return made

    with pytest.raises(UsageError, match=message):
        make_plan(request, "", insert)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("auto{mean-bits=4.2},mixers.*=8", r"mean-bits=4\.2 is too little: .* lowest width it is \d\.\d+\..*pin fewer"),
        ("auto{mean-bits=7.9},quiet=4", r"mean-bits=7\.9 is more than the \d\.\d+ that .* --weights 8"),
        ("auto{size=1kB}", r"size=1kB is too little: .* it is [\d.]+ kB"),
        ("auto{size=1MB}", r"size=1MB is more than the [\d.]+ kB"),
        ("auto{mean-bits=5},*=8", "no layer that may choose its width.*pinned by --weights"),
        ("auto{mean-bits=5},heat=8", "no module of the model matches 'heat'.*head"),
    ],
)
def test_a_budget_that_nothing_or_everything_would_meet_is_refused(tmp_path: Path, weights: str, message: str) -> None:
    heard = Heard()
    with pytest.raises(UsageError, match=message):
        simulate(_job(), output=tmp_path, weights=weights, steps=0, progress=heard)
    assert "sensitivity" not in heard.steps


def test_it_needs_calibration_data_and_says_so_first(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(UsageError, match=r"no calibration_data\(\).*name the widths"):
        simulate(_job(calibration_data=None), output=tmp_path, weights="auto{mean-bits=5}", progress=heard)
    assert not heard.steps
    with pytest.raises(UsageError, match=r"a check does without.*--weights 4, --weights 8"):
        check(_job(), weights="auto{mean-bits=5}")
