"""A layer used many times in a pass has the gradients that autograd's own sum has."""

import copy

import torch
from torch import Tensor, nn

from diffgraft.adapters.shared import DeferredGradLinear


def layers() -> tuple[DeferredGradLinear, nn.Linear]:
    torch.manual_seed(2)
    shared, plain = DeferredGradLinear(6, 10).double(), nn.Linear(6, 10).double()
    plain.load_state_dict(shared.state_dict())
    return shared, plain


def inputs() -> list[Tensor]:
    return [torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True) for shape in ((4,), (2, 3), (5,))]


def loss(layer: nn.Linear, given: list[Tensor]) -> Tensor:
    """Each use leans on the one before."""
    total = torch.zeros((), dtype=torch.float64)
    for x in given:
        total = total + layer(x + 0.1 * total).tanh().square().sum()
    return total


def test_gradients_are_those_of_a_plain_layer() -> None:
    shared, plain = layers()
    given = inputs()
    for _ in range(2):  # gradients of two passes add up
        shared.begin_pass()
        found = torch.autograd.grad(loss(shared, given), [shared.weight, shared.bias, *given])
        wanted = torch.autograd.grad(loss(plain, given), [plain.weight, plain.bias, *given])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_two_passes_before_one_step_back() -> None:
    shared, plain = layers()
    given = inputs()
    shared.begin_pass()
    first = loss(shared, given)
    shared.begin_pass()
    (first + 2 * loss(shared, given[:1])).backward()  # type: ignore[no-untyped-call]
    (loss(plain, given) + 2 * loss(plain, given[:1])).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(shared.weight.grad, plain.weight.grad)
    torch.testing.assert_close(shared.bias.grad, plain.bias.grad)


def test_a_pass_without_uses_and_a_use_without_a_pass() -> None:
    shared, plain = layers()
    given = inputs()
    torch.testing.assert_close(
        torch.autograd.grad(loss(shared, given), shared.weight), torch.autograd.grad(loss(plain, given), plain.weight)
    )
    shared.begin_pass()
    assert torch.autograd.grad(shared.bias.sum(), shared.weight, allow_unused=True) == (None,)
    with torch.no_grad():
        torch.testing.assert_close(shared(given[0]), plain(given[0]))
    shared.requires_grad_(False)
    shared.begin_pass()
    torch.testing.assert_close(shared(given[0]), plain(given[0]))


def test_a_way_back_that_asks_for_something_else_leaves_nothing_behind() -> None:
    shared, plain = layers()
    given = inputs()
    shared.begin_pass()
    total = loss(shared, given)
    torch.autograd.grad(total, given[0], retain_graph=True)
    (found,) = torch.autograd.grad(total, shared.weight)
    torch.testing.assert_close(found, torch.autograd.grad(loss(plain, given), plain.weight)[0])


def test_a_copy_can_be_made_within_a_pass() -> None:
    shared, plain = layers()
    given = inputs()
    shared.begin_pass()
    loss(shared, given)
    copied = copy.deepcopy(shared)
    copied.begin_pass()
    (found,) = torch.autograd.grad(loss(copied, given), copied.weight)
    torch.testing.assert_close(found, torch.autograd.grad(loss(plain, given), plain.weight)[0])


def test_in_half_precision_under_autocast() -> None:
    shared, plain = (layer.float() for layer in layers())
    xs = [torch.randn(4, 6), torch.randn(7, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        shared.begin_pass()
        found, wanted = ([layer(x) for x in xs] for layer in (shared, plain))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(one, other)
    for outs, layer in ((found, shared), (wanted, plain)):
        sum((out.float().square().sum() for out in outs), torch.zeros(())).backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(shared.weight.grad, plain.weight.grad, rtol=2e-2, atol=2e-2)
