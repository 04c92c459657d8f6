"""Each answer of a conversation is trained behind the very tokens that generation would start from, and no other."""

import json
import random
from itertools import pairwise

import pytest
from tiny_folder import SPECIALS, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import PromptSettings, make_examples, prompt_ids, tokenize_rows
from noisefit.inputs.tables import read_prompts, read_rows
from noisefit.inputs.templates import TEMPLATES, set_chat_template
from noisefit.inputs.turns import Text, cut_texts

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
# As Qwen3's: the last answer has a place for thoughts, and those of earlier ones are left out.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last and '</think>' not in "
    "m['content'] %}<think></think>{% endif %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The same, but for answers without thoughts nothing is left out.
FORGETTING = THINKING.replace("<think></think>", "")
KINDS = ["chatml", "llama", "alpaca", "plain", "thinking", "forgetting", "merging"]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, but for the end of a ChatML turn, which is one token with the line's end behind it."""
    whole = "|>Ċ"  # as a byte-level tokenizer writes a line's end
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "|>", whole]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("|", ">"), ("|>", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def tokenizer_of(kind: str):
    tokenizer = merging_tokenizer() if kind == "merging" else byte_tokenizer()
    if kind in ("llama", "thinking", "forgetting"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
        tokenizer.chat_template = {"llama": LLAMA, "thinking": THINKING, "forgetting": FORGETTING}[kind]
    set_chat_template(tokenizer, kind if kind in TEMPLATES else None)
    return tokenizer


def conversations(count: int, thoughts: bool = False, seed: int = 0) -> list[list[dict[str, str]]]:
    """Random ones of one to four answers, half of them with a system prompt."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(["ab", "é", "x|>", "<b", "12"]) for _ in range(draw.randint(1, 5)))

    found = []
    for _ in range(count):
        turns = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            thought = f"<think>{text()}</think>" if thoughts and draw.random() < 0.5 else ""
            turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": thought + text()}]
        found.append(turns)
    return found


def written(path, chats):
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats), encoding="utf-8")
    return path


def by_hand(tokenizer, turns, i):
    """Of the answer `turns[i]`: the tokens that generation would start from, and those that it is to give."""
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    prompt = list(tokenizer.apply_chat_template(turns[:i], **how))
    before = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
    assert whole.startswith(before)
    return prompt, tokenizer(whole[len(before) :].rstrip(), add_special_tokens=False)["input_ids"]


def answers_of(turns):
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def shown(examples):
    """What training sees of each answer: the tokens before it, and its own."""
    return [(tuple(e.input_ids[:start]), tuple(e.input_ids[start:end])) for e in examples for start, end in e.spans]


def without_end(pair, end):
    prompt, answer = pair
    return prompt, answer[:-1] if answer[-1] == end else answer


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_stands_behind_what_generation_would_start_from(kind, tmp_path):
    tokenizer, chats = tokenizer_of(kind), conversations(40, thoughts=kind in ("thinking", "forgetting"))
    rows, _ = read_rows(written(tmp_path / "a.jsonl", chats))
    stop, numbers = tokenizer.convert_tokens_to_ids("<|eot|>"), []
    stops = [] if stop is None else [stop]
    for row, turns in zip(rows, chats, strict=True):
        examples, dropped = make_examples(tokenizer, [row], 10_000, stop_ids=stops)
        assert not dropped and not any(example.is_cut for example in examples)
        expected = [by_hand(tokenizer, turns, i) for i in answers_of(turns)]
        end = tokenizer.eos_token_id
        assert [without_end(pair, end) for pair in shown(examples)] == [(tuple(p), tuple(a)) for p, a in expected]
        for example in examples:  # of each text the last answer alone ends it, by a token at which generation stops
            assert example.input_ids[-1] == (stop or end) and example.input_ids.count(end) == (stop is None)
        numbers.append((len(examples), len(expected)))
    if kind in ("chatml", "llama"):
        assert all(texts == 1 for texts, _ in numbers)
    elif kind == "forgetting":  # some are one text, and some are not
        assert {texts == 1 for texts, answers in numbers if answers > 2} == {True, False}
        assert any(1 < texts < answers for texts, answers in numbers)
    else:
        assert all(texts == answers for texts, answers in numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_alone_is_what_generation_is_asked_of_the_same_file(kind, tmp_path):
    tokenizer, chats = tokenizer_of(kind), conversations(20, thoughts=kind == "thinking", seed=1)
    path = written(tmp_path / "a.jsonl", chats)
    examples, _ = make_examples(tokenizer, read_rows(path)[0], 10_000, loss_on="last")
    asked = read_prompts(path)[1]
    assert len(examples) == len(chats)
    for example, row, turns in zip(examples, asked, chats, strict=True):
        assert example.input_ids[: example.target_start] == prompt_ids(tokenizer, row.prompt, row.history)
        assert example.spans == [(example.target_start, len(example.input_ids))]
        prompt, answer = by_hand(tokenizer, turns, len(turns) - 1)
        assert example.input_ids[: len(prompt + answer)] == prompt + answer


def test_one_answer_in_messages_is_a_question_and_its_answer(tmp_path):
    tokenizer = tokenizer_of("chatml")
    (tmp_path / "q.csv").write_text("prompt,response\nA?,a.\nB é?,b\n", encoding="utf-8")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
             for q, a in (("A?", "a."), ("B é?", "b"))]  # fmt: skip
    rows = read_rows(written(tmp_path / "a.jsonl", chats))[0]
    assert rows == read_rows(tmp_path / "q.csv")[0]
    for how in ("response", "last", "all"):
        examples, _ = make_examples(tokenizer, rows, 100, how)
        assert [example.gaps for example in examples] == [(), ()]


@pytest.mark.parametrize("kind", KINDS)
def test_all_supervises_every_token_once_that_is_not_the_first(kind, tmp_path):
    tokenizer, chats = tokenizer_of(kind), conversations(20, seed=2)
    for row, turns in zip(read_rows(written(tmp_path / "a.jsonl", chats))[0], chats, strict=True):
        examples, _ = make_examples(tokenizer, [row], 10_000, "all")
        assert examples[0].target_start == 1 and not any(example.gaps for example in examples)
        for before, example in pairwise(examples):
            start = example.target_start
            assert example.input_ids[:start] == before.input_ids[:start]
            assert example.input_ids[start] != before.input_ids[start]
        if kind in ("alpaca", "plain"):  # of which each text is the one before without its end, and more
            whole = len(by_hand(tokenizer, turns, len(turns) - 1)[0] + by_hand(tokenizer, turns, len(turns) - 1)[1])
            assert sum(e.num_targets for e in examples) == whole - 1 + len(examples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_on", ["response", "last", "all"])
def test_what_is_cut_supervises_no_end(kind, loss_on, tmp_path):
    tokenizer, chats = tokenizer_of(kind), conversations(3, thoughts=kind == "forgetting", seed=5)
    for row in read_rows(written(tmp_path / "a.jsonl", chats))[0]:
        whole, _ = make_examples(tokenizer, [row], 10_000, loss_on)
        firsts = [min(start for start, _ in example.spans) for example in whole]
        borders = {border for example in whole for span in example.spans for border in span}
        longest = max(borders)
        lengths = {2, longest, *(border + more for border in borders for more in (-1, 0, 1, 7))}
        for max_length in sorted(length for length in lengths if 2 <= length <= longest):
            examples, dropped = make_examples(tokenizer, [row], max_length, loss_on)
            assert bool(dropped) == (not examples)
            if loss_on != "all":
                kept = [e for e, first in zip(whole, firsts, strict=True) if first < max_length]
                assert len(kept) == len(examples)
                for example, full in zip(examples, kept, strict=True):
                    spans = [(start, min(end, max_length)) for start, end in full.spans if start < max_length]
                    assert example.spans == spans and example.input_ids == full.input_ids[: spans[-1][1]]
            fits = all(len(example.input_ids) <= max_length for example in whole)
            assert not examples or any(example.is_cut for example in examples) == (not fits)
            for example in examples:
                assert len(example.input_ids) <= max_length and example.num_targets > 0


def test_a_text_without_room_for_its_answer_is_told_by_another_of_its_conversation():
    short, long = Text([1, 2, 3, 4, 5], [(3, 5)]), Text([*range(1, 11)], [(8, 10)])
    for texts in ([long, short], [short, long]):
        for everything in (False, True):
            [(ids, spans, is_cut)] = cut_texts(texts, 6, everything)
            assert ids == short.ids and spans[-1][1] == 5 and is_cut
    assert not any(is_cut for _, _, is_cut in cut_texts([long, short], 10, False))


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("chatml", None), ("llama", None), ("alpaca", "the chat template has no end of a turn"),
        ("thinking", "the chat template writes an earlier turn otherwise"),
        ("forgetting", "the chat template writes an earlier turn otherwise"),
        ("merging", "the tokenizer joins the end of an answer with what stands behind it"),
    ],
)  # fmt: skip
def test_conversations_in_several_texts_are_told_with_the_reason(kind, reason, tmp_path, capsys):
    tokenizer, chats = tokenizer_of(kind), conversations(6, thoughts=True)
    path = str(written(tmp_path / "a.jsonl", chats))
    tokenize_rows(tokenizer, read_rows(path)[0], path, PromptSettings(max_length=10_000), 10**6, [])
    said = capsys.readouterr().err
    assert (f"since {reason}" in said) if reason else said == ""
    if kind != "forgetting" and reason:
        numbers = [i for i, turns in enumerate(chats, start=1) if len(answers_of(turns)) > 1]
        assert f"{path}: {len(numbers)} conversations are trained in several texts" in said
        assert f"(row {', '.join(map(str, numbers[:5]))}" in said
    tokenize_rows(tokenizer, read_rows(path)[0], path, PromptSettings(max_length=10_000, loss_on="last"), 10**6, [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
         "System role not supported; try --chat_template chatml"),
        ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
         "'Roles must alternate') }}{% endif %}{% endfor %}", "Roles must alternate"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_render_a_conversation_names_its_row(template, message, tmp_path):
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = template + tokenizer.chat_template
    chats = [turns for turns in conversations(40) if turns[0]["role"] == "user"][:2]
    chats.append([{"role": "system", "content": "s"}, *chats[0]])
    path = str(written(tmp_path / "a.jsonl", chats))
    rows = read_rows(path)[0]
    assert len(tokenize_rows(tokenizer, rows[:2], path, PromptSettings(), 300, [])) == 2
    with pytest.raises(InputError, match=message) as caught:
        tokenize_rows(tokenizer, rows, path, PromptSettings(), 300, [])
    assert str(caught.value).startswith(f"{path}: row 3: the chat template cannot be rendered")


# As some that know no system prompt, or one exchange alone.
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAST = (
    "{% for m in messages[-1 if add_generation_prompt else -2:] %}<|{{ m['role'] }}|>{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM, USER, ANSWER, AGAIN = ({"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", "A?"), ("assistant", "<think>hm</think>a"), ("user", "B?")))  # fmt: skip


@pytest.mark.parametrize(
    "template, turns, what",
    [
        (NO_SYSTEM, [SYSTEM, USER, ANSWER], r"leaves out the system prompt \(turn 1 of the conversation\)"),
        (LAST, [USER, ANSWER, AGAIN, ANSWER], r"leaves out the turn of the user \(turn 1 of the conversation\)"),
        (NO_SYSTEM, [USER, ANSWER, AGAIN, ANSWER], None),
        (NO_SYSTEM, [SYSTEM | {"content": ""}, USER, ANSWER], None),
        (FORGETTING, [SYSTEM, USER, ANSWER, AGAIN, ANSWER], None),  # thoughts alone are left out
    ],
)
def test_a_template_that_leaves_out_a_turn_is_found_out(template, turns, what, tmp_path):
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = template
    path = str(written(tmp_path / "a.jsonl", [[USER, ANSWER], turns]))
    rows = read_rows(path)[0]
    if what is None:
        assert tokenize_rows(tokenizer, rows, path, PromptSettings(), 300, [])
        return
    with pytest.raises(InputError, match=what) as caught:
        tokenize_rows(tokenizer, rows, path, PromptSettings(), 300, [])
    assert str(caught.value).startswith(f"{path}: row 2: the chat template")
    with pytest.raises(InputError, match=what):  # and where it is asked
        prompt_ids(tokenizer, rows[1].prompt, rows[1].history)


def test_an_answer_that_the_template_writes_otherwise_is_told_as_such(tmp_path):
    tokenizer = tokenizer_of("llama")
    rewritten = "m['content'].replace('<think>', '<think>\\n').replace('</think>', '\\n</think>\\n')"
    tokenizer.chat_template = THINKING.replace("{% else %}{{ m['content'] }}", "{% else %}{{ " + rewritten + " }}")
    path = str(written(tmp_path / "a.jsonl", [[USER, ANSWER | {"content": "a"}], [USER, ANSWER]]))
    with pytest.raises(InputError) as caught:
        tokenize_rows(tokenizer, read_rows(path)[0], path, PromptSettings(), 300, [])
    assert str(caught.value).startswith(
        f"{path}: row 2: the chat template writes the answer '<think>hm</think>a' otherwise, as "
        "'<think>\\nhm\\n</think>\\na<|eot|>'"
    )
