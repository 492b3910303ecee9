"""The sizes of the study: one configuration for each amount of compute and each kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from kinds import KINDS, Kind


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ABC):
    """One size of the study.

    Attributes:
        subject: the kind of model, one of KINDS.
        batch: samples in a batch of the fine-tune and of calibration.
        steps: of every arm's fine-tune.
        seeds: how many runs each trained arm has; they are 1, 2, ...
        learning_rates: every arm is tried with each, on a seed of its own, and keeps its best.
        sweep_repeats: seeds that an arm of the headline is tried with at the first precision, 3 at most; the mean
            counts.
    """

    subject: ClassVar[str]
    name: str
    batch: int
    steps: int
    seeds: int
    learning_rates: tuple[float, ...]
    sweep_repeats: int = 1

    @property
    def kind(self) -> Kind:
        """What all models of its kind have in common."""
        return KINDS[self.subject]

    @property
    @abstractmethod
    def title(self) -> str:
        """Behind the name, as a heading."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Its size in words."""

    @property
    def fine_tune(self) -> str:
        """The fine-tune in words."""
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        return f"fine-tune with batches of {self.batch}; learning rates {rates}"

    def to_json(self) -> dict[str, Any]:
        """JSON form from which `config_of` makes it again."""
        return {"subject": self.subject} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(StudyConfig):
    """A class-conditional diffusion transformer, whose teacher the study trains.

    Attributes:
        dataset: what the teacher is trained on; that of `digits` is the example's own.
        width, depth, heads, patch_size: of the transformer.
        teacher_steps, teacher_batch: of the teacher's training.
        images: drawn by each arm and by the teacher, in batches of the fine-tune's size.
        sampling_steps: of Euler's method for each image.
    """

    subject = "images"
    dataset: Literal["digits", "fashion", "cifar10"]
    width: int
    depth: int
    heads: int
    patch_size: int
    teacher_steps: int
    teacher_batch: int
    images: int
    sampling_steps: int

    @property
    def image_size(self) -> int:
        """Pixels of a side; Fashion-MNIST's 28 are padded."""
        return 8 if self.dataset == "digits" else 32

    @property
    def channels(self) -> int:
        """Of an image."""
        return 3 if self.dataset == "cifar10" else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.images:,} images, {self.steps:,} steps"

    @property
    def description(self) -> str:
        return (
            f"Class-conditional DiT of width {self.width}, depth {self.depth}, patch {self.patch_size}; teacher "
            f"trained for {self.teacher_steps:,} batches of {self.teacher_batch}; {self.fine_tune}; "
            f"{self.sampling_steps} sampling steps."
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig(StudyConfig):
    """A pretrained model of text, tuned on State of the Union addresses.

    Attributes:
        length: tokens of a window.
        windows: of each text that an arm is measured on.
        sweep_windows: of the addresses that learning rates are chosen on.
    """

    length: int
    windows: int
    sweep_windows: int

    @property
    def measured(self) -> str:
        """What an arm is measured on, in words."""
        return (
            f"measured on {self.windows} windows of Moby Dick and as many of addresses that no arm was tuned on, "
            f"spread evenly; {self.fine_tune}."
        )


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TextConfig):
    """SmolLM2-135M-Instruct.

    Attributes:
        agreement_windows: on which the fake-quantized graph is held against the file.
    """

    subject = "language"
    agreement_windows: int

    @property
    def title(self) -> str:
        return f"SmolLM2-135M, {self.steps:,} steps"

    @property
    def description(self) -> str:
        return (
            "SmolLM2-135M-Instruct, whose weights were once Q4_1: the float model lies on a 4-bit grid itself (groups "
            f"of 32, with offsets). Windows of {self.length} tokens; {self.measured}"
        )


@dataclass(frozen=True, kw_only=True)
class SentenceConfig(TextConfig):
    """MiniLM-L6, a sentence encoder."""

    subject = "sentences"

    @property
    def title(self) -> str:
        return f"MiniLM-L6, {self.steps:,} steps"

    @property
    def description(self) -> str:
        return (
            f"Sentence encoder of 22.7 M parameters, on passages of {self.length} tokens; its embeddings are held "
            f"against the float model's; {self.measured}"
        )


_CLASSES = {config.subject: config for config in (ImageConfig, LanguageConfig, SentenceConfig)}


def config_of(content: Mapping[str, Any]) -> StudyConfig:
    """A configuration from its JSON form; one without `subject` is of images."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    make: type[Any] = _CLASSES[fields.pop("subject", ImageConfig.subject)]
    config: StudyConfig = make(**fields)
    return config


_TEXT_LM = LanguageConfig(  # an hour on one core
    name="text-lm",
    length=128,
    windows=16,
    sweep_windows=8,
    agreement_windows=4,
    batch=2,
    steps=20,
    seeds=1,
    learning_rates=(1e-4,),
)

CONFIGS: dict[str, StudyConfig] = {
    config.name: config
    for config in (
        ImageConfig(  # every part once, in a minute or two: its figures mean nothing
            name="smoke",
            dataset="fashion",
            width=32,
            depth=1,
            heads=2,
            patch_size=4,
            teacher_steps=20,
            teacher_batch=16,
            batch=16,
            steps=18,
            seeds=2,
            learning_rates=(1e-3,),
            images=64,
            sampling_steps=4,
        ),
        ImageConfig(  # the teacher that the example ships; within an hour on two cores
            name="digits",
            dataset="digits",
            width=128,
            depth=4,
            heads=4,
            patch_size=2,
            teacher_steps=0,
            teacher_batch=0,
            batch=40,
            steps=100,
            seeds=5,
            learning_rates=(2e-5, 6e-5, 2e-4),
            images=1000,
            sampling_steps=16,
        ),
        ImageConfig(  # to its end in two hours on two cores
            name="cpu",
            dataset="fashion",
            width=96,
            depth=4,
            heads=4,
            patch_size=4,
            teacher_steps=6000,
            teacher_batch=64,
            batch=32,
            steps=120,
            seeds=5,
            learning_rates=(6e-5, 2e-4, 6e-4),
            sweep_repeats=3,
            images=768,
            sampling_steps=16,
        ),
        ImageConfig(  # for a data-centre GPU
            name="gpu",
            dataset="fashion",
            width=256,
            depth=8,
            heads=4,
            patch_size=4,
            teacher_steps=40_000,
            teacher_batch=256,
            batch=128,
            steps=2500,
            seeds=5,
            learning_rates=(1e-4, 3e-4, 1e-3),
            images=10_000,
            sampling_steps=32,
        ),
        ImageConfig(
            name="gpu-cifar",
            dataset="cifar10",
            width=384,
            depth=12,
            heads=6,
            patch_size=2,
            teacher_steps=100_000,
            teacher_batch=256,
            batch=128,
            steps=2500,
            seeds=5,
            learning_rates=(1e-4, 3e-4),
            images=10_000,
            sampling_steps=50,
        ),
        _TEXT_LM,
        replace(_TEXT_LM, name="text-lm-200", steps=200),  # two hours on one core, for two arms
        SentenceConfig(  # half an hour on one core
            name="text-embed",
            length=64,
            windows=128,
            sweep_windows=64,
            batch=8,
            steps=40,
            seeds=3,
            learning_rates=(1e-4, 3e-4),
        ),
    )
}
