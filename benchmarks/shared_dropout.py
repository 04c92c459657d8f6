"""What it changes that the branches of a fork share the dropout of the layers before the noise.

    python benchmarks/shared_dropout.py [--draws 200] [--seeds 3] [--noise_std 0.1]

Against separate passes, on the demo world (`make build/world/facts.json`): with noise in the last layer alone, which
all dropout comes before, and with that of the defaults, in layers 0 to 2 of 4. First a trained adapter is held fixed,
and one batch of training rows passes through it many times, in training mode: the loss terms, and the gradient of all
adapter weights. Then whole trainings, which are kept under `--output`: the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import Tensor
from ways import noisefit_losses
from world_runs import WorldRun, add_world_flags, check_world_flags, words, world_run

from noisefit.base.compiling import chunk_size_on
from noisefit.base.errors import one_line_errors
from noisefit.fork.branches import BranchedModel
from noisefit.fork.hooks import pop_noise_sizes
from noisefit.inputs.batches import Batch, collate, epoch_steps
from noisefit.inputs.models import load_model, load_tokenizer
from noisefit.inputs.prompts import stop_token_ids, tokenize_rows
from noisefit.inputs.tables import load_rows
from noisefit.inputs.templates import set_chat_template
from noisefit.method.noise import TokenScaledNoise
from noisefit.run.settings import parse_arguments

PLACES: dict[str, dict[str, object]] = {
    "late noise": {"num_noise_layers": 1, "prefer_late_layers": 0.75},
    "early noise": {"num_noise_layers": 3},
}
STRATEGIES = ("fork", "separate")
ROWS = 16  # of an optimizer step, as in the trainings
Runs = dict[tuple[str, str], list[WorldRun]]
"""By place and strategy, one a seed."""
WEIGHTS = {"soft": 0.5, "consistency": 0.1}  # in `noisefit_losses`


@dataclass(frozen=True)
class Draws:
    """Passes of one batch through fixed weights, each with dropout and noise of its own.

    Attributes:
        terms: the soft and the consistency term by name, means over the supervised tokens, `[draws]` each.
        gradients: of the whole loss, and of its `noise terms` (all but the cross-entropy), `[draws, weights]` each.
    """

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def draw(model: BranchedModel, batch: Batch, noise: dict, strategy: str, draws: int) -> Draws:
    """Let the batch pass `draws` times; the weights stay as they are."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    targets = len(batch["target_tokens"])

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss / targets, trained, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def passes() -> Iterator[tuple[list[float], Tensor, Tensor]]:
        for _ in range(draws):
            sums = model(**batch, noise=noise, strategy=strategy, chunk_losses=noisefit_losses)
            of_noise = gradient(sums["soft"] + sums["consistency"])
            terms = [sums[name].item() / weight / targets for name, weight in WEIGHTS.items()]
            yield terms, of_noise + gradient(sums["ce"]), of_noise
        pop_noise_sizes(model)

    terms, losses, of_noise = zip(*passes(), strict=True)
    return Draws(
        dict(zip(WEIGHTS, torch.tensor(terms).T, strict=True)),
        {"loss": torch.stack(losses), "noise terms": torch.stack(of_noise)},
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def halves(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The means of every other draw: how far apart they are is by chance alone."""
    return gradients[::2].mean(dim=0), gradients[1::2].mean(dim=0)


def spread(gradients: Tensor) -> float:
    """How far a draw is from the mean of all, as a root mean square."""
    return (gradients - gradients.mean(dim=0)).square().sum(dim=1).mean().sqrt().item()


def print_draws(fork: Draws, separate: Draws) -> None:
    print(f"{'':<40}{'fork':>10}{'separate':>10}{'ratio':>8}")

    def line(name: str, measure: Callable[[Draws], float], with_ratio: bool = True) -> None:
        one, other = measure(fork), measure(separate)
        print(f"{name:<40}{one:>10.3g}{other:>10.3g}" + (f"{one / other:>8.3g}" if with_ratio else ""))

    for name in WEIGHTS:
        line(f"{name} term, mean", lambda draws, name=name: draws.terms[name].mean().item())
    for name in fork.gradients:
        of = itemgetter(name)
        print(f"gradient of the {name}")
        line("  norm of the mean", lambda draws, of=of: of(draws.gradients).mean(dim=0).norm().item())
        line("  distance of a single draw from it", lambda draws, of=of: spread(of(draws.gradients)))
        line("  cosine of the means of two halves", lambda draws, of=of: cosine(*halves(of(draws.gradients))), False)
        means = (of(draws.gradients).mean(dim=0) for draws in (fork, separate))
        print(f"{'  cosine of the means of the two':<40}{cosine(*means):>20.3g}")


def load(adapter: Path, world: Path) -> tuple[BranchedModel, Batch]:
    """The trained model, in training mode, and the rows of an optimizer step."""
    settings = parse_arguments(words({"model": world / "model", "train_data": world / "train.csv"}))
    tokenizer = load_tokenizer(settings.model, False)
    set_chat_template(tokenizer)
    rows, stops = load_rows(settings.train_data), stop_token_ids(settings.model)
    examples = tokenize_rows(tokenizer, rows, settings.train_data, settings, len(tokenizer), stops)
    model = load_model(settings, settings.model, Accelerator(), adapter)
    rows_of_step = next(epoch_steps(examples, ROWS, seed=0, epoch=0))
    return BranchedModel(model, chunk_size_on("cpu")).train(), collate(rows_of_step, tokenizer.pad_token_id)


def make_runs(args: argparse.Namespace) -> Runs:
    runs: Runs = {(place, strategy): [] for place in PLACES for strategy in STRATEGIES}
    for seed in range(args.seeds):
        for (place, strategy), made in runs.items():
            name = f"{place}-{args.noise_std:g}-{strategy}-{seed}".replace(" ", "_")
            flags = {"noise_std": args.noise_std, "branches": strategy, "epochs": args.epochs, "seed": seed}
            made.append(world_run(args.output / name, args.world, PLACES[place] | flags))
    return runs


def print_trainings(runs: Runs) -> None:
    print(f"{'trainings':<26}{'last ce_loss':>28}{'wrong answers':>28}")
    for (place, strategy), made in runs.items():
        losses = " ".join(f"{run.lines[-1]['ce_loss']:>8.4f}" for run in made)
        wrong = " ".join(f"{run.wrong:>8.1%}" for run in made)
        mean = statistics.fmean(run.wrong for run in made)
        print(f"{place + ', ' + strategy:<26}{losses:>28}{wrong:>28}   mean {mean:.1%}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_world_flags(parser, "shared_dropout")
    parser.add_argument("--draws", type=int, default=200, help="passes of the batch through fixed weights")
    parser.add_argument("--noise_std", type=float, default=0.1, help="strength of the noise")
    args = parser.parse_args(arguments)
    check_world_flags(parser, args)
    if args.draws < 4:
        parser.error("--draws: expected 4 or more")
    runs = make_runs(args)
    for place in PLACES:
        run = runs[place, "fork"][0]
        model, batch = load(run.folder / "adapter", args.world)
        noise = {layer: TokenScaledNoise(args.noise_std) for layer in run.layers}
        layers, share = ", ".join(map(str, run.layers)), run.lines[-1]["noise_to_signal"]
        print(f"\n{place}, in layers {layers}, {share:.1%} of the signal; {args.draws} passes at fixed weights:")
        torch.manual_seed(0)
        print_draws(*(draw(model, batch, noise, strategy, args.draws) for strategy in STRATEGIES))
    print()
    print_trainings(runs)


if __name__ == "__main__":
    with one_line_errors("shared_dropout.py"):
        main()
