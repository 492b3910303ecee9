"""Every example in the README runs as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^(fraqat compile job\.py .*)$", TEXT, re.MULTILINE)


def _run(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_job_file_compiles_with_the_printed_command(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    (job,) = [block for block in PYTHON if "def model()" in block]
    (tmp_path / "job.py").write_text(job)
    (command,) = COMMANDS
    _run([sys.executable, "-m", "fraqat_compiler", *shlex.split(command)[1:]], tmp_path)
    assert (tmp_path / "out/model/htp_context_qnn.bin").is_file()
    table = re.findall(r"^\| (`.*?) \|", TEXT.partition("## What you get")[2].partition("## ")[0], re.MULTILINE)
    for name in re.findall(r"`(.*?)`", " ".join(table)):
        assert (tmp_path / "out/model" / name).exists(), name


@pytest.mark.parametrize("block", [block for block in PYTHON if "def model()" not in block])
def test_python_examples_print_what_their_comments_say(block: str, tmp_path: Path) -> None:
    printed = _run([sys.executable, "-c", block], tmp_path).splitlines()
    assert printed[-1:] == re.findall(r"\)  # (.*)$", block, re.MULTILINE)


def test_every_command_of_the_table_exists() -> None:
    help_text = _run([sys.executable, "-m", "fraqat_compiler", "--help"], ROOT)
    for command in set(re.findall(r"^\| `fraqat (\w+)", TEXT, re.MULTILINE)):
        assert command in help_text
