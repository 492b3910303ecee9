"""The page on how to write a pass is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from fraqat_compiler import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "passes" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_example_runs_and_prints_what_its_comments_say(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks("python")), re.MULTILINE)
    assert len(done.stdout.splitlines()) == 2
    assert "// ----- IR after replace-silu{skip=3} -----" in done.stderr
    assert "aten.hardswish.default" in done.stderr


def test_the_entry_point_is_valid() -> None:
    (block,) = blocks("toml")
    assert list(tomllib.loads(block)["project"]["entry-points"]) == ["fraqat_compiler.passes"]


def test_the_table_holds_every_built_in_pass_in_order() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(registry.BUILT_IN["passes"])
    irs = {row.name: row.irs for row in registry.available("passes")}
    for name, shown in rows:
        assert irs[name] == (shown if "->" in shown else f"{shown} -> {shown}")
