"""docs/method.md: every text on it parses, every example runs and prints what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fraqat_compiler.cli import app
from fraqat_compiler.losses import LOSSES, parse_losses
from fraqat_compiler.recipe import INGREDIENTS, parse_recipe
from fraqat_compiler.schedule import NAMED, parse_schedule
from fraqat_compiler.selection import GROUPS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def _section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _first_cells(title: str) -> list[str]:
    """Texts in backticks in the first column of a section's table."""
    rows = re.findall(r"^\| (`.*?) \|", _section(title), re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`(.*?)`", row)]


def test_every_schedule_parses_and_is_listed() -> None:
    texts = _first_cells("Schedules") + re.findall(r"`((?:\w+)\{.*?\})`", _section("Schedules"))
    assert {parse_schedule(text).name.partition("{")[0] for text in texts} >= NAMED.keys()


def test_every_loss_parses_and_is_listed() -> None:
    texts = _first_cells("Losses") + re.findall(r"--loss '(.*?)'", TEXT)
    assert {loss.name for text in texts for loss in parse_losses(text)} == LOSSES.keys()


def test_every_ingredient_parses_and_is_listed() -> None:
    texts = _first_cells("Recipe")
    assert {item.name for text in texts for item in parse_recipe(text).ingredients} == INGREDIENTS.keys()


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_the_options_shown_with_their_defaults_are_the_defaults(ingredient: str) -> None:
    shown = next(text for text in _first_cells("Recipe") if text.partition("{")[0] == ingredient)
    changed = str(parse_recipe(shown))
    assert changed in (ingredient, "adamw{weight-decay=0.01}")


def test_every_group_is_named() -> None:
    assert all(f"--train {group}" in _section("What is trained") for group in GROUPS)


def _options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_every_flag_exists_and_every_arm_parses() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = _options_of(commands["compile"]) | _options_of(commands["simulate"])
    assert set(re.findall(r"(--[a-z][a-z-]+)", TEXT)) <= known
    arms = re.findall(r"^\| .*? \| `(--.*)` \|", _section("Baselines by name"), re.MULTILINE)
    assert len(arms) == 10
    for arm in arms:
        words = shlex.split(arm)
        given = dict(zip(words[::2], words[1::2], strict=True))
        parse_schedule(given.get("--schedule", "fraqat"))
        parse_recipe(given.get("--recipe", ""))


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_examples_print_what_their_comments_say(block: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == re.findall(r"\)\)?  # (.*)$", block, re.MULTILINE)
