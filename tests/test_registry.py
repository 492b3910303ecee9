from __future__ import annotations

import pytest

from fraqat_compiler import registry
from fraqat_compiler.errors import UsageError


def test_every_built_in_pass_loads_under_its_name() -> None:
    for row in registry.available("passes"):
        assert row.error is None, row
        assert row.owner == "fraqat_compiler"
        assert row.irs in ("fx -> fx", "fx -> onnx", "onnx -> onnx")
        assert row.summary.endswith(".")


def test_every_built_in_target_loads_under_its_name() -> None:
    rows = registry.available("targets")
    assert {"onnxruntime", "htp"} <= {row.name for row in rows}
    assert [row.error for row in rows] == [None] * len(rows)


def test_an_unknown_pass_points_at_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        registry.parse_pipeline("remove-no-ops,fold_batchnorm{x=1}")
    problem, _, caret = str(caught.value).splitlines()
    assert 'there is no pass "fold_batchnorm". Did you mean "fold-batch-norm"?' in problem
    assert "remove-no-ops" in problem.partition("Known passes:")[2]
    assert caret.index("^") == len("  remove-no-ops,")


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r'no target "hpt"\. Did you mean "htp"'):
        registry.parse_target("hpt{soc=sm8750}")
    with pytest.raises(UsageError, match='no pass "htp"'):
        registry.find_pass("htp")


def test_a_built_in_that_cannot_be_imported_names_its_owner() -> None:
    entry = registry.Entry("passes", "lost", "fraqat_compiler.passes.lost:Lost", "acme 1.0")
    with pytest.raises(UsageError, match=r'"lost" \(.*\) of acme 1.0 cannot be used: .*ModuleNotFoundError') as caught:
        entry.load()
    assert "uninstall acme." in str(caught.value)
