"""Which passes and targets there are.

Built-in ones are a line in a table here; third parties register theirs as entry points in the groups
`fraqat_compiler.passes` and `fraqat_compiler.targets`, as `name = "module:Class"`. Each is imported when its name is
first used, so one that is broken, or defined twice, harms nobody who does not use it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypeVar, cast

from fraqat_compiler.errors import FraqatError, UsageError
from fraqat_compiler.pass_base import Pass
from fraqat_compiler.pipeline_text import Item, build, did_you_mean, parse, parse_one
from fraqat_compiler.target import Target

Kind = Literal["passes", "targets"]
P = TypeVar("P", Pass, Target)

BUILT_IN_OWNER = "fraqat_compiler"
BUILT_IN: Mapping[Kind, Mapping[str, str]] = {
    "passes": {
        "remove-no-ops": "fraqat_compiler.passes.remove_no_ops:RemoveNoOps",
        "fold-constants": "fraqat_compiler.passes.fold_constants:FoldConstants",
        "fold-batch-norm": "fraqat_compiler.passes.fold_batch_norm:FoldBatchNorm",
        "merge-dimensions": "fraqat_compiler.passes.merge_dimensions:MergeDimensions",
        "flatten-silus": "fraqat_compiler.passes.flatten_silus:FlattenSilus",
        "reduce-rank": "fraqat_compiler.passes.reduce_rank:ReduceRank",
        "simplify-shapes": "fraqat_compiler.passes.simplify_shapes:SimplifyShapes",
        "form-quotients": "fraqat_compiler.passes.form_quotients:FormQuotients",
        "fuse-rms-norm": "fraqat_compiler.passes.fuse_rms_norm:FuseRmsNorm",
        "fuse-gelu": "fraqat_compiler.passes.fuse_gelu:FuseGelu",
        "rotate-pairs": "fraqat_compiler.passes.rotate_pairs:RotatePairs",
        "decompose-attention": "fraqat_compiler.passes.decompose_attention:DecomposeAttention",
        "decompose-group-norm": "fraqat_compiler.passes.decompose_group_norm:DecomposeGroupNorm",
        "decompose-activations": "fraqat_compiler.passes.decompose_activations:DecomposeActivations",
        "decompose-pad": "fraqat_compiler.passes.decompose_pad:DecomposePad",
        "expand-outer-products": "fraqat_compiler.passes.expand_outer_products:ExpandOuterProducts",
        "mask-triangles": "fraqat_compiler.passes.mask_triangles:MaskTriangles",
        "convolve-average-pools": "fraqat_compiler.passes.convolve_average_pools:ConvolveAveragePools",
        "convolve-unfolds": "fraqat_compiler.passes.convolve_unfolds:ConvolveUnfolds",
        "resample-by-matrices": "fraqat_compiler.passes.resample_by_matrices:ResampleByMatrices",
        "transpose-cumsums": "fraqat_compiler.passes.transpose_cumsums:TransposeCumsums",
        "scatter-rows": "fraqat_compiler.passes.scatter_rows:ScatterRows",
        "weigh-norms": "fraqat_compiler.passes.weigh_norms:WeighNorms",
        "clip-masks": "fraqat_compiler.passes.clip_masks:ClipMasks",
        "split-low-rank": "fraqat_compiler.passes.split_low_rank:SplitLowRank",
        "insert-fake-quant": "fraqat_compiler.passes.insert_fake_quant:InsertFakeQuant",
        "freeze-bit-width": "fraqat_compiler.passes.freeze_bit_width:FreezeBitWidth",
        "export-onnx": "fraqat_compiler.passes.export_onnx:ExportOnnx",
        "fold-fake-quant": "fraqat_compiler.passes.fold_fake_quant:FoldFakeQuant",
        "drop-negligible-addends": "fraqat_compiler.passes.drop_negligible_addends:DropNegligibleAddends",
        "span-logarithms": "fraqat_compiler.passes.span_logarithms:SpanLogarithms",
        "share-qdq": "fraqat_compiler.passes.share_qdq:ShareQdq",
        "quantize-constants": "fraqat_compiler.passes.quantize_constants:QuantizeConstants",
        "convert-widths": "fraqat_compiler.passes.convert_widths:ConvertWidths",
        "align-concats": "fraqat_compiler.passes.align_concats:AlignConcats",
        "sign-factors": "fraqat_compiler.passes.sign_factors:SignFactors",
        "decompose-softplus": "fraqat_compiler.passes.decompose_softplus:DecomposeSoftplus",
        "expand-tanh": "fraqat_compiler.passes.expand_tanh:ExpandTanh",
        "flatten-tanh": "fraqat_compiler.passes.flatten_tanh:FlattenTanh",
        "span-softmax-inputs": "fraqat_compiler.passes.span_softmax_inputs:SpanSoftmaxInputs",
        "expand-constants": "fraqat_compiler.passes.expand_constants:ExpandConstants",
        "widen-codes": "fraqat_compiler.passes.widen_codes:WidenCodes",
        "pack-int4": "fraqat_compiler.passes.pack_int4:PackInt4",
    },
    "targets": {
        "onnxruntime": "fraqat_compiler.targets.onnxruntime:OnnxRuntimeTarget",
        "htp": "fraqat_compiler.targets.htp:HtpTarget",
        "aihub": "fraqat_compiler.targets.aihub:AiHubTarget",
    },
}
_SINGULAR = {"passes": "pass", "targets": "target"}


@dataclass(frozen=True)
class Entry:
    """One registered name, not imported yet.

    Attributes:
        kind: what it claims to be.
        name: its name in text.
        value: `module:Class`.
        owner: the distribution that registers it, with its version.
    """

    kind: Kind
    name: str
    value: str
    owner: str

    def load(self) -> type[Pass] | type[Target]:
        """Import the class.

        Raises:
            UsageError: the import fails, or what it gives is not a usable pass or target; the owner is named.
        """
        try:
            loaded = self._import()
        except FraqatError:
            raise
        except Exception as error:  # a plug-in may fail in any way; whose it is must be said
            raise self._unusable(f"its import failed with {type(error).__name__}: {error}") from error
        self._refuse_unfit(loaded)
        return cast("type[Pass] | type[Target]", loaded)

    def _import(self) -> object:
        module, _, attribute = self.value.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def _refuse_unfit(self, loaded: object) -> None:
        base = Pass if self.kind == "passes" else Target
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise self._unusable(f"it is not a subclass of {base.__module__}.{base.__name__}")
        if inspect.isabstract(loaded):
            raise self._unusable(f"it lacks {', '.join(sorted(loaded.__abstractmethods__))}")
        if getattr(loaded, "name", None) != self.name:
            raise self._unusable(f"the class calls itself {getattr(loaded, 'name', None)!r}")

    def _unusable(self, reason: str) -> UsageError:
        kind = _SINGULAR[self.kind]
        return UsageError(
            f'the {kind} "{self.name}" ({self.value}) of {self.owner} cannot be used: {reason}.',
            f"Repair or uninstall {self.owner.partition(' ')[0]}.",
        )


@dataclass(frozen=True)
class Row:
    """What a listing says about one registered name.

    Attributes:
        name, owner: as in `Entry`.
        irs: `fx -> onnx` for a pass, empty for a target.
        summary: first line of the class's docstring.
        error: why it cannot be used; None when it can.
    """

    name: str
    owner: str
    irs: str = ""
    summary: str = ""
    error: str | None = None


def entries(kind: Kind) -> dict[str, tuple[Entry, ...]]:
    """Every registered name in the order built-in, third-party; more than one entry is a clash."""
    found: dict[str, list[Entry]] = {}
    for entry in (*_built_in(kind), *_third_party(kind)):
        found.setdefault(entry.name, []).append(entry)
    return {name: tuple(same_name) for name, same_name in found.items()}


def _built_in(kind: Kind) -> Iterable[Entry]:
    return [Entry(kind, name, value, BUILT_IN_OWNER) for name, value in BUILT_IN[kind].items()]


def _third_party(kind: Kind) -> Iterable[Entry]:
    points = metadata.entry_points(group=f"fraqat_compiler.{kind}")
    return sorted(
        (Entry(kind, point.name, point.value, _owner(point)) for point in points),
        key=lambda entry: (entry.name, entry.owner),
    )


def _owner(point: metadata.EntryPoint) -> str:
    return "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        UsageError: the name is unknown, defined twice, or its class cannot be used.
    """
    return cast("type[Pass]", _only(entries("passes"), "passes", name).load())


def find_target(name: str) -> type[Target]:
    """The target class of that name. Raises like `find_pass`."""
    return cast("type[Target]", _only(entries("targets"), "targets", name).load())


def _only(known: Mapping[str, tuple[Entry, ...]], kind: Kind, name: str) -> Entry:
    if name not in known:
        raise UsageError(_unknown(known, kind, name))
    if len(known[name]) > 1:
        raise UsageError(_clash(known[name]), "Uninstall one of them.")
    return known[name][0]


def _unknown(known: Iterable[str], kind: Kind, name: str) -> str:
    return f'there is no {_SINGULAR[kind]} "{name}".{did_you_mean(name, known)} Known {kind}: {", ".join(known)}.'


def _clash(same_name: tuple[Entry, ...]) -> str:
    owners = " and ".join(f"{entry.owner} ({entry.value})" for entry in same_name)
    return f'the {_SINGULAR[same_name[0].kind]} "{same_name[0].name}" is defined more than once: by {owners}.'


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of a pipeline text.

    Raises:
        PipelineSyntaxError: the text does not follow the grammar.
        UsageError: a pass or an option is unknown or cannot be used.
    """
    known = entries("passes")
    return tuple(cast(Pass, _built(item, known, "passes")) for item in parse(text))


def parse_target(text: str) -> Target:
    """The target of a text such as `htp{soc=sm8750}`. Raises like `parse_pipeline`."""
    return cast(Target, _built(parse_one(text, "a target"), entries("targets"), "targets"))


def _built(item: Item, known: Mapping[str, tuple[Entry, ...]], kind: Kind) -> Pass | Target:
    if item.name not in known:
        raise UsageError(item.position.pointing(_unknown(known, kind, item.name)))
    return build(_only(known, kind, item.name).load(), item.options)


def available(kind: Kind) -> list[Row]:
    """One row for each registered name and owner; what cannot be used has its error in the row."""
    return [_row(entry, same_name) for same_name in entries(kind).values() for entry in same_name]


def _row(entry: Entry, same_name: tuple[Entry, ...]) -> Row:
    if len(same_name) > 1:
        return Row(entry.name, entry.owner, error=_clash(same_name))
    try:
        loaded = entry.load()
    except FraqatError as error:
        return Row(entry.name, entry.owner, error=str(error))
    irs = f"{loaded.reads} -> {loaded.writes}" if issubclass(loaded, Pass) else ""
    return Row(entry.name, entry.owner, irs, summary(loaded))


def summary(documented: type) -> str:
    """First line of a class's own docstring."""
    return (inspect.cleandoc(documented.__doc__ or "")).partition("\n")[0]
