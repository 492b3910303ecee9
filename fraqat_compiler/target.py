"""What a hardware target is: the contract that every target, built in or third-party, fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray

from fraqat_compiler.errors import TargetError
from fraqat_compiler.quant_spec import QuantSpec, Unquantized

if TYPE_CHECKING:
    from fraqat_compiler.progress import Progress

Role = Literal["weight", "bias", "activation", "norm_weight", "constant"]
Source = Literal["device", "simulator", "host", "estimate"]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorRequest:
    """One tensor about which the insert pass asks the target.

    Attributes:
        op: op class of the node that consumes (weight, bias, constant) or produces (activation) the tensor, one of
            `fraqat_compiler.ops.OP_CLASSES`.
        role: what the tensor is to that op.
        shape: its shape.
        bit_width: the width the user asked for (weights: of the layer; activations: of the tensor).
        activation_bit_width: width of the activations around it.
        channel_axis: the dimension of a weight that counts output channels; None for other roles.
        depthwise: the weight belongs to a depthwise or grouped convolution.
        function: that node's own name, as `aten.sigmoid`.
        tied: other ops read the tensor too, as a head that is an embedding's table.
        factor: a product of two activations reads the tensor as its second one, perhaps transposed or reshaped.
        resampling: the weight is a matrix that pass resample-by-matrices made.
    """

    op: str
    role: Role
    shape: tuple[int, ...]
    bit_width: float
    activation_bit_width: float
    channel_axis: int | None = None
    depthwise: bool = False
    function: str = ""
    tied: bool = False
    factor: bool = False
    resampling: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that `check` has to say about one node.

    Attributes:
        node: name of the node in the ONNX file (it starts with the user's module path).
        op: ONNX op type.
        verdict: `runs`, `refused`, or `wrong` for what the hardware accepts but computes wrongly.
        reason: why, in words.
        remedy: what to do about it.
        log: what the vendor's library printed, where it refused.
    """

    node: str
    op: str
    verdict: Literal["runs", "refused", "wrong"]
    reason: str = ""
    remedy: str = ""
    log: str = field(default="", repr=False)


@dataclass(frozen=True)
class Artifact:
    """What `compile` made.

    Attributes:
        path: the file that is loaded on the device.
        files: every file that belongs to it, `path` included.
        target_text: the target's text, which parses back to the same target.
        details: facts that a report shows (SoC, architecture, nodes per processor ...); JSON values only. Two have a
            place in its summary: `fallback_nodes`, the number of nodes that do not run on the target's own processor,
            and `soc`, the name of the chip.
    """

    path: Path
    files: tuple[Path, ...]
    target_text: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Sample:
    """One sample that shows whether an artifact computes what it should.

    Attributes:
        inputs: by name.
        expected: the trained graph's outputs, by name.
        steps: size of one step of the quantizer of an output; none for an output in float.
    """

    inputs: Arrays
    expected: Arrays
    steps: Mapping[str, float]


@dataclass(frozen=True)
class Profile:
    """Where the time goes.

    Attributes:
        source: who measured: a device, a simulator of it, this host, or an estimate. Never mixed.
        latency_ms: time of one inference; None where the source cannot know (a simulator counts cycles, not time).
        peak_memory_bytes: None where unknown.
        ops: one mapping for each op: `name`, and what the source counts under the key `unit` ("cycles", "ms" ...).
        unit: what the numbers in `ops` count, and their key there.
        notes: what a reader must know to not misread the figures.
    """

    source: Source
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None
    ops: tuple[Mapping[str, Any], ...] = ()
    unit: str = "ms"
    notes: tuple[str, ...] = ()


def default_quant_spec(request: TensorRequest) -> QuantSpec:
    """What suits every integer runtime that reads QDQ.

    Symmetric weights per channel, asymmetric unsigned activations per tensor, int32 biases.
    """
    if request.role == "weight":
        return QuantSpec(bit_width=request.bit_width, axis=request.channel_axis)
    if request.role == "bias":
        return QuantSpec(bit_width=32, axis=0)
    if request.role == "norm_weight":
        return QuantSpec(bit_width=8, symmetric=False, signed=False)
    return QuantSpec(bit_width=request.bit_width, symmetric=False, signed=False)


@dataclass(frozen=True)
class Target(ABC):
    """A hardware target. A subclass is a frozen dataclass whose fields are its options (`htp{soc=sm8750}`).

    The life of a target in one compile: `missing`, `quant_spec` for each tensor, `lower_pipeline`, `check` (before the
    fine-tune, on a draft of the file), `compile`, `run`, `profile`.
    """

    name: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """What has to be installed before this target can compile, as one sentence; None when nothing is missing."""
        return None

    def opened(self, folder: Path, progress: Progress, resume: bool) -> Target:
        """The target for work on one output folder; the default needs none of this and is the target itself.

        Args:
            folder: for what must be found again after Ctrl-C or a crash, such as ids of remote jobs; it outlives a
                compile that fails, and may not exist yet.
            progress: hears of slow work.
            resume: go on from what `folder` holds.
        """
        return self

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        """How the tensor shall be quantized.

        The default is `default_quant_spec`.
        """
        return default_quant_spec(request)

    def prepare_pipeline(self) -> str:
        """Pipeline text of the passes that run between capture and `insert-fake-quant`."""
        return (
            "remove-no-ops,fold-constants,fold-batch-norm,decompose-attention,decompose-group-norm,"
            "decompose-activations,clip-masks"
        )

    def lower_pipeline(self) -> str:
        """Pipeline text from the trained FX graph to the ONNX graph that `compile` takes."""
        return "freeze-bit-width,export-onnx,fold-fake-quant,share-qdq,quantize-constants,pack-int4"

    @abstractmethod
    def check(self, model: Path) -> list[Finding]:
        """Can the hardware run this ONNX file?

        One finding for each node; QuantizeLinear and DequantizeLinear, which belong to their neighbours, may be left
        out.

        Raises:
            TargetError: there is no such file, or it is damaged.
        """

    @abstractmethod
    def compile(self, model: Path, output: Path) -> Artifact:
        """Compile the ONNX file `model` into folder `output` (which exists).

        The same file gives the same bytes. File names are fixed, so that the folder can be moved and loaded.

        Raises:
            TargetError: the file cannot be compiled whole; nothing half-written is left.
        """

    @abstractmethod
    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        """Run the artifact on the hardware, or on the nearest thing to it here, and return its outputs by name.

        Raises:
            TargetError: the artifact is damaged, or the inputs do not fit it.
        """

    def run_all(self, artifact: Artifact, samples: Sequence[Arrays]) -> list[Arrays]:
        """`run` for each sample; a target on which one run is dear does them all at once."""
        return [self.run(artifact, inputs) for inputs in samples]

    @abstractmethod
    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        """Profile one inference."""

    def estimate(self, model: Path) -> Profile | None:
        """How long the ONNX file will take on the real hardware, without it: a Profile of source "estimate".

        Its notes say how far it may err. None, the default, where the target cannot tell.
        """
        return None

    @abstractmethod
    def load(self, folder: Path, target_text: str) -> Artifact:
        """The artifact that an earlier `compile` left in `folder`, equal to what that returned but for its place.

        Raises:
            TargetError: the folder does not hold it.
        """

    def bundle(self, artifact: Artifact, sample: Sample, folder: Path) -> None:
        """Fill the empty `folder` with all that one needs to run the artifact on the hardware, commands included.

        Raises:
            TargetError: the target makes no such folder, as by default, or the artifact does not run.
        """
        files = ", ".join(file.name for file in artifact.files)
        raise TargetError(f'target "{self.name}" makes no bundle.', f"Its artifact is {files}.")
