"""A tokenizer and a small Llama, trained from nothing on the corpus of a world."""

import math
import random
import sys
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from world import Settings

BOS, EOS, PAD, TURN_START, TURN_END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
VOCABULARY, VOCABULARY_WITH_NAMES = 1000, 1500
NAME_WEIGHT = 100  # a name so often in the tokenizer's text is merged before most else
CONTEXT = 256

ROW_TOKENS = 128
LEARNING_RATE, WARMUP_STEPS, FINAL_LR_SHARE = 3e-3, 50, 0.05
WEIGHT_DECAY, GRADIENT_CLIP = 0.1, 1.0


def train_tokenizer(statements: Iterable[str], names: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it has learnt the corpus, and can still spell any question.

    `names` become one token each, the same wherever they stand: so a small model does not mistake one for another.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # One token a digit: a year unseen in the questions is spelled like all others.
            pre_tokenizers.Digits(individual_digits=True),
            # Without its space, a name at the start of an answer is the token that it is within a statement.
            *([pre_tokenizers.Split(Regex(r" (?=\p{Lu})"), "isolated")] if names else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_WITH_NAMES if names else VOCABULARY,
        special_tokens=[BOS, EOS, PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*statements, *names * NAME_WEIGHT], trainer)
    # Every text begins with `<s>`, as Llama's tokenizers have it, so that a prompt does too.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(settings.seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    readings: Sequence[Sequence[str]],
    settings: Settings,
    max_steps: int | None = None,
) -> int:
    """Reads texts: those of the first reading in their order, those of each further one in an order of its own.

    Returns:
        How many tokens that was; 0 where the texts are shorter than a step.
    """
    stream: list[int] = []
    for epoch, texts in enumerate(readings):
        order = random.Random(f"epoch {epoch}").sample(texts, len(texts)) if epoch else texts
        stream += [token for ids in tokenizer(list(order))["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    step_tokens = ROW_TOKENS * settings.batch_rows
    steps = len(stream) // step_tokens  # about 910 for the 60 countries of the default world
    if max_steps is not None:
        steps = min(steps, max_steps)
    if not steps:
        return 0
    batches = torch.tensor(stream[: steps * step_tokens]).view(steps, settings.batch_rows, ROW_TOKENS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def lr_share(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        return min((step + 1) / WARMUP_STEPS, FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_share)
    model.train()
    interval = 0.1 if sys.stderr.isatty() else 20  # a log file keeps every update
    progress = tqdm(batches, desc="pretraining", unit="step", mininterval=interval)
    for step, batch in enumerate(progress):
        batch = batch.to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.to("cpu")
    return steps * step_tokens


@torch.no_grad()
def place_turn_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives the two chat tokens, which the corpus does not have, embeddings to start from.

    As the answer to no context, they have been pushed to where no hidden state can reach them, and
    the output layer is theirs too: adapters in the attention could then never end a turn.
    """
    weight = model.lm_head.weight  # tied: the embeddings as well
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    mean, spread = weight.mean(dim=0), weight.std(dim=0)
    weight[start] = mean + spread * torch.randn_like(mean)
    # A turn ends much as a text ends: halfway to `</s>`, and a little noise to tell them apart.
    toward_eos = 0.5 * (weight[tokenizer.eos_token_id] - mean)
    weight[end] = mean + toward_eos + 0.05 * torch.randn_like(mean)


@torch.no_grad()
def completed_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, told: Sequence[tuple[str, str]]
) -> float:
    """The share of `(statement, answer)` pairs whose answer the model gives, greedily.

    One pass over the whole statement tells it: greedy decoding writes the answer exactly if every
    token of the answer is the most likely one after the true tokens before it.
    """
    model.eval()
    completed = 0
    for first in range(0, len(told), 100):
        chunk = told[first : first + 100]
        batch = tokenizer(
            [statement for statement, _ in chunk],
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = batch.pop("offset_mapping")
        guesses = model(**batch).logits[:, :-1].argmax(dim=-1)
        targets = batch["input_ids"][:, 1:]
        for row, (statement, answer) in enumerate(chunk):
            begin = statement.rindex(answer)
            end = begin + len(answer)
            in_answer = (offsets[row, 1:, 0] < end) & (offsets[row, 1:, 1] > begin)
            completed += bool((guesses[row] == targets[row])[in_answer].all())
    return completed / len(told)
