"""tools/fuzz_htp.py: a seed is a program, the program is what is computed, and a wrong result is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler.parity import Parity
from fraqat_compiler.targets.htp import HtpTarget

TOOLS = Path(__file__).parents[1] / "tools"
PROGRAMS = {
    3: "x1 = x0 + x0; x2 = F.glu(x1, -1); x3 = x2.sum(-2, keepdim=True) * 0.1",
    17: "x2 = x0.reshape(2, 64, 4); x3 = x2.flip(2); x4 = x3[:, 52:64]; x5 = x4.reshape(2, 2, 8, 3)",
    18: "x3 = F.gelu(x0)",
}

needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


def load(name: str) -> ModuleType:
    """A file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def programs() -> ModuleType:
    return load("random_programs")


@pytest.fixture(scope="module")
def tool(programs: ModuleType) -> ModuleType:
    return load("fuzz_htp")


@pytest.mark.parametrize("seed", PROGRAMS)
def test_a_seed_is_a_program(seed: int, programs: ModuleType) -> None:
    torch.manual_seed(7)  # what was drawn before is no matter
    assert str(programs.program_of(seed)) == PROGRAMS[seed]
    (net, x), (again, y) = programs.case(seed), programs.case(seed)
    assert torch.equal(x, y)
    assert torch.equal(net(x), again(x))


def test_the_text_of_a_program_is_what_is_computed(programs: ModuleType) -> None:
    net, x = programs.case(17)

    def written_out(x0: Tensor) -> Tensor:
        return x0.reshape(2, 64, 4).flip(2)[:, 52:64].reshape(2, 2, 8, 3)

    assert torch.equal(net(x), net.last(written_out(net.first(x))))


def test_programs_hold_only_what_their_result_needs_and_hardware_has(programs: ModuleType) -> None:
    drawn = [programs.program_of(seed) for seed in range(60)]
    for program in drawn:
        shapes = programs.shapes(program).values()
        assert all(8 <= of.numel() <= 40_000 and of.ndim <= 5 for of in shapes)
        text = str(program)
        assert all(text.count(name) > 1 for name in list(program.expressions)[:-1])
    every = " ".join(map(str, drawn))
    assert all(word in every for word in ("permute", "[:", "cat", "stack", "@", "flip", "expand", "pad", "glu", "..."))


def test_a_constant_says_nothing(programs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for expression, constant in (("x0 - x0", True), ("x0.softmax(-1).mean(-1, keepdim=True)", True), ("-x0", False)):
        program = programs.Program({"x1": expression, "x2": "torch.cat([x0, x1], 2)"})
        monkeypatch.setattr(programs, "program_of", lambda _, program=program: program)
        assert programs.says_nothing(0) is constant


@needs_htp
@pytest.mark.parametrize("precision", ["W8A8", "W8A16"])
def test_a_program_is_right_in_the_library(precision: str, tool: ModuleType) -> None:
    row = tool.measured(tool.Row(17, precision, PROGRAMS[17]))
    assert row.error == ""
    assert row.verdict == "right", str(row)
    assert row.parity.max_lsb is not None


def test_verdicts(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(precision: str, mean_lsb: float, cosine: float) -> str:
        near = Parity(max_lsb=20.0, mean_lsb=mean_lsb, max_abs=0.1, cosine=cosine, slope=1.0, samples=1)
        found: str = tool.Row(0, precision, "", parity=near).verdict
        return found

    assert [verdict("W8A8", mean, 0.999) for mean in (1.5, 1.6, float("nan"))] == ["right", "strayed", "strayed"]
    assert [verdict("W8A16", mean, 0.999) for mean in (12.0, 12.1)] == ["right", "strayed"]
    assert [verdict("W8A8", 0.1, cosine) for cosine in (0.994, float("nan"))] == ["strayed", "strayed"]

    def broken(*_: object) -> None:
        raise ValueError("no such op\nand a long story")

    monkeypatch.setattr(tool, "distance", broken)
    row = tool.measured(tool.Row(18, "W8A8", PROGRAMS[18]))
    assert str(row) == f"seed 18 W8A8 refused: ValueError: no such op and a long story: {PROGRAMS[18]}"


def test_rows_of_a_file_are_kept_unless_the_program_is_another(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, str]] = []

    def far(net: nn.Module, x: Tensor, weights: int, activations: int, folder: Path) -> Parity:
        asked.append((weights, str(net.program)))
        cosine = 0.5 if weights == 4 else 1.0
        return Parity(max_lsb=9.0, mean_lsb=1.0, max_abs=0.1, cosine=cosine, slope=1.0, samples=1)

    monkeypatch.setattr(tool, "distance", far)
    monkeypatch.setattr(tool, "prepare", lambda: None)
    monkeypatch.setattr(HtpTarget, "missing", classmethod(lambda cls: None))
    rows = tmp_path / "new" / "rows.json"
    command = ["fuzz", "--programs", "2", "--first-seed", "17", "--precisions", "W8A8,W4A8", "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):  # the second measures nothing, and says the same
        assert tool.main() == 1
        printed = capsys.readouterr()
        assert printed.out == "4 compiles of 2 programs: 2 right, 2 strayed, 0 refused; 0 programs skipped.\n"
        assert f"seed 17 W4A8 strayed: 9.0 / 1.00 LSB, cosine 0.50000: {PROGRAMS[17]}" in printed.err
    assert asked == [(weights, PROGRAMS[seed]) for seed in (17, 18) for weights in (8, 4)]

    rows.write_text(rows.read_text().replace("F.gelu", "F.silu"))
    tool.main()
    assert asked[4:] == [(8, PROGRAMS[18]), (4, PROGRAMS[18])]


def test_unknown_precisions_are_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--precisions", "W3A3"])
    with pytest.raises(SystemExit):
        tool.parse_arguments()
