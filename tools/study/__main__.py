"""Run the study: train the teacher, sweep the learning rates, run every arm, write the tables and plots.

    python tools/study smoke                 # every part once
    python tools/study digits                # the example's teacher; an hour on two cores
    python tools/study cpu --data DIR        # two hours on two cores
    python tools/study gpu --arms direct,fraqat --precisions W4A8

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

import torch  # noqa: E402
from arms import ARMS, HEADLINE, PRECISIONS  # noqa: E402
from data import Digits  # noqa: E402
from data import load as load_digits  # noqa: E402
from images import FASHION_FOLDER, MissingDataError, load_cifar10, load_fashion  # noqa: E402
from judge import FeatureNetwork, Judge, draw  # noqa: E402
from runs import DRAW_SEED, SWEEP_SEED, Bench, RunKey  # noqa: E402
from study_config import CONFIGS, StudyConfig  # noqa: E402
from summary import save_samples, write_summary  # noqa: E402
from teacher import load_or_train  # noqa: E402

SWEEP_SHARE = 4  # the sweep draws a fourth of the images


def main() -> None:
    """Run the study from the command line."""
    options = _options()
    try:
        _study(options)
    except (MissingDataError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=CONFIGS, help="size of the study")
    parser.add_argument("--data", type=Path, default=FASHION_FOLDER, help="folder of the data set")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study", help="folder for the results")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms, with commas")
    parser.add_argument("--precisions", default="W4A8", help=f"of {', '.join(PRECISIONS)}, with commas")
    parser.add_argument("--seeds", type=int, help="runs of each trained arm; the configuration has a number of its own")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for study.md")
    options = parser.parse_args()
    for given, known in ((options.arms, ARMS), (options.precisions, PRECISIONS)):
        for name in given.split(","):
            if name not in known:
                parser.error(f"unknown {name!r}; known: {', '.join(known)}")
    return options


def _study(options: argparse.Namespace) -> None:
    config = CONFIGS[options.config]
    folder = options.out / config.name
    folder.mkdir(parents=True, exist_ok=True)
    bench = prepare(config, options.data, folder)
    seeds = range(1, (options.seeds or config.seeds) + 1)
    arms = sorted(options.arms.split(","), key=_headline_first)
    save_samples(bench.judge.teacher, options.docs, config)
    for precision in options.precisions.split(","):
        for key in runs_of(bench, precision, arms, seeds):
            bench.result(key)
            write_summary(folder, options.docs, config)


def _headline_first(arm: str) -> int:
    return HEADLINE.index(arm) if arm in HEADLINE else len(HEADLINE)


def runs_of(bench: Bench, precision: str, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[RunKey]:
    """The runs of a precision: every arm with one seed, then with the next, so that a study cut short compares them."""
    for arm in arms:
        if not ARMS[arm].trains:
            yield RunKey(precision, arm, None, 0)
    trained = [arm for arm in arms if ARMS[arm].trains]
    rates = {arm: best_rate(bench, precision, ARMS[arm].rate_of or arm) for arm in trained}
    for seed in seeds:
        for arm in trained:
            yield RunKey(precision, arm, rates[arm], seed)


def best_rate(bench: Bench, precision: str, arm: str) -> float:
    """The learning rate of the sweep whose images come nearest to the teacher's."""
    rates = bench.config.learning_rates
    if len(rates) == 1:
        return rates[0]
    distances = {
        rate: bench.result(RunKey(precision, arm, rate, 0, sweep=True))["metrics"]["frechet_teacher"] for rate in rates
    }
    return min(distances, key=lambda rate: distances[rate])


def prepare(config: StudyConfig, data: Path, folder: Path) -> Bench:
    """Train or load the teacher, and draw what the arms are measured against."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (_load(config, data, part) for part in ("train", "test"))
    teacher = load_or_train(config, train, folder, device)
    features = FeatureNetwork(device)
    judges = {
        seed: _judge(teacher.to(device), config, test, count, seed, features, device)
        for seed, count in ((DRAW_SEED, config.images), (SWEEP_SEED, max(config.images // SWEEP_SHARE, 1)))
    }
    return Bench(config, teacher.cpu(), train, judges[DRAW_SEED], judges[SWEEP_SEED], folder)


def _load(config: StudyConfig, data: Path, part: str) -> Digits:
    if config.dataset == "digits":
        train, held_out = load_digits()
        return train if part == "train" else Digits(*(torch.cat(pair) for pair in zip(train, held_out, strict=True)))
    return (load_cifar10 if config.dataset == "cifar10" else load_fashion)(data, part)


def _judge(
    teacher: torch.nn.Module,
    config: StudyConfig,
    real: Digits,
    count: int,
    seed: int,
    features: FeatureNetwork,
    device: torch.device,
) -> Judge:
    return Judge.of(draw(teacher, config, count, seed, device), real.images[:count], features)


if __name__ == "__main__":
    main()
