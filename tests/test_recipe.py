"""Recipes: their text, what excludes what, and that every ingredient reaches the fine-tune."""

from __future__ import annotations

from typing import Any

import pytest
from fine_tune_job import build

from fraqat_compiler.blended_grid import BlendedWeightFakeQuantize
from fraqat_compiler.errors import PipelineSyntaxError, UsageError
from fraqat_compiler.learned_ranges import LearnedWeightFakeQuantize
from fraqat_compiler.recipe import INGREDIENTS, parse_recipe
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.stabilizers import Ema, FreezeOscillations
from fraqat_compiler.training_setup import apply_recipe, make_config, own_parameters


def test_texts_parse_and_print() -> None:
    text = "adamw{weight-decay=0.01 betas=0.9,0.95 grad-clip=none state=reset},ema{decay=0.99},lsq-plus{rate=5}"
    recipe = parse_recipe(text)
    assert str(recipe) == text
    assert str(parse_recipe("")) == ""


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_ingredient_stands_alone_and_documents_itself(name: str) -> None:
    assert str(parse_recipe(name)) == name
    doc = INGREDIENTS[name].__doc__
    assert doc is not None and ("arXiv" in doc or "1992" in doc), "names its source"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("adam", UsageError, 'no ingredient "adam".*Did you mean "adamw"'),
        ("ema,ema{decay=0.9}", UsageError, "'ema' twice"),
        ("lsq,lsq-plus", UsageError, "one grid"),
        ("lsq,blended-grid", UsageError, "lsq and blended-grid: a weight has one grid"),
        ("ema{rate=1}", UsageError, 'no option "rate"'),
        ("ema lsq", PipelineSyntaxError, 'expected ","'),
        ("adamw{state=forget}", UsageError, "one of keep, reset"),
    ],
)
def test_bad_texts_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        parse_recipe(text)


def test_learned_activations_go_with_blended_weights() -> None:
    recipe = parse_recipe("lsq{weights=false},blended-grid")
    assert recipe.learned_ranges is not None and recipe.blended_grid is not None


def test_ingredients_reach_the_config() -> None:
    recipe = parse_recipe("freeze-oscillations,adamw{weight-decay=0.1 warmup=3 state=reset},ema,lsq{rate=7}")
    config = make_config(parse_schedule("direct"), 20, recipe, "mse,kl{weight=2}", 5, lr=None, checkpoint_every=4)
    assert (config.weight_decay, config.warmup, config.optimizer_state, config.range_rate) == (0.1, 3, "reset", 7)
    assert config.stabilizers == (FreezeOscillations(), Ema())
    assert (config.lr, config.checkpoint_every, config.seed) == (2e-4, 4, 5)
    identity = config.run_identity()
    assert identity["loss"] == "mse,kl{weight=2}" and identity["stabilizers"] == "freeze-oscillations,ema"
    with pytest.raises(UsageError, match="betas"):
        make_config(parse_schedule("direct"), 2, parse_recipe("adamw{betas=0.9}"), "mse", 0)


@pytest.mark.parametrize(
    ("text", "kind"), [("lsq", LearnedWeightFakeQuantize), ("blended-grid", BlendedWeightFakeQuantize)]
)
def test_the_student_gets_the_quantizers_that_the_recipe_names(text: str, kind: type[Any]) -> None:
    _, student = build()
    trained = own_parameters(student, "all")
    apply_recipe(student, parse_recipe(text), trained)
    assert sum(isinstance(module, kind) for module in student.modules()) == 3
