"""Training and generation see the same prompt, and the end of an answer is learnt."""

import pytest
from tiny_folder import byte_tokenizer

from noisefit.base.errors import InputError
from noisefit.inputs.prompts import make_examples, prompt_ids
from noisefit.inputs.tables import Row
from noisefit.inputs.templates import (
    CHATML,
    answer_text,
    check_chat_template,
    end_of_turn,
    prompt_text,
    set_chat_template,
)

ROW = Row(1, "Who?", "Me, of course.")


def tokenizer_with(template=None, **options):
    tokenizer = byte_tokenizer(**options)
    set_chat_template(tokenizer, template)
    return tokenizer


def test_chatml_is_the_default_and_ends_in_text_then_end_of_text():
    tokenizer = tokenizer_with()
    assert prompt_text(tokenizer, "Who?") == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert end_of_turn(tokenizer) == "<|im_end|>"
    [example], dropped = make_examples(tokenizer, [ROW], 1024)
    assert not dropped
    assert example.input_ids[: example.target_start] == prompt_ids(tokenizer, "Who?")
    answer = example.input_ids[example.target_start :]
    assert tokenizer.decode(answer) == "Me, of course.<|im_end|></s>"
    assert example.num_targets == len("Me, of course.<|im_end|>") + 1  # one token a byte, and the end of the text


def test_a_single_end_token_that_stops_the_model_is_the_end():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_chat_template(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    [learnt], _ = make_examples(tokenizer, [ROW], 1024)
    assert learnt.input_ids[-2:] == [end, tokenizer.eos_token_id]
    [learnt], _ = make_examples(tokenizer, [ROW], 1024, stop_ids=[end])
    assert learnt.input_ids[-1] == end and tokenizer.eos_token_id not in learnt.input_ids


def turns(opening: str) -> str:
    """A template with end-of-text tokens after its turns."""
    return (
        "{% for m in messages %}" + opening + "{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}" + opening + "assistant: {% endif %}"
    )


def test_the_tokenizers_own_template_wins_unless_one_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = turns("#")
    set_chat_template(tokenizer)
    assert prompt_text(tokenizer, "Q") == "#user: Q</s>#assistant: "
    [example], _ = make_examples(tokenizer, [ROW], 1024)
    assert example.input_ids.count(tokenizer.eos_token_id) == 2  # the turn ends in it: no second one is added
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == CHATML
    file = tmp_path / "mine.jinja"
    file.write_text(turns("*"))
    check_chat_template(str(file))
    set_chat_template(tokenizer, str(file))
    assert prompt_text(tokenizer, "Q") == "*user: Q</s>*assistant: "


def test_alpaca_has_no_end_of_turn_so_the_end_of_text_is_the_end():
    tokenizer = tokenizer_with("alpaca")
    assert prompt_text(tokenizer, "Who?").endswith("### Instruction:\nWho?\n\n### Response:\n")
    assert answer_text(tokenizer, "Who?", "Me.") == "Me." and end_of_turn(tokenizer) == ""
    [example], _ = make_examples(tokenizer, [ROW], 1024)
    assert tokenizer.decode(example.input_ids[example.target_start :]) == "Me, of course.</s>"


def test_the_template_travels_with_the_tokenizer(tmp_path):
    tokenizer = tokenizer_with("alpaca")
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert prompt_ids(loaded, "Who?") == prompt_ids(tokenizer, "Who?")


def test_a_tokenizer_without_padding_gets_one_and_still_learns_the_end():
    tokenizer = tokenizer_with(eos_token="</s>")
    assert tokenizer.pad_token == "</s>"
    [example], _ = make_examples(tokenizer, [ROW], 1024)
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_a_start_token_that_the_model_was_trained_with_is_kept():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    set_chat_template(tokenizer)
    ids = prompt_ids(tokenizer, "Who?")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_long_rows_are_cut_and_those_without_an_answer_dropped():
    tokenizer = tokenizer_with()
    start = len(prompt_ids(tokenizer, "Who?"))
    rows = [ROW, Row(2, "Who, then, is it?", "You.")]
    [example], dropped = make_examples(tokenizer, rows, start + 3)
    assert dropped == [2] and len(example.input_ids) == start + 3 and example.num_targets == 3
    assert make_examples(tokenizer, rows, start)[1] == [1, 2]


def test_loss_on_all_supervises_the_prompt_too():
    [example], _ = make_examples(tokenizer_with(), [ROW], 1024, loss_on="all")
    assert example.target_start == 1 and example.num_targets == len(example.input_ids) - 1


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0]['content'] | nonsense }}", "cannot be rendered"),
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{{ messages[-1]['role'] }}: {{ messages[-1]['content'] }}", "does not continue"),
    ],
)
def test_templates_that_cannot_serve_are_refused(tmp_path, template, message):
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(InputError, match=message):
        tokenizer_with(str(file))


def test_an_unknown_template_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="not one of chatml, alpaca"):
        check_chat_template("chatlm")
