"""Fine-tune a causal language model with NoiseFiT (arXiv 2504.03302), on a hand-written Accelerate loop.

    accelerate launch train_loop.py --model MODEL --train_data questions.csv

It is the algorithm: choose the layers that get noise; then, step by step, run the branches of each micro-batch, combine
their losses, step, log. A `--loss_mode` is a line of `noisefit/method/objectives.py`. To edit it: docs/editing.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import get_scheduler

from noisefit.base.compiling import fused_losses
from noisefit.base.errors import Stopped, notice, one_line_errors
from noisefit.base.precision import keeping_tf32, set_precision
from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, TEACHER, BranchedModel, Logits, Losses
from noisefit.fork.exactness import can_pack, choose_strategy
from noisefit.fork.hooks import Noise, NoiseFunction, pop_noise_sizes
from noisefit.fork.tally import TokenTally
from noisefit.inputs.batches import Batch, collate, count_targets, count_tokens, cut_step, epoch_steps, steps_per_epoch
from noisefit.inputs.model_checks import try_out
from noisefit.inputs.prompts import Example
from noisefit.method.losses import (
    add_losses,
    consistency_loss,
    cross_entropy,
    mean_over_branches,
    soft_target_loss,
    symmetric_kl,
)
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.policy import NoisePolicy, make_noise
from noisefit.method.teacher import make_teacher
from noisefit.run.checkpoints import Checkpoints
from noisefit.run.compiling import compile_blocks
from noisefit.run.evaluation import Watch
from noisefit.run.memory_needed import memory_needed
from noisefit.run.metrics import Metrics
from noisefit.run.noise_policy import choose_policy, describe
from noisefit.run.output import open_output, push_output, save_model, start_output, where_things_are, write_policy
from noisefit.run.output_folder import OutputFolder
from noisefit.run.preparation import prepare
from noisefit.run.processes import finish, on_any_process, progress_bar, reduction
from noisefit.run.settings import Settings, parse_arguments
from noisefit.run.sharding import load_model, prepare_model
from noisefit.run.signals import StopSignals, end_with_launcher
from noisefit.run.steps import make_optimizer, naming_failures, take_step
from noisefit.run.teacher_cache import with_predictions
from noisefit.run.trackers import start_trackers
from noisefit.run.weights import unsharded
from noisefit.samples import make_sampler


def train(settings: Settings) -> None:
    """Train as the settings say, all of it: `accelerate launch`, `noisefit-train` and notebooks call this.

    Raises:
        InputError: something is not as it should be; nothing is half-written.
        Stopped: a signal ended the run, which can be resumed.
    """
    end_with_launcher()
    with open_output(settings) as output, keeping_tf32():
        train_in(output, settings)


def train_in(output: OutputFolder, settings: Settings) -> None:
    # --- Everything that can be checked without the model's weights, before anything is written ----------------------
    prepared = prepare(settings, output)
    settings, accelerator, tokenizer = prepared.settings, prepared.accelerator, prepared.tokenizer
    examples, num_layers = prepared.examples, prepared.num_layers
    rows_per_step, total_steps, checkpoint = prepared.rows_per_step, prepared.total_steps, prepared.checkpoint

    # --- Model, optimizer, schedule ---------------------------------------------------------------------------------
    notice(set_precision(accelerator))
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates by itself, whatever the launch's config says
    num_processes = accelerator.num_processes
    epoch_length = steps_per_epoch(len(examples), rows_per_step)
    set_seed(settings.seed)  # the same adapter on every process ...
    loaded = load_model(settings, settings.model, accelerator, checkpoint, settings.trust_remote_code)
    model = BranchedModel(loaded, settings.loss_chunk_size, settings.rdrop_dropout)
    compile_blocks(model, accelerator)  # where the launch asks for --dynamo_backend
    optimizer = make_optimizer(settings, model, accelerator.device)
    # The schedule is not given to `prepare`, which would step it once for every process.
    warmup_steps = math.ceil(settings.warmup_ratio * total_steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    model, optimizer = prepare_model(accelerator, model, optimizer)
    set_seed(settings.seed, device_specific=True)  # ... but noise and dropout of its own

    def micro_batches(step_rows: list[Example], packing: bool = False) -> list[Batch]:
        """This process's share of an optimizer step's rows, as tensors on its device."""
        shares = cut_step(step_rows, settings.batch_size, num_processes, accelerator.process_index, packing)
        how = tokenizer.pad_token_id, accelerator.device, settings.noise_tokens, packing
        return [collate(share, *how) for share in shares]

    # --- The method: which layers get noise, and what the loss is ---------------------------------------------------
    objective, temperature = settings.objective, settings.temperature
    teaching = settings.temperature_on, settings.teacher_gradient
    weights = objective.weights(settings)
    teacher = make_teacher(settings, model)
    distribution = TokenScaledNoise
    calibration: list[Batch] = []
    for step_rows in epoch_steps(examples, rows_per_step, settings.seed, epoch=0):
        calibration += micro_batches(step_rows)
        if len(calibration) >= max(settings.snr_batches, settings.auto_calib_batches):
            break

    def noise_of(policy: NoisePolicy) -> Mapping[int, Noise | NoiseFunction]:
        """The noise that a layer's output gets, by the layer's index."""
        return make_noise(settings, policy, distribution)

    def choose_noise(before: NoisePolicy | None = None) -> tuple[NoisePolicy, str]:
        """Measure the layers, choose those that get noise, and check how the branches can be run."""
        with metrics.pausing():
            try_out(model, calibration[0], "--model", settings.model)
            policy = choose_policy(settings, model, calibration, accelerator, distribution, before)
            places = list(noise_of(policy))
            strategy, reason = choose_strategy(model, calibration[0], places, settings.branches, objective.branches)
        notice(*describe(settings, policy, num_layers, strategy), reason)
        return policy, strategy

    @fused_losses  # compiled, on a GPU
    def chunk_losses(logits: Logits, target_tokens: Tensor, target_weights: Tensor | None = None) -> Losses:
        """The losses of one chunk of supervised tokens, by name: each a sum over the tokens.

        `logits` has the `[N, V]` of each branch by its kind, and of a teacher of its own; targets are `[N]`, as are
        weights in the cross-entropy that are not all 1. Each loss in the result needs a weight; no other counts.
        """
        clean, noisy, dropout = logits[CLEAN], logits[NOISY], logits[DROPOUT]
        losses: Losses = {}
        if "ce" in weights:
            targets = target_tokens, target_weights
            losses["ce"] = mean_over_branches(cross_entropy(z, *targets) for z in clean or noisy or dropout)
        if "soft" in weights:
            [target], pulled = logits[TEACHER] or clean, noisy or clean
            losses["soft"] = mean_over_branches(soft_target_loss(target, z, temperature, *teaching) for z in pulled)
        if "consistency" in weights:
            losses["consistency"] = consistency_loss(noisy[0], noisy[1], temperature, *teaching)
        if "rdrop" in weights:
            losses["rdrop"] = symmetric_kl(dropout[0], dropout[1], temperature)
        return losses

    # --- Where the run stands: at its start, or where a checkpoint was written -------------------------------------
    metrics = Metrics(accelerator, output.path, num_layers, settings)
    checkpoints = Checkpoints(
        output, settings.save_total_limit, not settings.full_finetune, prepared.run, accelerator, model, optimizer,
        schedule, metrics, tokenizer, teacher,
    )  # fmt: skip
    watch = Watch(prepared, output, model, metrics, make_sampler(prepared, model))  # evaluations, and what they decide
    if checkpoint is None:
        step = seen_targets = bad_steps = 0
        policy, strategy = choose_noise()
    else:
        state = checkpoints.load(checkpoint)
        step, seen_targets, bad_steps = state["step"], state["seen_targets"], state["bad_steps"]
        policy, strategy = NoisePolicy(**state["policy"]), state["strategy"]
        notice(f"going on from {checkpoint}, after step {step}")
        watch.load_state_dict(state)
        if state["total_steps"] != total_steps:
            notice(f"the learning rate now follows a schedule of {total_steps} steps instead of {state['total_steps']}")
    noise = noise_of(policy)
    packing = settings.packing and can_pack(model, calibration[0], noise, strategy, objective.branches)
    notice(memory_needed(prepared, model, policy, strategy, packing))
    notice(f"{prepared.size}; processes: {num_processes}")

    # --- The loop ---------------------------------------------------------------------------------------------------
    model.train()
    with StopSignals() as stop, progress_bar(accelerator, total_steps, "training", "step", step) as progress:
        start_output(accelerator, settings, output, policy, checkpoint, prepared.scores, prepared.rows_record)
        start_trackers(accelerator, settings, resumed=checkpoint is not None)
        with metrics.pausing():
            examples = with_predictions(prepared, output, teacher, strategy)
        for epoch in range(step // epoch_length, math.ceil(total_steps / epoch_length)):
            for rows in epoch_steps(examples, rows_per_step, settings.seed, epoch, step - epoch * epoch_length):
                if watch.is_over(step):
                    break
                if settings.snr_every and step and step % settings.snr_every == 0:
                    policy, strategy = choose_noise(before=policy)
                    noise = noise_of(policy)
                    packing = settings.packing and can_pack(model, calibration[0], noise, strategy, objective.branches)
                    if accelerator.is_main_process:
                        write_policy(output, policy)

                step += 1
                target_tokens = count_targets(rows)  # of the whole step: all its micro-batches, all processes
                step_loss = torch.zeros((), device=accelerator.device)
                step_losses: Losses = {}
                logged = step % settings.logging_steps == 0 or step == total_steps
                tally = TokenTally(accelerator.device) if logged else None  # accuracy and entropy
                batches = micro_batches(rows, packing)
                for batch in batches:
                    reducing = reduction(accelerator, model, last=batch is batches[-1])  # over the processes
                    with reducing, naming_failures(settings, step, batch):
                        how = {"branches": objective.branches, "noise": noise, "strategy": strategy, "tally": tally}
                        batch |= teacher.predictions(batch, strategy)  # none where the clean branch teaches
                        losses = model(**batch, **how, chunk_losses=chunk_losses)
                        loss = sum(weights[name] * (losses[name] / target_tokens) for name in losses)
                        # The reduction averages over processes, but these losses are shares of one sum.
                        accelerator.backward(loss * num_processes)
                    step_loss += loss.detach()
                    add_losses(step_losses, losses)
                if step == 1:
                    notice(weights.unused(step_losses))

                max_norm = settings.max_grad_norm or math.inf
                grad_norm = unsharded(accelerator.clip_grad_norm_(model.parameters(), max_norm))
                finite = torch.stack([step_loss, grad_norm, *step_losses.values()]).isfinite().all()
                stopping, bad = on_any_process(accelerator, stop.received is not None, ~finite)
                learning_rate = schedule.get_last_lr()[0]
                bad_steps = take_step(optimizer, schedule, step, bad, bad_steps, settings.max_bad_steps)
                if not bad:
                    seen_targets += target_tokens
                    teacher.follow()
                noise_sizes = pop_noise_sizes(model)
                metrics.add_step(step_loss, step_losses, noise_sizes, target_tokens, count_tokens(rows), bad, tally)

                progress.update()
                last = watch.look(step, strategy, seen_targets)
                if logged or last:
                    line = metrics.log(step, step / epoch_length, learning_rate, grad_norm)
                    progress.set_postfix({name: line[name] for name in ("loss", "ce_loss")}, refresh=False)
                if stopping or (settings.save_steps and (step % settings.save_steps == 0 or last)):
                    counts = {"seen_targets": seen_targets, "bad_steps": bad_steps, "total_steps": total_steps}
                    variables = counts | watch.state_dict() | {"policy": asdict(policy), "strategy": strategy}
                    checkpoint = checkpoints.save(step, **variables)
                if stopping and not last:
                    finish(accelerator)
                    raise Stopped(f"stopped after step {step} of {total_steps}; the same command with "
                                  f"--resume_from_checkpoint latest goes on from {checkpoint}")  # fmt: skip

        save_model(accelerator, model, tokenizer, settings, output, seen_targets, watch.kept)
    finish(accelerator)
    notice(*where_things_are(settings, watch.kept))
    push_output(settings, output)


def main() -> None:
    """Run the command line."""
    with one_line_errors("train_loop.py"):
        train(parse_arguments())


if __name__ == "__main__":
    main()
