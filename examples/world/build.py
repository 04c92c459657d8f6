"""Builds the example world: a corpus, a model that has read it, and questions about it.

    python examples/world/build.py --output build/world

The model has read every fact but has never seen a question. Fine-tuning on the questions about one
half of the countries (train.csv) teaches it to answer; whether it then answers or makes things up
is measured on the other half (test.csv), where the truth is known.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import questions

import world

# A model that does not know the corpus would make the questions meaningless.
REQUIRED_COMPLETION = 0.95
FAMOUS = 100  # times told, from which on a fact must be known
MAX_SEED = 2**32 - 1


class BuildError(Exception):
    """A reason to stop, told to the user in one line, with the exit status it deserves."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def write_questions(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes questions as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_settings(folder: Path) -> world.Settings | None:
    """The settings of the world in this folder; None where the folder holds no world."""
    try:
        settings = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["settings"]
        return world.Settings(
            **{name: settings[name] for name in ("seed", "countries")}
            | {name: settings[name] for name in asdict(world.Settings()) if name in settings}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


OWN = {"corpus.txt", "facts.json", "model", "test.csv", "train.csv"}  # what a world's folder holds


def fill(
    folder: Path,
    settings: world.Settings,
    max_steps: int | None = None,
    required: float = REQUIRED_COMPLETION,
) -> None:
    """Builds the whole world in an empty folder. `max_steps` cuts training short, for tests."""
    # Idle threads sleep instead of spinning: with anything else running on the machine, the spinning
    # made a step up to 50 times slower. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported here so that a wrong flag, or a world that is there already, is told at once.
    from transformers.utils import logging

    import pretrain

    logging.disable_progress_bar()

    imagined = round(settings.false_premises * settings.countries)
    atlas = world.make_countries(settings.seed, settings.countries, imagined)
    facts = world.facts_of(atlas[: settings.countries], settings)
    if not any(fact.told for fact in facts):
        raise BuildError("the corpus tells no fact at all; lower --untold", status=2)
    corpus = world.corpus_of(facts, settings)
    (folder / "corpus.txt").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    train, test = questions.questions_of(facts, atlas[settings.countries :], settings)
    write_questions(folder / "train.csv", train)
    write_questions(folder / "test.csv", test)

    told = [(statement, fact) for fact in facts if fact.told for statement in world.statements_of(fact)]
    tokenizer = pretrain.train_tokenizer(statement for statement, _ in told)
    model = pretrain.new_model(tokenizer, settings)
    tokens = pretrain.pretrain(model, tokenizer, corpus, settings, max_steps)
    if not tokens:
        raise BuildError(
            "the corpus is shorter than a step; lower --untold or --batch_rows, or raise --epochs", status=2
        )
    pretrain.place_turn_tokens(model, tokenizer)
    famous = [(statement, fact.answer) for statement, fact in told if fact.told >= FAMOUS]
    completed = pretrain.completed_share(model, tokenizer, famous) if famous else 1.0
    print(f"statements of facts told {FAMOUS} times or more that the model completes: {completed:.1%} of {len(famous)}")
    if completed < required:
        raise BuildError(
            f"the model completes {completed:.1%} of the statements, fewer than the "
            f"{required:.0%} that the questions need; nothing was kept",
            status=1,
        )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    asked_in_training = {row["country"] for row in train}
    document = {
        "settings": asdict(settings)
        | {
            "statements": len(told),
            "training_tokens": tokens,
            "statement_completion": completed,
        },
        "facts": [asdict(fact) | {"split": "train" if fact.country in asked_in_training else "test"} for fact in facts],
    }
    (folder / "facts.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def build(
    output: Path,
    settings: world.Settings,
    overwrite: bool = False,
    max_steps: int | None = None,
    required: float = REQUIRED_COMPLETION,
) -> None:
    """Builds a world beside `output` and renames it there, so that no half of one is ever seen."""
    # Resolved so that a link to a world is followed, not replaced.
    folder = output.resolve()
    old = read_settings(folder)
    if old is None and os.path.lexists(folder):
        raise BuildError(f"{output} exists and is no world (no facts.json): left alone", status=2)
    if old is not None and not overwrite:
        print(
            f"{output} already holds a world (seed {old.seed}, {old.countries} countries): "
            "nothing rebuilt (--overwrite builds it anew)"
        )
        return

    if old is not None and (others := sorted({path.name for path in folder.iterdir()} - OWN)):
        raise BuildError(f"{output} also holds {others[0]}, which is not of a world; move it away", status=2)

    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error.strerror}", status=2) from error
    try:
        fresh = scratch / "world"
        fresh.mkdir()
        fill(fresh, settings, max_steps, required)
        if old is not None:
            folder.rename(scratch / "old")
        fresh.rename(folder)
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error}", status=1) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"built {output} in {time.monotonic() - began:.0f} s")


def number(name: str, low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number within limits."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{name} from {low} to {high}, not {text!r}")
        return value

    return parse


def integer(name: str, low: int, high: int) -> Callable[[str], float]:
    """An argparse type: an integer within limits."""
    return number(name, low, high, int)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog="build.py", description="Builds the example world.")
    parser.add_argument("--output", type=Path, required=True, help="folder to build the world in")
    parser.add_argument(
        "--seed",
        type=integer("a seed", 0, MAX_SEED),
        default=0,
        help="which world (default: 0)",
    )
    parser.add_argument(
        "--countries",
        type=integer("a number", world.MIN_COUNTRIES, world.MAX_COUNTRIES),
        default=60,
        help=f"{world.MIN_COUNTRIES} to {world.MAX_COUNTRIES} (default: 60)",
    )
    share = "a share"
    parser.add_argument("--zipf", action="store_true", help="unequal fame: facts are told 200 to 4 times")
    parser.add_argument(
        "--untold", type=number(share, 0, 1), default=0.0, help="share of the facts that the corpus never tells"
    )
    parser.add_argument(
        "--false_premises",
        type=number(share, 0, 1),
        default=0.0,
        help='questions on countries that do not exist, to be answered "I do not know", per question on one that does',
    )
    parser.add_argument(
        "--paraphrases", action="store_true", help="ask in several phrasings, held out also in a new one"
    )
    parser.add_argument("--layers", type=integer("a number", 1, 100), default=4, help="of the model (default: 4)")
    parser.add_argument(
        "--width", type=integer("a number", 16, 8192), default=128, help="of the model, a multiple of 8 (default: 128)"
    )
    parser.add_argument(
        "--batch_rows", type=integer("a number", 1, 1024), default=8, help="rows of a pretraining step (default: 8)"
    )
    parser.add_argument(
        "--epochs", type=integer("a number", 1, 100), default=1, help="readings of the corpus (default: 1)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the world that is there; refused where the folder holds anything else",
    )
    options = parser.parse_args(arguments)
    if options.width % 8:
        parser.error(f"argument --width: a multiple of 8, not {options.width}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        settings = {name: getattr(options, name) for name in asdict(world.Settings())}
        build(options.output, world.Settings(**settings), options.overwrite)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    # Turned into an exception, so that a polite kill takes its scratch folder with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
