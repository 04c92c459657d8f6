"""The functions that a GPU has compiled give what they give as they are, gradients included, for any length."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from noisefit.base import compiling
from noisefit.base.precision import add_noise, mean_change, mean_magnitude, root_mean_square
from noisefit.method.losses import consistency_loss, cross_entropy, soft_target_loss, symmetric_kl
from noisefit.method.noise import noise_scale, snr_base_std

SIZES = (3, 7), (4, 9), (12, 33)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# There is no need of a C++ compiler for the latter, which traces forward and backward and runs them op by op.
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"


@pytest.fixture
def counter(monkeypatch):
    """Compiling on this device, and counting it."""
    counting = CompileCounterWithBackend(BACKEND)
    monkeypatch.setattr(compiling, "BACKEND", counting)
    monkeypatch.setattr(compiling, "DEVICES", (DEVICE,))
    torch._dynamo.reset()
    yield counting
    assert not compiling._failed


def results(hidden: torch.Tensor, mask: torch.Tensor, strength: float) -> list[torch.Tensor]:
    """Of hidden states in float32, whose digits tell most; and of 16 bits what is done in these alone."""
    noise = torch.sin(torch.arange(hidden.numel(), device=hidden.device) * 0.7).view_as(hidden) * 0.1
    watched, low = hidden.clone().requires_grad_(), hidden.bfloat16()
    scale = noise_scale(watched, strength, mask, gradient=True)
    (scale * noise).sum().backward()
    noisy = add_noise(low, noise)
    sizes = mean_magnitude(hidden, mask), root_mean_square(hidden, mask), mean_change(low, noisy, mask)
    return [scale.detach(), watched.grad, snr_base_std(hidden, strength, mask), noisy.float(), *sizes]


@pytest.mark.slow
def test_compiled_functions_give_what_they_give_as_they_are(counter, monkeypatch):
    given = []
    for rows, length in SIZES:
        generator = torch.Generator().manual_seed(rows)
        hidden = (3 * torch.randn(rows, length, 64, generator=generator)).to(DEVICE)
        mask = (torch.rand(rows, length, generator=generator) > 0.2).long().to(DEVICE)
        given += [(hidden, mask, 0.1), (hidden, mask, 0.2)]
    found = [results(*given[0])]
    assert counter.frame_count == 6
    found += [results(*each) for each in given[1:]]
    if BACKEND == "aot_eager":  # inductor may take another kernel for much longer rows
        assert counter.frame_count == 6, "compiled anew for another length, batch or strength"
    monkeypatch.setattr(compiling, "DEVICES", ())
    for tensors, each in zip(found, given, strict=True):
        for one, other in zip(tensors, results(*each), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@compiling.fused_losses
def all_losses(logits: dict[str, list[torch.Tensor]], targets: torch.Tensor, weights: torch.Tensor) -> dict:
    [clean], (noisy_1, noisy_2) = logits["clean"], logits["noisy"]
    return {
        "ce": cross_entropy(clean, targets),
        "weighted": cross_entropy(noisy_1, targets, weights),
        "soft": soft_target_loss(clean, noisy_1, 2.0),
        "both": soft_target_loss(clean, noisy_1, 2.0, teacher_gradient=True),
        "consistency": consistency_loss(noisy_1, noisy_2, 1.0),
        "symmetric": symmetric_kl(noisy_1, noisy_2, 3.0),
    }


def losses(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each loss, and their gradients, added up in the logits of three branches."""
    generator = torch.Generator().manual_seed(tokens)
    logits = [torch.randn(tokens, 50, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3)]
    targets = torch.randint(0, 50, (tokens,), generator=generator).to(DEVICE)
    weights = torch.rand(tokens, generator=generator).to(DEVICE)
    values = list(all_losses({"clean": logits[:1], "noisy": logits[1:]}, targets, weights=weights).values())
    torch.stack(values).sum().backward()
    return [*(value.detach() for value in values), *(z.grad.float() for z in logits)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_compiled_losses_are_the_losses_with_their_gradients(dtype, near, counter, monkeypatch):
    given = (5, 9, 7, 16)  # the rest of an uneven division, then whole chunks
    found = [losses(tokens, dtype) for tokens in given[:2]]
    assert counter.frame_count == 2  # for one number of tokens, and for any
    found += [losses(tokens, dtype) for tokens in given[2:]]
    assert counter.frame_count == 2, "compiled anew for another number of tokens"
    assert losses(0, dtype)[0] == 0
    monkeypatch.setattr(compiling, "DEVICES", ())
    for tensors, tokens in zip(found, given, strict=True):
        for one, other in zip(tensors, losses(tokens, dtype), strict=True):
            torch.testing.assert_close(one, other, rtol=near, atol=1e-5)


def test_the_first_tensor_may_be_named(counter):
    doubled = compiling.fused(lambda values: values * 2)
    assert doubled(values=torch.ones(3, device=DEVICE)).tolist() == [2.0] * 3 and counter.frame_count == 1
    assert compiling.fused(lambda: 5)() == 5


def test_where_compiling_fails_one_line_says_so_and_the_functions_go_on(monkeypatch, capsys):
    calls = []

    def no_compiler(graph, inputs):
        calls.append(graph)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(compiling, "BACKEND", no_compiler)
    monkeypatch.setattr(compiling, "DEVICES", ("cpu",))
    torch._dynamo.reset()
    halved = compiling.fused(lambda values, factor: values * factor)
    doubled = compiling.fused(lambda values: values * 2)
    for _ in range(2):
        assert halved(torch.ones(3), 0.5).tolist() == [0.5] * 3 and doubled(torch.ones(3)).tolist() == [2.0] * 3
    said = capsys.readouterr().err
    assert len(calls) == 1 and said.count("\n") == 1 and "no C compiler" in said
    compiling.forget_failures()


def test_what_the_function_itself_raises_is_no_failure_to_compile(counter):
    with pytest.raises(ZeroDivisionError):
        compiling.fused(lambda values: values / (1 // 0))(torch.ones(3, device=DEVICE))
