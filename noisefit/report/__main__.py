"""Pictures of training runs, from the files in their output folders alone.

    python -m noisefit.report RUN... [--output report]

It writes `report.png` and `report.html`, a page that needs no other file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import replacing, writing
from noisefit.report.page import MADE_BY, make_page, make_picture
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


def report(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = OneLineParser(
        prog="python -m noisefit.report",
        description="Pictures of training runs, and a page with them, from the files that the runs left.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output_model of a run; it may still be running")
    parser.add_argument(
        "--output",
        type=a_path,
        default="report",
        help="for OUTPUT.png and OUTPUT.html; older reports are replaced",
    )
    args = parser.parse_intermixed_args(argv)
    paths = output_paths(args.output)
    runs = read_runs(args.runs)
    picture = make_picture(runs)
    write_files(dict(zip(paths, (picture, make_page(runs, picture).encode(errors="replace")), strict=True)))
    print(*(readable(str(path)) for path in paths), sep="\n")


def main() -> None:
    """Run the command line."""
    with one_line_errors("noisefit.report"):
        report(sys.argv[1:])


if __name__ == "__main__":
    main()
