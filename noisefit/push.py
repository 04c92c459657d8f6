"""Push an adapter or a model, as `train_loop.py` or `noisefit.merge` left it, to the hub.

    python -m noisefit.push my_adapter me/my-adapter

What is pushed is what `noisefit_files.json` says that the run wrote: the model, its tokenizer and card, and the records
of its settings and figures. Checkpoints, what shows rows of the data, and files of other people stay here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path, add_token, without_token
from noisefit.base.errors import InputError, one_line_errors
from noisefit.base.files import alone_in
from noisefit.run.contradictions import check_hub
from noisefit.run.hub import check_repository, publishable, push
from noisefit.run.output import RECORDS
from noisefit.run.output_folder import OutputFolder
from noisefit.run.run_settings import HubSettings


def push_folder(folder: Path, settings: HubSettings) -> None:
    """Push what a run left in `folder`.

    Raises:
        InputError: there is no such folder, no run left a whole model in it, or the hub refuses.
    """
    check_hub(settings)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    with alone_in(folder):
        output = OutputFolder(folder)
        if not output.holds_model():
            raise InputError(f"{folder}: no run left a whole model there; expected the output of train_loop.py or "
                             "noisefit-merge, with its noisefit_files.json")  # fmt: skip
        publishable(output, RECORDS)  # before anybody is asked
        check_repository(settings)
        push(settings, output, RECORDS)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        prog="python -m noisefit.push",
        description="Push an adapter or a model that a run left to the hub, with its tokenizer and card.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=a_path, help="the output of train_loop.py, or of noisefit-merge")
    add("repo", metavar="REPO", help="NAME, or ORGANIZATION/NAME, on the hub; made where it is not there")
    add("--hub_private", action="store_true", help="if the repository is made, it is private")
    add_token(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("noisefit.push"):
        args = without_token(vars(build_parser().parse_args(sys.argv[1:] if argv is None else argv)))
        settings = HubSettings(push_to_hub=args["repo"], hub_private=args["hub_private"])
        push_folder(Path(args["folder"]), settings)


if __name__ == "__main__":
    main()
