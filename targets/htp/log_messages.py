"""The library's log, turned into nodes, reasons and remedies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

_UNIT = re.compile(r"Validation (PASSED|FAILED) for \d+ nodes in OrtNodeUnit \((\w+)\)")
_MEMBER = re.compile(r"Operator type: (\w+) Node name: (.*?) Node index: \d+")
_REASON = re.compile(r"REASON : (.*)")
_CODE = re.compile(r"backendValidateOpConfig\(\) failed for node `(.*?)` of type `(\w+)` with error code (\d+)")
_PREFIX = re.compile(r"^(\w+: )?(\[ONNXRuntimeError\] : \d+ : \w+ : )?(Load model from \S+ failed: ?)?")
_TAIL = re.compile(r"\w+ node `.*` will not be assigned to QNN EP\.?$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

CODES = {
    3110: "no kernel of the HTP takes these data types, ranks or quantization parameters together",
    1002: "the graph does not fit: the compiler ran out of memory, which a constant of huge magnitude also causes",
    1003: "a parameter of the op is invalid",
    5005: "the graph could not be composed",
}

# (what the log or the op says, what to do about it); the first that fits is told.
REMEDIES = (
    (re.compile(r"\bErf\b"), "Keep GELU as one op (torch.nn.functional.gelu), not written out with erf."),
    (re.compile(r"rank=([6-9]|\d\d)"), "Rewrite it with at most 5 dimensions."),
    (re.compile(r"\b(GatherND|And|Or|Not|Where)\b"), "Give the attention mask as a 4-D additive float input."),
    (re.compile(r"\bSqueeze\b"), "Squeeze only dimensions of size 1."),
    (re.compile(r"\b(LSTM|GRU|RNN|Loop|If|Scan)\b"), "Unroll it; capture does so for LSTM, GRU and RNN modules."),
    (re.compile(r"\b(NonZero|Unique|NonMaxSuppression)\b"), "Keep what depends on values outside the model."),
    (re.compile(r"\bConvTranspose rank=4"), "Write a grouped transposed convolution as one without groups."),
    (re.compile(r"\bConv rank=5"), "Give 3-D convolutions 8-bit weights: --weights 4,NAME=8."),
    (
        re.compile(r"not supported by QNN|unsupported equation", re.IGNORECASE),
        "Write it with other torch ops, or keep this part outside the model.",
    ),
    (re.compile(r"code 1002"), "Clip constants of huge magnitude, as masks hold them, or split the model."),
)
DEFAULT_REMEDY = "Leave its module out with --skip, or change --weights or --activations for it."


@dataclass(frozen=True)
class NodeVerdict:
    """What the library said of one node.

    Attributes:
        node, op: name and type in the ONNX file.
        accepted: whether the HTP runs it.
        reason, remedy: empty when accepted.
    """

    node: str
    op: str
    accepted: bool
    reason: str = ""
    remedy: str = ""


def node_verdicts(log: str) -> dict[str, NodeVerdict]:
    """The library's last verdict on each node, by node name, from a log of severity 0."""
    plain = _ANSI.sub("", log)
    codes = {match[1]: (match[2], int(match[3])) for match in _CODE.finditer(plain)}
    verdicts: dict[str, NodeVerdict] = {}
    for accepted, op, members, reason in _units(plain):
        for member_op, name in members:
            if member_op != op:  # the quantizers around the op share its verdict, but not its blame
                continue
            why = "" if accepted else _reason(name, reason, codes)
            verdicts[name] = NodeVerdict(name, op, accepted, why, "" if accepted else remedy_for(f"{op} {why}"))
    return verdicts


def _units(log: str) -> Iterator[tuple[bool, str, list[tuple[str, str]], str]]:
    """(accepted, op, members, reason) for every verdict of the log, in order."""
    matches = list(_UNIT.finditer(log))
    for match, following in zip_longest(matches, matches[1:]):
        block = log[match.end() : following.start() if following else match.end() + 2000]
        reason = _REASON.search(block)
        members = [(item[1], item[2]) for item in _MEMBER.finditer(block[: reason.start() if reason else None])]
        yield match[1] == "PASSED", match[2], members, reason[1].strip() if reason else ""


def _reason(name: str, reason: str, codes: dict[str, tuple[str, int]]) -> str:
    if name not in codes:
        return _TAIL.sub("", reason).rstrip(". ") or "the library gives no reason"
    qnn_op, code = codes[name]
    return f"{CODES.get(code, 'refused')} (QNN op {qnn_op}, code {code})"


def remedy_for(text: str) -> str:
    """What to do about a message."""
    return next((remedy for pattern, remedy in REMEDIES if pattern.search(text)), DEFAULT_REMEDY)


def explain(message: str, log: str) -> str:
    """One clause for a failure that names no node: what the error's code means, or the library's own words."""
    text = _ANSI.sub("", f"{message}\n{log}")
    if "assigned to the default CPU EP" in text or "was not selected by that EP" in text:
        return "the HTP has no kernel for it"
    for code, meaning in CODES.items():
        if re.search(rf"(error|code|err)\D{{0,12}}{code}\b", text, re.IGNORECASE):
            return f"{meaning} (code {code})"
    if "MEM_ALLOC" in text:
        return f"{CODES[1002]} (MEM_ALLOC)"
    return _PREFIX.sub("", " ".join(message.split())).rstrip(". ") or "the library gives no reason"
