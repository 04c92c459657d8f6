"""Prints docs/flags.md: every flag with its default, made from the settings themselves.

python docs/make_flags.py > docs/flags.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from noisefit.answers.probe_settings import GROUPS as PROBE_GROUPS
from noisefit.answers.settings import GROUPS as ANSWER_GROUPS
from noisefit.base.command_line import ALIASES, SWITCHES
from noisefit.base.settings import default_text, fields_of
from noisefit.merge import GROUPS as MERGE_GROUPS
from noisefit.run.settings import GROUPS

HEAD = """# Every flag

Made from the programs by `python docs/make_flags.py > docs/flags.md`; a test holds it to them.

`--config FILE` reads any flag of `train_loop.py` or `generate.py` from YAML (`learning_rate: 1e-4`), or from the
`noisefit_config.json` of a run or the `.settings.json` beside answers, which repeats them. A flag on the command line
wins. A switch is off by default: `--FLAG` or `--FLAG true` turns it on, `--no_FLAG` off. Hyphens do for underscores. In
a program, `noisefit.Settings` and `noisefit.AnswerSettings` take the same names and check the same rules.
"""


PROGRAMS = (
    ("train_loop.py", GROUPS),
    ("generate.py", ANSWER_GROUPS),
    ("python -m noisefit.probe", PROBE_GROUPS),
    ("python -m noisefit.merge", MERGE_GROUPS),
)


def page() -> Iterator[str]:
    """The lines of docs/flags.md."""
    yield HEAD
    for program, groups in PROGRAMS:
        yield f"## `{program}`\n"
        for title, cls in groups.items():
            yield f"### {title[0].upper()}{title[1:]}\n"
            yield "| flag | default | what it does |\n|---|---|---|"
            for field in fields_of(cls):
                default = f"`{default_text(field)}`" if default_text(field) else ""
                choices = (
                    f" ({', '.join(f'`{choice}`' for choice in field.rule.choices)})" if field.rule.choices else ""
                )
                text = f"{field.rule.help}{choices}".replace("|", "\\|")
                yield f"| `--{field.name}` | {default} | {text[0].upper()}{text[1:]} |"
            yield ""
    yield ("`--hf_token` is a token for the hub; safer in the environment as `HF_TOKEN`: others on the machine see a "
           "running program's command line. It is never written anywhere.\n")  # fmt: skip
    yield "## Names that other programs have for them\n"
    yield "| theirs | ours |\n|---|---|"
    switches = {name: f"{flag} {value}" for name, (flag, value) in SWITCHES.items()}
    for name, ours in (ALIASES | switches).items():
        yield f"| `--{name}` | `--{ours}` |"


if __name__ == "__main__":
    print("\n".join(page()))
