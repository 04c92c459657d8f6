"""What a large model is answered with: split over devices, in 16 bits, with a cache of fixed size, or by vLLM."""

import csv
import importlib.util

import pytest
import torch
import vllm_stand_in
from running import words
from tiny_folder import tiny_folder

import generate
from noisefit.answers import generation, vllm_engine
from noisefit.answers.generation import Answerer, answer_all
from noisefit.answers.jobs import Job
from noisefit.answers.loading import check_device_map, load_answer_model, load_answer_tokenizer, model_fingerprint
from noisefit.answers.probability import answer_logits
from noisefit.answers.settings import parse_arguments
from noisefit.base.errors import InputError
from noisefit.inputs.prompts import prompt_ids
from noisefit.inputs.templates import set_chat_template

CPU = torch.device("cpu")
PROMPTS = ["Who?", "Where, and when, was it?", "Why?"]


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    """Saved by PEFT as a training does, with a `lora_B` that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), LoraConfig(task_type="CAUSAL_LM", r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(**flags):
    flags = dict(input_csv="q.csv", max_new_tokens=8, rounds=2, temperature=0.9) | flags
    return parse_arguments(words(**flags))


def answers_of(settings, model, batch_size=4, **options):
    tokenizer = load_answer_tokenizer(settings, settings.model_id)
    set_chat_template(tokenizer)
    answerer = Answerer(model, tokenizer, settings, **options)
    jobs = [Job(i, prompt, prompt_ids(tokenizer, prompt), (1, 2)) for i, prompt in enumerate(PROMPTS)]
    return answerer, {(i, r): answer for b in answer_all(answerer, jobs, batch_size) for i, r, answer in b}


def test_a_model_of_which_a_part_lies_on_a_disk_gives_the_same_answers(llama_folder):
    settings = settings_of(model_id=llama_folder)
    _, expected = answers_of(settings, load_answer_model(settings, str(llama_folder), CPU))
    places = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    places |= {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    object.__setattr__(settings, "device_map", places)  # accelerate's own choice would be a GPU
    model = load_answer_model(settings, str(llama_folder), CPU)
    assert any(parameter.is_meta for parameter in model.parameters()) and set(model.hf_device_map.values()) > {"disk"}
    assert answers_of(settings, model)[1] == expected


def test_an_adapter_is_not_put_on_a_model_that_the_gpus_have_no_room_for(adapter, llama_folder):
    settings = settings_of(model_path=adapter, model_id=llama_folder)
    object.__setattr__(settings, "device_map", {"model": "disk", "lm_head": "cpu"})
    before = {path: path.read_bytes() for path in llama_folder.iterdir()}
    with pytest.raises(InputError, match="does not fit the machine's GPUs"):
        load_answer_model(settings, str(llama_folder), CPU)
    assert {path: path.read_bytes() for path in llama_folder.iterdir()} == before


def test_a_model_is_split_by_one_process_of_a_machine_only(llama_folder, monkeypatch):
    settings = settings_of(model_id=llama_folder, device_map="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"--device_map auto is one process on a machine, and the launch has 2"):
        check_device_map(settings)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines
    check_device_map(settings)
    with pytest.raises(InputError, match="--noise_passes does not go with --device_map"):
        settings_of(model_path="a", device_map="auto", noise_passes=1)
    with pytest.raises(InputError, match="--static_cache does not go with --device_map"):
        settings_of(model_path="a", device_map="auto", static_cache=True)


def test_in_16_bits_the_adapter_keeps_its_digits(adapter, llama_folder):
    """Its effect on the logits, the weights alone rounded: merged into bfloat16, much of a small one is lost."""
    flags = dict(model_path=adapter, model_id=llama_folder)
    prompt, said = list(range(5, 30)), list(range(40, 60))

    def logits(settings, merged=False):
        model = load_answer_model(settings, str(llama_folder), CPU)
        model = model.merge_and_unload() if merged else model
        with torch.no_grad():
            return answer_logits(model.float(), prompt, said).double()

    low = settings_of(**flags, dtype="bfloat16")
    base = logits(settings_of(model_id=llama_folder, dtype="bfloat16"))
    loaded = load_answer_model(low, str(llama_folder), CPU)
    assert loaded.dtype == torch.bfloat16 and hasattr(loaded, "merge_and_unload")
    assert not hasattr(load_answer_model(settings_of(**flags), str(llama_folder), CPU), "merge_and_unload")
    effect = logits(settings_of(**flags)) - logits(settings_of(model_id=llama_folder))  # all in float32
    lost = [(logits(low, merged) - base - effect).abs().mean() / effect.abs().mean() for merged in (False, True)]
    assert lost[0] < 0.1 and lost[1] > 3 * lost[0], lost


def test_an_adapter_beside_the_weights_shares_the_prompts_pass_too(adapter, llama_folder):
    settings = settings_of(model_path=adapter, model_id=llama_folder, no_merge=True)
    model = load_answer_model(settings, str(llama_folder), CPU)
    answerer, expected = answers_of(settings, model)
    assert answerer.shares_prefill
    answerer.shares_prefill = False
    tokenizer = answerer.tokenizer
    jobs = [Job(i, prompt, prompt_ids(tokenizer, prompt), (1, 2)) for i, prompt in enumerate(PROMPTS)]
    assert {(i, r): answer for batch in answer_all(answerer, jobs, 3) for i, r, answer in batch} == expected


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_static_cache_changes_no_answer(model_type, llama_folder, tmp_path):
    folder = llama_folder if model_type == "llama" else tiny_folder(tmp_path / "m", model_type)
    settings = settings_of(model_id=folder)
    _, expected = answers_of(settings, load_answer_model(settings, str(folder), CPU))
    answerer, found = answers_of(settings, load_answer_model(settings, str(folder), CPU), static_cache=True)
    assert not answerer.shares_prefill and found == expected


def test_the_batch_doubles_while_half_of_the_memory_is_free(llama_folder, monkeypatch):
    settings = settings_of(model_id=llama_folder)
    model = load_answer_model(settings, str(llama_folder), CPU)
    _, expected = answers_of(settings, model)
    sizes, free = [], iter([True, True, False, False, False])
    original = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, batch: sizes.append(sum(len(j.rounds) for j in batch)) or original(self, batch)
    )
    monkeypatch.setattr(generation, "FIRST_BATCH_SIZE", 1)
    monkeypatch.setattr(generation, "is_half_free", lambda device: next(free))
    assert answers_of(settings, model, batch_size=0)[1] == expected
    assert sizes == [1, 2, 3]  # of six answers: one, two, and room for four
    sizes.clear()
    monkeypatch.setattr(generation, "is_half_free", lambda device: True)
    assert answers_of(settings, model, batch_size=2)[1] == expected and sizes == [2, 2, 2]  # as it was asked for


def test_a_batch_that_was_too_large_is_not_tried_again(llama_folder, monkeypatch):
    settings = settings_of(model_id=llama_folder)
    model = load_answer_model(settings, str(llama_folder), CPU)
    _, expected = answers_of(settings, model)
    sizes, original = [], Answerer.answer

    def answer(self, batch):
        sizes.append(sum(len(job.rounds) for job in batch))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return original(self, batch)

    monkeypatch.setattr(Answerer, "answer", answer)
    monkeypatch.setattr(generation, "FIRST_BATCH_SIZE", 4)
    monkeypatch.setattr(generation, "is_half_free", lambda device: True)
    assert answers_of(settings, model, batch_size=0)[1] == expected
    assert sizes == [4, 2, 2, 2]


def test_half_of_a_gpus_memory_is_looked_for_on_a_gpu(monkeypatch):
    assert not generation.is_half_free(CPU)
    for free, expected in ((6, True), (5, True), (4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10))
        assert generation.is_half_free(torch.device("cuda")) == expected


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_generate(output, **flags):
    generate.generate(settings_of(output_csv=output, **flags))
    return rows_of(output)


@pytest.mark.parametrize("end", ["many tokens", "one token"])
def test_vllm_is_asked_for_what_transformers_would_do(end, adapter, llama_folder, tmp_path, monkeypatch, capsys):
    """Greedy answers, their log-probabilities and their lengths are the same; where the end of a turn is many tokens,
    it is looked for as text."""
    engine = vllm_stand_in.install(monkeypatch)
    questions = tmp_path / "q.csv"
    questions.write_text("prompt\n" + "".join(f"{prompt}\n" for prompt in ("Who?", "Why then?", "Who?")))
    flags = dict(model_path=adapter, model_id=llama_folder, input_csv=questions, repetition_penalty=1.3)
    if end == "one token":
        flags |= dict(chat_template="plain")
    greedy = flags | dict(greedy=True, max_new_tokens=12)
    expected = run_generate(tmp_path / "a.csv", **greedy)
    assert run_generate(tmp_path / "b.csv", **greedy, engine="vllm") == expected
    [made] = engine.made
    assert made.given["max_lora_rank"] == 8 and made.given["dtype"] == "float32"
    assert "the same seed gives the same answers on this machine" in capsys.readouterr().err
    stop, detokenize = (None, False) if end == "one token" else (["<|im_end|>"], True)
    assert all((params.stop, params.detokenize) == (stop, detokenize) for params in made.asked)
    if end == "one token":
        return
    drawn = [run_generate(tmp_path / f"{name}.csv", **flags, seed=seed, engine="vllm") for name, seed in
             (("c", 1), ("d", 1), ("e", 2))]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({row["generated_response"] for row in drawn[0]}) == 6  # rounds, and rows that repeat a prompt, differ


def test_what_does_not_go_with_vllm_is_refused_before_anything_is_loaded(llama_folder, tmp_path, monkeypatch):
    for flags in (dict(noise_passes=1), dict(device_map="auto"), dict(quantization="4bit"), dict(batch_size=3),
                  dict(no_merge=True), dict(static_cache=True), dict(attn_implementation="eager")):  # fmt: skip
        with pytest.raises(InputError, match=f"--{next(iter(flags))} does not go with --engine vllm"):
            settings_of(model_path="a", engine="vllm", **flags)
    with pytest.raises(InputError, match="--tensor_parallel is for --engine vllm"):
        settings_of(model_path="a", tensor_parallel=2)
    settings = settings_of(model_id=llama_folder, engine="vllm")
    one, two = (type("Launch", (), dict(num_processes=count)) for count in (1, 2))
    with pytest.raises(InputError, match="is one process, and the launch has 2"):
        vllm_engine.check_vllm(settings, two)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(InputError, match="--engine vllm needs vLLM: pip install vllm"):
            vllm_engine.check_vllm(settings, one)
    vllm_stand_in.install(monkeypatch)
    vllm_engine.check_vllm(settings, one)
    with pytest.raises(InputError, match=r"--temperature 0\.001: vLLM takes 0\.01"):
        vllm_engine.check_vllm(settings_of(model_id=llama_folder, engine="vllm", temperature=0.001), one)


def test_an_adapter_that_vllm_has_no_room_for_is_refused(tmp_path):
    path = tmp_path / "adapter_config.json"
    for content, room in (('{"r": 8}', 8), ('{"r": 9}', 16), ('{"r": 4, "rank_pattern": {"q": 33}}', 64)):
        path.write_text(content)
        assert vllm_engine.rank_of(tmp_path) == room
    for content, message in (('{"r": 513}', "rank 513"), ("{}", "has no rank"), ("[", "has no rank")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            vllm_engine.rank_of(tmp_path)


def test_answers_of_another_engine_are_not_gone_on_with(llama_folder):
    found = {
        model_fingerprint(settings_of(model_id=llama_folder, **flags), str(llama_folder), CPU)
        for flags in ({}, dict(engine="vllm"), dict(static_cache=True), dict(device_map="auto"))
    }
    assert len(found) == 4
