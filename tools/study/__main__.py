"""Run the study: load or train the teacher, sweep the learning rates, run every arm, write the tables and plots.

    python tools/study smoke                 # every part once
    python tools/study digits                # the example's teacher; an hour on two cores
    python tools/study cpu --data DIR        # two hours on two cores
    python tools/study gpu --arms direct,fraqat --precisions W4A8
    python tools/study text-lm --data DIR    # a language model
    python tools/study text-embed --data DIR # a sentence encoder
    python tools/study page                  # docs/study.md again, when notes beside the results have changed

What is done is kept under --out and not done again, so it can be cut off at any moment. Results come seed by seed, the
headline's arms first; `docs/study.md` is written anew from them after every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "digits_dit"))  # its model, noise and sampler serve larger images too

import generator  # noqa: E402
import language_model  # noqa: E402
import sentence_encoder  # noqa: E402
from arms import ARMS, HEADLINE  # noqa: E402
from images import FASHION_FOLDER  # noqa: E402
from runs import Bench, RunKey  # noqa: E402
from study_config import CONFIGS, ImageConfig, LanguageConfig, SentenceConfig, StudyConfig  # noqa: E402
from subject import MissingDataError, Subject  # noqa: E402
from summary import save_samples, write_page, write_summary  # noqa: E402

PAGE = "page"


def main() -> None:
    """Run the study from the command line."""
    options = _options()
    if options.config == PAGE:
        write_page(options.docs)
        return
    try:
        _study(options)
    except (MissingDataError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=[*CONFIGS, PAGE], help="size of the study")
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study", help="folder for the results")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms, with commas")
    parser.add_argument("--precisions", help="of those that its kind of models has, with commas; by default the first")
    parser.add_argument("--seeds", type=int, help="runs of each trained arm; the configuration has a number of its own")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for study.md")
    options = parser.parse_args()
    if options.config == PAGE:
        return options
    precisions = CONFIGS[options.config].kind.precisions
    options.precisions = options.precisions or next(iter(precisions))
    for given, known in ((options.arms, ARMS), (options.precisions, precisions)):
        for name in given.split(","):
            if name not in known:
                parser.error(f"unknown {name!r}; known: {', '.join(known)}")
    return options


def _study(options: argparse.Namespace) -> None:
    config = CONFIGS[options.config]
    folder = options.out / config.name
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, prepare(config, options.data, folder), folder)
    seeds = range(1, (options.seeds or config.seeds) + 1)
    arms = sorted(options.arms.split(","), key=_headline_first)
    if isinstance(bench.subject, generator.Generator):
        save_samples(bench.subject.judge.teacher, options.docs, config)
    bench.float_metrics()
    for precision in options.precisions.split(","):
        for key in runs_of(bench, precision, arms, seeds):
            bench.result(key)
            write_summary(folder, options.docs, config)


def prepare(config: StudyConfig, data: Path | None, folder: Path) -> Subject:
    """Load or train the teacher, and what the arms are measured against."""
    if isinstance(config, LanguageConfig):
        return language_model.prepare(config, data)
    if isinstance(config, SentenceConfig):
        return sentence_encoder.prepare(config, data)
    assert isinstance(config, ImageConfig)
    return generator.prepare(config, data or FASHION_FOLDER, folder)


def _headline_first(arm: str) -> int:
    return HEADLINE.index(arm) if arm in HEADLINE else len(HEADLINE)


def runs_of(bench: Bench, precision: str, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[RunKey]:
    """The runs of a precision: every arm with one seed, then with the next, so that a study cut short compares them."""
    for arm in arms:
        if not ARMS[arm].trains:
            yield RunKey(precision, arm, None, 0)
    trained = [arm for arm in arms if ARMS[arm].trains]
    rates = {arm: bench.best_rate(precision, ARMS[arm].rate_of or arm) for arm in trained}
    for seed in seeds:
        for arm in trained:
            yield RunKey(precision, arm, rates[arm], seed)


if __name__ == "__main__":
    main()
