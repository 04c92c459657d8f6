"""Semantic entropy: clusters by words and by an entailment model, entropies against counting."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from running import call
from tiny_folder import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from noisefit.answers.entropy import clusters, entropy, same_by_model, same_by_words, with_entropy
from noisefit.answers.outcomes import assess
from noisefit.answers.scoring import Prompt
from noisefit.base.errors import InputError
from noisefit.score import main

LABELS = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
ANSWERS = ["Lisbon", "It is Lisbon!", "Porto, I think", "I don't know who", "", "lisbon", "Madrid, a city of Spain"]


def test_entropy_is_that_of_the_shares():
    assert entropy([0, 0, 0, 0]) == 0 and str(entropy([0])) == "0.0"
    assert entropy([0, 1, 2]) == pytest.approx(math.log(3))
    assert entropy([0, 0, 1, 0]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_word_rule_clusters_answers_that_hold_each_other():
    question = "What is the capital of Portugal?"
    for answers, expected in [
        (("Lisbon", "The capital is Lisbon.", "lisbon!", "Porto"), [0, 0, 0, 1]),
        (("Lisbon", "Lisbon or Porto", "Porto"), [0, 1, 2]),  # one holds the other, which is not both ways
        (("I don't know.", "I'm not sure", "Lisbon", "I do not know. Lisbon"), [0, 0, 1, 2]),
        (("", " ", "Lisbon", "I don't know"), [0, 0, 1, 2]),
        (("Ask another", "I don't know", "ask another!"), [0, 0, 0]),
    ]:
        assert clusters(Prompt(question, "It is Lisbon.", answers), same_by_words(["ask another"])) == expected, answers
    # What the question says is no meaning of an answer's own, as far as it says anything else.
    assert clusters(Prompt("Who wrote Emma?", "r", ("Austen", "Austen wrote Emma")), same_by_words()) == [0, 0]


def test_a_single_round_has_no_entropy():
    prompts = [Prompt("a", "r", ("x", "y")), Prompt("b", "r", ("x",))]
    assert [item.entropy for item in with_entropy(assess(prompts), same_by_words())] == [None, None]
    found = with_entropy(assess(prompts[:1]), same_by_words())
    assert found[0].entropy == pytest.approx(math.log(2))


@pytest.fixture(scope="module")
def entailment_folder(tmp_path_factory) -> Path:
    """A random model of three labels, whose bias is such that half of its pairs are entailed."""
    folder = tmp_path_factory.mktemp("models") / "entailment"
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, id2label=LABELS, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    logits = torch.stack([model(**tokenizer(a, b, return_tensors="pt")).logits[0] for a in ANSWERS for b in ANSWERS])
    margin = logits[:, 2] - logits[:, :2].max(1).values
    with torch.no_grad():
        model.classifier.bias[2] -= margin.quantile(0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_entailment_model_is_asked_both_ways_after_the_question(entailment_folder):
    prompt = Prompt("A passage. Where?", "r", tuple(ANSWERS), question="Where?")
    same = same_by_model(str(entailment_folder), [prompt])
    model = AutoModelForSequenceClassification.from_pretrained(entailment_folder).eval()
    tokenizer = byte_tokenizer()

    def follows(first: str, second: str) -> bool:
        ids = [1, *tokenizer(f"Where? {first}").input_ids, 2, *tokenizer(f"Where? {second}").input_ids, 2]
        return int(model(input_ids=torch.tensor([ids])).logits.argmax()) == 2

    found = {(a, b): same(prompt, a, b) for a in ANSWERS for b in ANSWERS if a != b}
    assert found == {(a, b): follows(a, b) and follows(b, a) for a, b in found}
    one_way = [pair for pair in found if follows(*pair) and not found[pair]]
    assert any(found.values()) and one_way and not all(found.values())
    assert same(prompt, "x", "x")


def write(path: Path, rounds: int = 2) -> str:
    file = io.StringIO(newline="")
    rows = [
        (f"What is thing {i}?", f"It is X{i}.", answer, r + 1)
        for i, answers in enumerate([("X0", "It is X0."), ("Y", "Z"), ("X2", "Y")])
        for r, answer in enumerate(answers[:rounds])
    ]
    csv.writer(file).writerows([("prompt", "response", "generated_response", "round"), *rows])
    path.write_text(file.getvalue())
    return str(path)


def test_the_command_line_tells_semantic_entropy(tmp_path, entailment_folder):
    answers = write(tmp_path / "a.csv")
    found = json.loads(call(main, answers, "--json").stdout)
    assert found["semantic_entropy"] == pytest.approx(2 / 3 * math.log(2))
    # Wrong answers: 3, each of entropy log 2; right ones: two of entropy 0, one of log 2.
    assert found["semantic_entropy_auroc"] == pytest.approx((2 + 0.5) / 3)
    done = call(main, answers, "--json", "--entailment_model", entailment_folder)
    assert done.returncode == 0, done.stderr
    by_model = json.loads(done.stdout)["semantic_entropy"]
    prompts = [
        Prompt(f"What is thing {i}?", "r", a) for i, a in enumerate([("X0", "It is X0."), ("Y", "Z"), ("X2", "Y")])
    ]
    same = same_by_model(str(entailment_folder), prompts)
    assert by_model == pytest.approx(sum(math.log(2) for p in prompts if not same(p, *p.answers)) / 3)
    assert "semantic_entropy" not in json.loads(call(main, write(tmp_path / "b.csv", 1), "--json").stdout)


def test_an_entailment_model_that_is_none_is_refused(tmp_path, entailment_folder, llama_folder):
    answers = write(tmp_path / "a.csv")
    other = tmp_path / "labels"
    model = AutoModelForSequenceClassification.from_pretrained(entailment_folder)
    model.config.id2label = {0: "yes", 1: "no", 2: "not_entailment"}
    model.save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    without = tmp_path / "unpadded"
    AutoModelForSequenceClassification.from_pretrained(entailment_folder).save_pretrained(without)
    byte_tokenizer(eos_token="</s>").save_pretrained(without)
    for folder, why in [
        (tmp_path / "none", "no such folder"),
        (llama_folder, "its files lack score.weight"),
        (other, "its labels are no, not_entailment, yes; expected one that is entailment"),
        (without, "its tokenizer has no padding token"),
    ]:
        done = call(main, answers, "--entailment_model", folder)
        said = done.stderr.splitlines()[-1]  # below a progress bar, maybe
        assert done.returncode == 2 and said.startswith("noisefit.score: error: --entailment_model") and why in said
    done = call(main, write(tmp_path / "b.csv", 1), "--entailment_model", entailment_folder)
    assert done.returncode == 2 and "it has one round" in done.stderr


def test_answers_longer_than_the_model_takes_are_cut(entailment_folder):
    prompt = Prompt("Where?", "r", ("x" * 300, "y"))
    assert same_by_model(str(entailment_folder), [prompt])(prompt, *prompt.answers) in (True, False)
    with pytest.raises(InputError, match="no such folder"):
        same_by_model("/nowhere", [prompt])
