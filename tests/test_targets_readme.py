"""The page on how to write a target is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from fraqat_compiler import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "targets" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_example_keeps_the_contract(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, distance = done.stdout.splitlines()
    assert f"print(results[0].detail)  # {text}" in README
    assert re.fullmatch(r"[01]\.\d\d LSB at most over 4 inputs", distance)


def test_the_entry_point_is_valid() -> None:
    (block,) = blocks("toml")
    assert list(tomllib.loads(block)["project"]["entry-points"]) == ["fraqat_compiler.targets"]


def test_the_table_holds_every_built_in_target() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", README, flags=re.MULTILINE)
    assert rows == list(registry.BUILT_IN["targets"])
