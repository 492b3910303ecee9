"""Selective training: which parameters a text selects."""

from __future__ import annotations

import pytest

from fraqat_compiler.errors import UsageError
from fraqat_compiler.selection import selected

NAMES = [
    "pos_embed",
    "blocks.0.attn.qkv.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc1.bias",
    "blocks.1.attn.proj.weight",
    "blocks.1.mlp.fc2.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    ("text", "indexes"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("ff", [2, 3, 5]),
        ("attn", [1, 4]),
        ("blocks", [1, 2, 3, 4, 5]),
        ("blocks.*.mlp", [2, 3, 5]),
        ("blocks.*.mlp.*", [2, 3, 5]),
        ("attn, head", [1, 4, 6]),
        ("blocks.1", [4, 5]),
    ],
)
def test_groups_and_patterns(text: str, indexes: list[int]) -> None:
    assert selected(NAMES, text) == {NAMES[index] for index in indexes}


@pytest.mark.parametrize("text", ["", "blocks.7", "head,lm_head"])
def test_what_selects_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no module of the model matches"):
        selected(NAMES, text)


def test_a_group_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="no module of the model matches 'attn'"):
        selected(["0.weight"], "attn")
