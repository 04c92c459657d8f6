"""The file that names the methods to run, or to show: a JSON object of labels, as short as a table needs, and methods.

An example is `{"plain": "basefit", "teacher": "basefit:loss_mode=ce_teacher:teacher=base"}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.base.errors import InputError
from noisefit.base.files import read_text


def read_chosen(path: Path) -> dict[str, str]:
    """The methods of such a file by label, in the file's order. Whether there are such methods is not looked at.

    Raises:
        InputError: it cannot be read, is no JSON object of texts, has no entry, or a label or a method twice.
    """
    text = read_text(path)
    try:
        entries = json.loads(text, object_pairs_hook=tuple)  # a dict would hide that a label is there twice
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(entries, tuple) or not all(isinstance(method, str) for _, method in entries):
        raise InputError(f'{path}: expected labels and methods, such as {{"plain": "basefit"}}')
    if not entries:
        raise InputError(f"{path}: no methods")
    chosen: dict[str, str] = {}
    for label, method in entries:
        if not label or not method:
            raise InputError(f"{path}: {label!r}: {method!r}: an empty label or method")
        if label in chosen:
            raise InputError(f"{path}: the label {label!r} is there twice; remove one of them")
        if method in chosen.values():
            raise InputError(f"{path}: the method {method!r} is there twice; remove one of them")
        chosen[label] = method
    return chosen
