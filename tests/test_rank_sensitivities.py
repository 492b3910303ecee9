"""tools/rank_sensitivities.py on a small job: a row for each measure, the product's near the truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "rank_sensitivities.py"
JOB = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = x + 0.4 ** index * torch.tanh(block(x))
        return x

def model():
    torch.manual_seed(0)
    return Net()

def example_inputs():
    return (torch.randn(16, 24),)

def calibration_data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 24, generator=generator),) for _ in range(8)]
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    job = tmp_path_factory.mktemp("job") / "job.py"
    job.write_text(JOB)
    command = [sys.executable, str(TOOL), str(job), "--means", "5,6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def test_every_measure_has_a_row_as_long_as_the_head(rows: dict[str, list[str]]) -> None:
    assert len(rows) == 7  # head, rule, four measures, chance
    assert rows["measure"] == ["seconds", "layers", "mixes", "predicted / true", "loss at 5", "loss at 6"]
    assert all(len(row) == 6 for row in rows.values())


def test_the_products_measure_ranks_layers_and_beats_chance(rows: dict[str, list[str]]) -> None:
    ours = next(row for name, row in rows.items() if "the product's" in name)
    assert float(ours[1]) > 0.7 and float(ours[2]) > 0.7 and 0.4 < float(ours[3]) < 2.5
    assert float(ours[4]) < float(rows["random"][4]) and float(ours[5]) < float(rows["random"][5])
