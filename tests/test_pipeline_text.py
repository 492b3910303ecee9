from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from fraqat_compiler.errors import PipelineSyntaxError, UsageError
from fraqat_compiler.pipeline_text import Item, build, join, parse, parse_one, to_text


@dataclass(frozen=True)
class Sample:
    name: ClassVar[str] = "sample-pass"
    weights: str = "4"
    bits: float = 8.0
    steps: int | None = None
    strict: bool = False
    skip: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    vtcm_mb: int = 8
    mode: Literal["fast", "slow"] = "fast"
    opset: Literal[21, 22] = 21
    label: str | None = None


@dataclass(frozen=True)
class Needy:
    name: ClassVar[str] = "needy"
    path: str


def built(text: str) -> Sample:
    return build(Sample, parse_one(text, "a sample").options)


def raw_options(item: Item) -> dict[str, str]:
    return {option.name: option.value for option in item.options}


def test_items_keep_names_and_raw_options() -> None:
    text = ' a{x=1 y-z=4,lm_head=8 q="a \\"b\\" \\\\ {c}"} , b-c{ },d '
    first, second, third = parse(text)
    assert (first.name, second.name, third.name) == ("a", "b-c", "d")
    assert raw_options(first) == {"x": "1", "y-z": "4,lm_head=8", "q": 'a "b" \\ {c}'}
    assert second.options == () and third.position.offset == text.index("d ")


def test_blank_text_is_the_empty_pipeline() -> None:
    assert parse(" ") == () and join(()) == ""


@pytest.mark.parametrize(
    ("text", "caret", "words"),
    [
        ("a,", 2, "expected a name, found the end"),
        ("a b", 2, 'expected "," or the end'),
        ("a{x}", 3, 'expected "=" after the option "x"'),
        ("a{x=}", 4, 'expected the value of "x"'),
        ('a{x="1}', 4, "closing quote"),
        ('a{x="1"y=2}', 7, 'expected a blank or "}"'),
        ("a{x=1", 5, 'expected a blank or "}"'),
        ("a{x=1 ", 6, 'expected an option or "}"'),
        ("a{x=1}}", 6, "expected"),
        ("4bit", 0, "expected a name"),
    ],
)
def test_syntax_errors_point_at_the_place(text: str, caret: int, words: str) -> None:
    with pytest.raises(PipelineSyntaxError) as caught:
        parse(text)
    problem, line, pointer = str(caught.value).splitlines()
    assert words in problem
    assert line == f"  {text}"
    assert pointer.index("^") - 2 == caret


def test_the_caret_stays_in_its_line() -> None:
    with pytest.raises(PipelineSyntaxError) as caught:
        parse("a,\nb{x},\nc")
    assert str(caught.value).splitlines()[1:] == ["  b{x},", "     ^"]


def test_one_item_is_neither_none_nor_two() -> None:
    with pytest.raises(PipelineSyntaxError, match="expected the name of a target"):
        parse_one("", "a target")
    with pytest.raises(PipelineSyntaxError, match="found another"):
        parse_one("htp,onnxruntime", "a target")


def test_values_take_the_type_of_their_field() -> None:
    options = "weights=4,lm_head=8 bits=5.5 steps=3 strict=true skip=a.b,*.c sizes=4 vtcm-mb=2 mode=slow opset=22"
    text = f"sample-pass{{{options}}}"
    sample = built(text)
    assert sample == Sample("4,lm_head=8", 5.5, 3, True, ("a.b", "*.c"), (4,), 2, "slow", 22)
    assert to_text(sample) == text


@pytest.mark.parametrize(
    "sample",
    [
        Sample(),
        Sample(bits=4, label="none"),
        Sample(weights="", label='two "words" \\ {x}\n'),
        Sample(sizes=(), skip=("a b", "c")),
        Sample(bits=1e-7, steps=0, label="None"),
        Sample(weights="none", bits=float("inf")),
    ],
)
def test_printing_parses_back_to_the_same(sample: Sample) -> None:
    text = to_text(sample)
    assert built(text) == sample
    assert to_text(built(text)) == text


def test_defaults_are_left_out() -> None:
    assert to_text(Sample()) == "sample-pass"
    assert to_text(Sample(bits=8, sizes=(1, 2), opset=22)) == "sample-pass{opset=22}"
    assert built("sample-pass{steps=none}") == Sample()


def test_none_quoted_is_text() -> None:
    assert built('sample-pass{label="none"}').label == "none"
    assert built("sample-pass{label=none}").label is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("bits=x", '"bits" takes a number, not "x"'),
        ("bits=nan", "takes a number"),
        ("steps=1.5", "takes a whole number or none"),
        ("strict=1", "takes true or false"),
        ("mode=slo", 'takes one of fast, slow, not "slo". Did you mean "slow"?'),
        ("sizes=1,x", "takes a list with commas"),
        ("skip=a,,b", "An element is empty"),
    ],
)
def test_wrong_values_say_what_is_wanted(option: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        built(f"sample-pass{{{option}}}")
    assert words in str(caught.value)
    assert str(caught.value).splitlines()[2].index("^") == len("  sample-pass{")


@pytest.mark.parametrize("name", ["vtcm-md", "vtcm_mb"])
def test_an_unknown_option_gets_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        built(f"sample-pass{{{name}=4}}")
    assert f'no option "{name}". Did you mean "vtcm-mb"?' in str(caught.value)
    assert "weights, bits, steps" in str(caught.value)


def test_a_repeated_or_missing_option_is_refused() -> None:
    with pytest.raises(UsageError, match='"bits" is given twice'):
        built("sample-pass{bits=4 bits=5}")
    with pytest.raises(UsageError, match='"needy" needs the option "path"'):
        build(Needy)
    assert to_text(Needy("x")) == "needy{path=x}"


def test_a_list_element_with_a_comma_cannot_be_printed() -> None:
    with pytest.raises(UsageError, match="element of a list"):
        to_text(Sample(skip=("a,b",)))
