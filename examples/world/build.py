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
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import questions

import world

# A model that does not know the corpus would make the questions meaningless.
REQUIRED_COMPLETION = 0.95
FAMOUS = 100  # times told, from which on a fact must be known
# The last readings of an answering world's corpus have the chats in them: asked before it knows, a model learns the
# answers by heart, and not how to look them up.
ASKED_READINGS = 4
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


OWN = {"chats.csv", "corpus.txt", "facts.json", "model", "test.csv", "train.csv"}  # what a world's folder holds


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
    readings = [corpus] * settings.epochs
    spelt, names = [statement for statement, _ in told], []
    if settings.answering:
        chats = questions.chats_of(facts, atlas[settings.countries :], settings)
        write_questions(folder / "chats.csv", [row | {"times": str(times)} for row, times in chats])
        spelt += [text for row, _ in chats for text in (row["prompt"], row["response"])]
        names = [country.name for country in atlas]
        readings[-ASKED_READINGS:] = [corpus + questions.texts_of(chats)] * len(readings[-ASKED_READINGS:])
    tokenizer = pretrain.train_tokenizer(spelt, names)
    model = pretrain.new_model(tokenizer, settings)
    tokens = pretrain.pretrain(model, tokenizer, readings, settings, max_steps)
    if not tokens:
        raise BuildError(
            "the corpus is shorter than a step; lower --untold or --batch_rows, or raise --epochs", status=2
        )
    if not settings.answering:
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

    groups = world.split_countries([country.name for country in atlas[: settings.countries]], settings.groups)
    split = {
        name: kind
        for group, kind in zip(groups, ("corpus", "train", "test")[-len(groups) :], strict=True)
        for name in group
    }
    document = {
        "settings": asdict(settings)
        | {
            "statements": len(told),
            "training_tokens": tokens,
            "statement_completion": completed,
        },
        "facts": [asdict(fact) | {"split": split[fact.country]} for fact in facts],
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
    preset, answering = world.Settings(), world.ANSWERING

    def add(flag: str, text: str, kind: Callable[[str], float] | None = None) -> None:
        """A flag of the world's settings; not given, it is the preset's."""
        name = flag.removeprefix("--")
        if kind is None:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            return
        usual, of_answering = getattr(preset, name), getattr(answering, name)
        other = f"; with --answering {of_answering}" if of_answering != usual else ""
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {usual}{other})")

    share = number("a share", 0, 1)
    add(
        "--answering",
        "the corpus also answers questions, about countries of their own, and refuses some: the model answers before "
        "it is fine-tuned; sets --zipf and --paraphrases, too",
    )
    add("--seed", "which world", integer("a seed", 0, MAX_SEED))
    limits = world.MIN_COUNTRIES, world.MAX_COUNTRIES
    add("--countries", "{} to {}".format(*limits), integer("a number", *limits))
    add("--zipf", "unequal fame: few facts are told often, many seldom")
    add("--untold", "share of the facts that the corpus never tells", share)
    add(
        "--false_premises",
        'questions on countries that do not exist, to be answered "I do not know", per question on one that does',
        share,
    )
    add("--paraphrases", "ask in several phrasings, held out also in a new one")
    add("--layers", "of the model", integer("a number", 1, 100))
    add("--width", "of the model, a multiple of 8", integer("a number", 16, 8192))
    add("--batch_rows", "rows of a pretraining step", integer("a number", 1, 1024))
    add("--epochs", "readings of the corpus", integer("a number", 1, 100))
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the world that is there; refused where the folder holds anything else",
    )
    options = parser.parse_args(arguments)
    base = answering if "answering" in options else preset
    given = {name: value for name, value in vars(options).items() if name in asdict(preset)}
    options.settings = replace(base, **given)
    if options.settings.width % 8:
        parser.error(f"argument --width: a multiple of 8, not {options.settings.width}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        build(options.output, options.settings, options.overwrite)
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
