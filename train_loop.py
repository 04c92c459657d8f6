"""Fine-tune a causal language model with NoiseFiT (arXiv 2504.03302), on a hand-written Accelerate loop.

    accelerate launch train_loop.py --model MODEL --train_data questions.csv

Read it top to bottom: it is the algorithm. Load; measure every layer and choose those that get noise; then, step by
step, run the clean and the noisy branches of each micro-batch, combine the losses, go backward, clip, step, log. Which
branches and weights a `--loss_mode` has is a line of `noisefit/objectives.py`. Edit it in place.
"""

from __future__ import annotations

import math
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import get_scheduler

from noisefit.arguments import parse_arguments
from noisefit.batches import Batch, collate, count_targets, count_tokens, cut_step, epoch_steps, steps_per_epoch
from noisefit.branches import BranchedModel
from noisefit.checkpoints import Checkpoints
from noisefit.choosing import choose_policy, describe, make_noise
from noisefit.data import load_rows
from noisefit.errors import Stopped, notice, on_main_process, one_line_errors
from noisefit.evaluation import evaluate
from noisefit.files import alone_in
from noisefit.identity import identify_run
from noisefit.losses import consistency_loss, cross_entropy, mean_over_branches, rdrop_loss, soft_target_loss
from noisefit.memory import naming_out_of_memory
from noisefit.models import check_model, limit_length, load_config, load_model, load_tokenizer, try_out
from noisefit.objectives import LOSSES, OBJECTIVES
from noisefit.output_folder import OutputFolder
from noisefit.outputs import (
    check_checkpoint_names,
    check_output,
    check_output_path,
    check_tokenizer_names,
    save_model,
    start_output,
    where_things_are,
    write_policy,
)
from noisefit.policy import NoisePolicy, check_policy
from noisefit.precision import keep_float32_when_sharded
from noisefit.processes import check_processes, finish, on_any_process, start_accelerator
from noisefit.prompts import Example, check_chat_template, set_chat_template, tokenize_rows
from noisefit.resuming import find_checkpoint, prompt_date
from noisefit.signals import StopSignals, end_with_launcher
from noisefit.startup import choose_strategy
from noisefit.tracking import Metrics, check_bad_steps, check_tracker, progress_bar, start_trackers
from noisefit.weights import unsharded


def train(args: Namespace) -> None:
    end_with_launcher()
    check_output_path(args)
    # From the first check on nobody else writes there.
    with alone_in(Path(args.output_model), on_main_process()), OutputFolder(args.output_model) as output:
        train_in(output, args)


def train_in(output: OutputFolder, args: Namespace) -> None:
    # --- Everything that can be checked without the model's weights, before anything is written ----------------------
    check_output(args, output)
    check_tracker(args)
    check_chat_template(args.chat_template)
    rows, eval_rows = load_rows(args.train_data), load_rows(args.eval_data)
    config = load_config(args)
    tokenizer = load_tokenizer(args)
    num_layers, vocabulary = check_model(args, config)
    check_policy(args, num_layers)
    limit_length(args, config)
    tracker = None if args.report_to == "none" else args.report_to
    accelerator = start_accelerator(log_with=tracker, project_dir=args.output_model)
    check_processes(accelerator, args.quantization)
    args.prompt_date = prompt_date(args, tokenizer)
    set_chat_template(tokenizer, args.chat_template, args.prompt_date)
    check_tokenizer_names(tokenizer, output)
    examples = tokenize_rows(args, tokenizer, rows, args.train_data, vocabulary)
    eval_examples = tokenize_rows(args, tokenizer, eval_rows, args.eval_data, vocabulary)

    # --- Model, optimizer, schedule ---------------------------------------------------------------------------------
    keep_float32_when_sharded(accelerator)
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates by itself, whatever the launch's config says
    num_processes = accelerator.num_processes

    rows_per_step = args.batch_size * args.gradient_accumulation_steps * num_processes
    epoch_length = steps_per_epoch(len(examples), rows_per_step)
    total_steps = args.epochs * epoch_length
    if args.max_steps != -1:
        total_steps = min(total_steps, args.max_steps)
    run = identify_run(args, config, examples, eval_examples, rows_per_step, accelerator)
    checkpoint = find_checkpoint(args, run, total_steps)
    check_checkpoint_names(args, output, total_steps)

    set_seed(args.seed)  # the same adapter on every process ...
    model = BranchedModel(load_model(args, accelerator, checkpoint), args.loss_chunk_size, args.rdrop_dropout)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=args.weight_decay
    )
    # The schedule is not given to `prepare`, which would step it once for every process.
    warmup_steps = math.ceil(args.warmup_ratio * total_steps)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # ... but noise and dropout of its own

    def micro_batches(rows: list[Example]) -> list[Batch]:
        """This process's share of an optimizer step's rows, as tensors on its device."""
        shares = cut_step(rows, args.batch_size, num_processes, accelerator.process_index)
        return [collate(share, tokenizer.pad_token_id, accelerator.device) for share in shares]

    # --- The method: which layers get noise, and what the loss is ---------------------------------------------------
    objective = OBJECTIVES[args.loss_mode]
    weights = objective.weights(args)  # of the losses that it has
    w = SimpleNamespace(**dict.fromkeys(LOSSES, 0.0) | weights)
    calibration: list[Batch] = []
    for rows in epoch_steps(examples, rows_per_step, args.seed, epoch=0):
        calibration += micro_batches(rows)
        if len(calibration) >= max(args.snr_batches, args.auto_calib_batches):
            break

    def choose_noise() -> tuple[NoisePolicy, str]:
        """Measure the layers, choose those that get noise, and check how the branches can be run."""
        with metrics.pausing():
            try_out(model, calibration[0], "--model", args.model)
            policy = choose_policy(args, model, calibration, accelerator)
            noisy = list(make_noise(args, policy))
            strategy, reason = choose_strategy(model, calibration[0], noisy, args.branches, objective.branches)
        notice(*describe(args, policy, num_layers, strategy), reason)
        return policy, strategy

    def chunk_losses(clean: list[Tensor], noisy: list[Tensor], target_tokens: Tensor) -> Tensor:
        """The losses of one chunk of supervised tokens, each a sum over them, 0 where the objective has it not.

        `clean` and `noisy` hold the logits [N, V] of its branches without and with noise; targets are [N].
        """
        ce = soft = consistency = rdrop = torch.zeros((), device=target_tokens.device)
        if "ce" in weights:
            ce = mean_over_branches(cross_entropy(logits, target_tokens) for logits in clean or noisy)
        if "soft" in weights:
            soft = mean_over_branches(soft_target_loss(clean[0], logits, args.temperature) for logits in noisy)
        if "consistency" in weights:
            consistency = consistency_loss(noisy[0], noisy[1], args.temperature)
        if "rdrop" in weights:
            rdrop = rdrop_loss(clean[0], clean[1], args.temperature)
        return torch.stack([ce, soft, consistency, rdrop])

    # --- Where the run stands: at its start, or where a checkpoint was written -------------------------------------
    metrics = Metrics(accelerator, args, weights, num_layers)
    checkpoints = Checkpoints(args, output, run, accelerator, model, optimizer, schedule, metrics, tokenizer)
    if checkpoint is None:
        step = seen_targets = bad_steps = 0
        policy, strategy = choose_noise()
    else:
        state = checkpoints.load(checkpoint)
        step, seen_targets, bad_steps = state["step"], state["seen_targets"], state["bad_steps"]
        policy, strategy = NoisePolicy(**state["policy"]), state["strategy"]
        notice(f"going on from {checkpoint}, after step {step}")
        if state["total_steps"] != total_steps:
            notice(f"the learning rate now follows a schedule of {total_steps} steps instead of {state['total_steps']}")
    noise = make_noise(args, policy)  # a layer's index to the noise that its output gets
    notice(f"{len(examples)} rows; {total_steps} steps of {rows_per_step} rows; processes: {num_processes}")

    # --- The loop ---------------------------------------------------------------------------------------------------
    model.train()
    with (
        StopSignals() as stop,
        progress_bar(accelerator, total_steps, "training", "step", step) as progress,
    ):
        if accelerator.is_main_process:
            start_output(args, output, checkpoint)
            write_policy(output, policy)
        start_trackers(accelerator, args)
        for epoch in range(step // epoch_length, math.ceil(total_steps / epoch_length)):
            for rows in epoch_steps(examples, rows_per_step, args.seed, epoch, step - epoch * epoch_length):
                if step == total_steps:
                    break
                if args.snr_every and step and step % args.snr_every == 0:
                    policy, strategy = choose_noise()
                    noise = make_noise(args, policy)
                    if accelerator.is_main_process:
                        write_policy(output, policy)

                step += 1
                target_tokens = count_targets(rows)  # of the whole step: all its micro-batches, all processes
                step_sums = torch.zeros(len(LOSSES), device=accelerator.device)
                batches = micro_batches(rows)
                for batch in batches:
                    # Gradients are reduced over the processes once a step, with its last micro-batch.
                    reduction = nullcontext() if batch is batches[-1] else accelerator.no_sync(model)
                    with reduction, naming_out_of_memory(args, step, batch):
                        how = {"branches": objective.branches, "noise": noise, "strategy": strategy}
                        sums = model(**batch, **how, chunk_losses=chunk_losses)
                        ce, soft, consistency, rdrop = sums / target_tokens
                        loss = w.ce * ce + w.soft * soft + w.consistency * consistency + w.rdrop * rdrop
                        # The reduction averages over processes, but these losses are shares of one sum.
                        accelerator.backward(loss * num_processes)
                    step_sums += sums.detach()

                grad_norm = unsharded(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf))
                finite = step_sums.isfinite().all() & grad_norm.isfinite()
                stopping, bad = on_any_process(accelerator, stop.received is not None, ~finite)
                learning_rate = schedule.get_last_lr()[0]
                if bad:
                    optimizer.zero_grad()  # so that the step changes nothing; fp16's scaler lowers its scale there
                optimizer.step()
                optimizer.zero_grad()
                if not bad:
                    schedule.step()
                    seen_targets += target_tokens
                metrics.add_step(step_sums, noise, target_tokens, count_tokens(rows), skipped=bad)
                bad_steps = check_bad_steps(args, step, bad_steps + 1) if bad else 0

                progress.update()
                passes, last = step / epoch_length, step == total_steps
                if step % args.logging_steps == 0 or last:
                    line = metrics.log(step, passes, learning_rate, grad_norm)
                    progress.set_postfix({name: line[name] for name in ("loss", "ce_loss")}, refresh=False)
                due = step % args.eval_steps == 0 if args.eval_steps else step % epoch_length == 0
                if eval_examples and (due or last):
                    held_out = (eval_examples, args.batch_size, tokenizer.pad_token_id)
                    with metrics.pausing():
                        ce = evaluate(accelerator, model, strategy, *held_out)
                    metrics.log_evaluation(step, passes, ce, count_targets(eval_examples))
                if stopping or (args.save_steps and (step % args.save_steps == 0 or last)):
                    variables = {"seen_targets": seen_targets, "bad_steps": bad_steps, "total_steps": total_steps}
                    checkpoint = checkpoints.save(step, **variables, policy=asdict(policy), strategy=strategy)
                if stopping and not last:
                    finish(accelerator)
                    raise Stopped(f"stopped after step {step} of {total_steps}; the same command with "
                                  f"--resume_from_checkpoint latest goes on from {checkpoint}")  # fmt: skip

        save_model(accelerator, model, tokenizer, args, output, seen_targets)
    finish(accelerator)
    notice(*where_things_are(args))


if __name__ == "__main__":
    with one_line_errors("train_loop.py"):
        train(parse_arguments())
