"""Builds the example world: a corpus, a model that has read it, and questions about it.

    python examples/world/build.py --output build/world

The model has read every fact but has never seen a question. Fine-tuning on the questions about one
half of the countries (train.csv) teaches it to answer; whether it then answers or makes things up
is measured on the other half (test.csv), where the truth is known.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import world

# A model that does not know the corpus would make the questions meaningless.
REQUIRED_COMPLETION = 0.95
MAX_SEED = 2**32 - 1


class BuildError(Exception):
    """A reason to stop, told to the user in one line, with the exit status it deserves."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def write_questions(path: Path, countries: Sequence[world.Country]) -> None:
    """Writes the questions about these countries as CSV."""
    rows = [world.question_row(fact) for fact in world.facts_of(countries)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_settings(folder: Path) -> dict[str, object] | None:
    """The settings of the world in this folder; None where the folder holds no world."""
    try:
        settings = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["settings"]
        return {"seed": settings["seed"], "countries": settings["countries"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fill(
    folder: Path,
    seed: int,
    count: int,
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

    countries = world.make_countries(seed, count)
    train, test = world.split_countries(countries)
    corpus = world.corpus_of(countries, seed)
    (folder / "corpus.txt").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    write_questions(folder / "train.csv", train)
    write_questions(folder / "test.csv", test)

    facts = world.facts_of(countries)
    told = [(statement, fact.answer) for fact in facts for statement in world.statements_of(fact)]
    tokenizer = pretrain.train_tokenizer(statement for statement, _ in told)
    model = pretrain.new_model(tokenizer, seed)
    tokens = pretrain.pretrain(model, tokenizer, corpus, max_steps)
    pretrain.place_turn_tokens(model, tokenizer)
    completed = pretrain.completed_share(model, tokenizer, told)
    print(f"statements that the model completes: {completed:.1%} of {len(told)}")
    if completed < required:
        raise BuildError(
            f"the model completes {completed:.1%} of the statements, fewer than the "
            f"{required:.0%} that the questions need; nothing was kept",
            status=1,
        )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    asked_in_training = {country.name for country in train}
    document = {
        "settings": {
            "seed": seed,
            "countries": count,
            "statements": len(told),
            "training_tokens": tokens,
            "statement_completion": completed,
        },
        "facts": [
            {
                "country": fact.country,
                "relation": fact.relation,
                "answer": fact.answer,
                "split": "train" if fact.country in asked_in_training else "test",
            }
            for fact in facts
        ],
    }
    (folder / "facts.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def build(
    output: Path,
    seed: int,
    count: int,
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
            f"{output} already holds a world (seed {old['seed']}, {old['countries']} countries): "
            "nothing rebuilt (--overwrite builds it anew)"
        )
        return

    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error.strerror}", status=2) from error
    try:
        fresh = scratch / "world"
        fresh.mkdir()
        fill(fresh, seed, count, max_steps, required)
        if old is not None:
            folder.rename(scratch / "old")
        fresh.rename(folder)
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error}", status=1) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"built {output} in {time.monotonic() - began:.0f} s")


def integer(name: str, low: int, high: int) -> Callable[[str], int]:
    """An argparse type: an integer within limits."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{name} from {low} to {high}, not {text!r}")
        return value

    return parse


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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the world that is there, all of it",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        build(options.output, options.seed, options.countries, options.overwrite)
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
