"""Selective training: which parameters a fine-tune moves; the rest stay as they are, and are quantized all the same.

FraQAT's paper (arXiv 2510.14823) finds that training the feed-forward layers, the attention or the transformer blocks
alone is as good as training all, or better.
"""

from __future__ import annotations

from collections.abc import Collection

from fraqat_compiler.widths import matches, require_match

ALL = "all"
# Parts of dotted module names that common models use.
GROUPS: dict[str, frozenset[str]] = {
    "ff": frozenset(
        {"ff", "ff_context", "ffn", "mlp", "feed_forward", "feedforward", "conv_ff", "intermediate", "fc1", "fc2"}
    ),
    "attn": frozenset(
        {"attn", "attn1", "attn2", "attention", "self_attn", "cross_attn", "self_attention", "attn_qkv", "qkv"}
    ),
    "blocks": frozenset({"blocks", "transformer_blocks", "single_transformer_blocks", "layers", "layer", "h", "block"}),
}


def selected(parameters: Collection[str], text: str) -> set[str]:
    """The parameters that a text selects.

    Args:
        parameters: dotted names, the module's and the parameter's own.
        text: `all`, or a list with commas of groups (`ff`, `attn`, `blocks`: parameters below a module called so, see
            GROUPS) and of patterns over module names (`blocks.*.mlp`), which cover all that such a module holds.

    Raises:
        UsageError: a group or pattern that selects nothing.
    """
    chosen: set[str] = set()
    for part in (part.strip() for part in text.split(",")):
        found = {name for name in parameters if _is_in(part, name.rpartition(".")[0])}
        if not found:
            require_match(part or "(empty)", {name.rpartition(".")[0] for name in parameters} - {""})
        chosen |= found
    return chosen


def _is_in(part: str, module: str) -> bool:
    if not part:
        return False
    if part == ALL:
        return True
    if part in GROUPS and GROUPS[part] & {*module.split(".")}:
        return True
    return matches(part, module)
