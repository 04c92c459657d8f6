"""A page on training runs and on answers, from the files that they left.

    python -m noisefit.report [RUN...] [--answers FILE...] [--output report]

It writes `report.html`, which needs no other file and runs no script, and its picture as `report.png`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import replacing, writing
from noisefit.base.settings import Rule
from noisefit.report.drawing import MADE_BY, make_picture
from noisefit.report.page import make_page
from noisefit.report.runs import read_runs, readable


def output_paths(output: str) -> tuple[Path, Path]:
    """The paths of picture and page.

    Raises:
        InputError: they cannot be written there.
    """
    path = Path(output)
    stem = path.stem if path.suffix.lower() in (".png", ".html") else path.name
    if stem in ("", "..") or output.endswith(os.sep):
        raise InputError(f"--output {output}: expected a file's name, without a suffix")
    if not os.path.isdir(path.parent):
        raise InputError(f"--output {output}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--output {output}: no permission to write in {path.parent.absolute()}")
    paths = path.with_name(f"{stem}.png"), path.with_name(f"{stem}.html")
    for taken in filter(os.path.lexists, paths):
        if not taken.is_file():
            raise InputError(f"--output {output}: {taken} is a folder, or no file")
        if MADE_BY.encode() not in taken.read_bytes():
            raise InputError(f"--output {output}: {taken} is there and no report of ours; choose another name")
    return paths


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, and move them there once all are whole; an `InputError` where that fails."""
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(writing(path))
            stack.enter_context(replacing(path)).write_bytes(content)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.report",
        description="A page on training runs and on answers, with pictures, from the files that they left.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="--output_model of a run; it may still be running")
    parser.add_argument("--answers", nargs="+", action="extend", type=a_path, default=[], metavar="FILE",
                        help="answers of generate.py, with the column response")  # fmt: skip
    parser.add_argument("--show", type=_count, default=50, metavar="N",
                        help="prompts of each file of answers, those with wrong ones first (default: 50)")  # fmt: skip
    parser.add_argument("--refusals", type=a_path, metavar="FILE", help="further phrases that refuse, one a line")
    parser.add_argument(
        "--output",
        type=a_path,
        default="report",
        help="for OUTPUT.png and OUTPUT.html; older reports are replaced",
    )
    return parser


def report(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_intermixed_args(argv)
    if not args.runs and not args.answers:
        raise InputError("give RUN, the output folder of a training, or --answers FILE, or both; see --help")
    png, html = output_paths(args.output)
    runs = read_runs(args.runs)
    pictures = [make_picture(runs), make_picture(runs, narrow=True)] if runs else []
    sections: list[str] = []
    lacking: Mapping[str, Sequence[str]] = {}
    if args.answers:
        from noisefit.report import answers  # here, as it takes seconds to import

        files = answers.read_answer_files(args.answers, answers.read_phrases(args.refusals))
        sections = [answers.answers_section(files, args.show), answers.confidence_section(files)]
        lacking = answers.lacking(files)
        if not runs and any(file.has_curve for file in files):
            pictures = [answers.curves_picture([file for file in files if file.has_curve])]
    page = make_page(runs, pictures, sections, lacking).encode(errors="replace")
    write_files({png: pictures[0], html: page} if pictures else {html: page})
    if not pictures and png.is_file() and MADE_BY.encode() in png.read_bytes():  # as it stands now
        png.unlink(missing_ok=True)  # an older report's, which would not go with the page
    print(*(readable(str(path)) for path in ((png, html) if pictures else (html,))), sep="\n")


def _count(text: str) -> int:
    try:
        return int(Rule("", low=0, high=10**6).number(int, text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    """Run the command line."""
    with one_line_errors("noisefit.report"):
        report(sys.argv[1:])


if __name__ == "__main__":
    main()
