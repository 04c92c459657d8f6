"""A run's folder and files of answers whose every text is hostile, for the tests of the page."""

import json

from report_runs import evaluations, line, policy, write_run

EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>\"'&amp;\u202e\x00\ud800</h2></td>"
LONG = "Donaudampfschifffahrt" * 60
PROMPTS = (
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    (f"{EVIL} Who?", f"It is {EVIL}"),
    (LONG, "Long."),
    ("من كتب هذا الكتاب؟", "كتبه نجيب محفوظ."),
)
ROWS = {
    "train": [
        {"source": f"q {EVIL}.csv", "rows": 812, "skipped": {"number": 7, "first": [4, 9, 12, 13, 14]},
         "cut": {"number": 1, "first": [3]}, "of_another_kind": {"number": 2, "first": [5, 6]}, "weight": 2.5},
        {"source": "more.jsonl", "rows": 5},
    ],
    "eval": [{"source": "q.csv (5% held out)", "rows": 43}],
    "unknown": {"treatment": "drop", "below": -0.71, "number": 31, "first": [3, 8], "unscored": 2},
}  # fmt: skip


def sample(step, prompt, reference, answer, outcome="wrong", logprob=-0.5):
    return dict(step=step, epoch=step / 8, prompt=prompt, response=reference, generated_response=answer,
                logprob=logprob, tokens=4, outcome=outcome)  # fmt: skip


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write_hostile_run(folder):
    """A run with all that a run may have, written in a folder whose name is hostile too."""
    samples = [sample(5 * i, *prompt, EVIL if i < 2 else "Lisbon", "wrong" if i < 2 else "right")
               for i in range(1, 4) for prompt in PROMPTS]  # fmt: skip
    lines = [line(step, token_accuracy=0.5, entropy=1.5) for step in range(5, 400, 5)]
    write_run(folder, lines, eval_metrics=evaluations((5, 1.5), (10, 1.25)), noise_policy=policy(), rows=ROWS,
              noisefit_config={"loss_mode": EVIL, f"noise_{EVIL}": LONG})  # fmt: skip
    (folder / "samples.jsonl").write_text(json_lines(samples) + "{}\n")
    return folder


def answer_lines(prompts, rounds, logprob=-0.25):
    """Lines of an answers file: to each prompt one answer a round, as `rounds` has them."""
    return [
        dict(prompt=prompt, response=reference, generated_response=answer, round=number, tokens=3)
        | ({} if logprob is None else dict(logprob=logprob * (1 + place + number)))
        for place, ((prompt, reference), answers) in enumerate(zip(prompts, rounds, strict=True))
        for number, answer in enumerate(answers, 1)
    ]


def write_hostile_answers(path):
    """Answers to hostile prompts, and the settings beside them."""
    rounds = [["Lisbon", "Porto"], [EVIL, "I do not know."], ["No.", LONG], ["", "I do not know."]]
    path.write_text(json_lines(answer_lines(PROMPTS, rounds)).replace("\\ud800", ""))
    settings = {
        "noisefit_version": "0.1.0",
        "about": {"skipped": {"number": 2, "first": [4, 9]}},
        "temperature": 0.5,
        "refusal": EVIL,
        "seed": None,
    }
    path.with_name(f"{path.name}.settings.json").write_text(json.dumps(settings))
    return path
