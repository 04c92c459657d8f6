"""The page of `python -m noisefit.report`: one file that needs no other."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from noisefit.report.drawing import MADE_BY, MANY, finite, look_of, title_of
from noisefit.report.html import POLICY, STYLE, details, picture, section, table, text
from noisefit.report.left_out import left_out_section
from noisefit.report.panels import NATS, panels_of
from noisefit.report.runs import Run
from noisefit.report.samples import samples_section

# The settings of the method itself, by what their names begin with.
METHOD = re.compile(
    "loss_(?!chunk)|noise_|num_noise|max_noise|snr_|prefer_|auto_|hybrid|lambda|temperature|teacher|rdrop|neftune"
)
EVALUATED = ("ce_loss", "token_accuracy", "entropy", "right_rate", "wrong_rate")
ANSWERS = "Answers to prompts"  # the page's title where no run is on it


def make_page(
    runs: Sequence[Run], pictures: Sequence[bytes] = (), answers: Sequence[str] = (),
    lacking: Mapping[str, Sequence[str]] | None = None,
) -> str:  # fmt: skip
    """The page: curves, tables, samples and what was left out of some runs; what was made of files of answers.

    Args:
        runs: maybe none.
        pictures: theirs as PNG: the wide one, and one for narrow screens.
        answers: sections on files of answers; an empty one is none.
        lacking: what the page does not show of each of these files: sentences by name.
    """
    title = title_of(runs) if runs else ANSWERS
    sections = [*(_of_runs(runs, pictures) if runs else ()), samples_section(runs), *answers]
    sections = list(filter(None, [*sections, left_out_section(runs, lacking or {})]))
    headings = [re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', part)[0] for part in sections]
    links = [f'<a href="#{name}">{heading}</a>' for name, heading in headings]
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta name="generator" content="{MADE_BY}">',
        f"<title>{text(title)}</title>\n<style>\n{STYLE}\n</style></head><body>",
        f"<header><h1>{text(title)}</h1>",
        f"<nav>{' '.join(links)}</nav></header>",
        "<main>", *sections, "</main></body></html>\n",
    ])  # fmt: skip


def _of_runs(runs: Sequence[Run], pictures: Sequence[bytes]) -> list[str]:
    several = len(runs) > 1
    shown = ", ".join(title.partition(",")[0].lower() for title, _ in panels_of(runs).values())
    names = ", ".join(run.name for run in runs)
    layers = []
    for run in runs:
        header = ["Layer", "Noise", "SNR", "Best score", "Scale", f"KL, {NATS}"]
        rows = [[index, "●" if layer.chosen else "○", layer.snr, layer.score, layer.scale, layer.kl]
                for index, layer in run.layers.items()]  # fmt: skip
        layers.append(details(run.name, table(header, rows), is_open=not several))
    return [
        section(
            "curves", "Curves",
            picture(f"Curves of {names}: {shown}; the tables below have numbers.", pictures[0], pictures[-1]),
            f'<p class="soft">Losses are means over the supervised tokens since the line before. From {MANY} logged '
            "lines on, a bold line is a running mean over a twentieth of them, at most 101.</p>",
        ),
        section("runs", "Runs", _runs_table(runs)),
        section("settings", "Settings that differ" if several else "Settings of the method",
                table(["Setting", *(run.name for run in runs)], _settings(runs))),
        section("layers", "Layers", *layers),
    ]  # fmt: skip


def _runs_table(runs: Sequence[Run]) -> str:
    panels = panels_of(runs)
    losses = [key for key in panels if key.endswith("loss")]
    header = ["Run", "Steps", *(f"{panels[key][0].partition(',')[0]}, last" for key in losses)]
    evaluated = {key: f"{panels[key][0].partition(',')[0]}, evaluation" for key in EVALUATED if key in panels}
    header += [*evaluated.values(), "Tokens/s, median", "Peak memory, GiB", "Skipped steps", "Noisy layers"]
    rows = []
    for run in runs:
        known = {key: finite(run.metrics.get(key, [])) or [math.nan] for key in panels}
        skipped = sum(finite(run.metrics.get("skipped_steps", []))) or math.nan
        row: list[Any] = [run.name, run.steps[-1], *(known[key][-1] for key in losses)]
        row += [[math.nan, *finite(run.evaluations(key))][-1] for key in evaluated]
        row.append(statistics.median(known["tokens_per_second"]))
        rows.append([*row, max(known["peak_memory_gib"]), skipped, noisy_layers(run)])
    return table(header, rows, colours=[look_of(index)["color"] for index in range(len(runs))])


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """A row a setting: of one run those of the method, of several those that differ, but for their folders."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name, "–") for run in runs]
        words = [value if isinstance(value, str) else json.dumps(value) for value in values]
        if METHOD.match(name) if len(runs) == 1 else len(set(words)) > 1 and name != "output_model":
            rows.append([name, *words])
    return rows


def noisy_layers(run: Run) -> str:
    """The layers that get noise: "0-2, 5"."""
    known = [index for index, layer in run.layers.items() if layer.chosen]
    chosen = known or [int(layer) for layer in run.noise if layer.isdecimal()]
    words = [layer for layer in run.noise if not layer.isdecimal()]
    for _, group in groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0]):  # the same for neighbours
        layers = [str(layer) for _, layer in group]
        words.append("-".join(dict.fromkeys((layers[0], layers[-1]))))
    return ", ".join(words) or ("–" if "noise_to_signal" in run.metrics else "none")
