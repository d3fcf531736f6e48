"""LoRA: the formula, peft's layers and the merged weight agree."""

import numpy as np
import pytest
import torch
from torch import nn

from diffgraft.adapters.lora import AttachedLora, LoraDelta, build, lora_delta
from diffgraft.adapters.method import find_modules, get_method, methods
from diffgraft.errors import DiffgraftError


class Net(nn.Module):
    """A linear layer, and convolutions of 1 × 1, of 3 × 3, and strided; no two widths are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = nn.Conv2d(3, 5, 3, padding=1)
        self.narrow = nn.Conv2d(5, 7, 1, bias=False)
        self.strided = nn.Conv2d(7, 6, 3, stride=2)
        self.out = nn.Linear(6, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.strided(self.narrow(self.wide(x))).mean((2, 3)))
        return y


PATHS = ["wide", "narrow", "strided", "out"]


def attached_net(rank: int = 2, alpha: float = 3.0) -> tuple[Net, AttachedLora]:
    net = Net()
    live = AttachedLora(net, PATHS, rank=rank, alpha=alpha, seed=7)
    with torch.no_grad():
        for value in live.parameters().values():
            value.copy_(torch.randn(value.shape) * 0.3)
    return net, live


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2)])
def test_delta_is_the_formula_in_float64(kernel: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(3, 5, *kernel)), rng.normal(size=(7, 3, *(1 for _ in kernel)))
    wanted = np.einsum("or,ri...->oi...", up.reshape(7, 3), down) * (4.5 / 3)
    delta = build({"lora_down": torch.tensor(down).float(), "lora_up": torch.tensor(up).float()}, 4.5)
    assert isinstance(delta, LoraDelta)
    assert delta.fits((7, 5, *kernel))
    assert not delta.fits((5, 7, *kernel))
    np.testing.assert_allclose(delta.delta().numpy(), wanted, rtol=1e-5, atol=1e-6)
    exact = lora_delta(torch.tensor(down), torch.tensor(up), 1.5).numpy()
    np.testing.assert_allclose(exact, wanted, rtol=1e-12)


def test_rank_of_the_delta_is_the_rank() -> None:
    delta = build({"lora_down": torch.randn(3, 13), "lora_up": torch.randn(9, 3)}, None)
    assert isinstance(delta, LoraDelta)
    assert int(torch.linalg.matrix_rank(delta.delta())) == 3


def test_attached_equals_merged() -> None:
    net, live = attached_net()
    x = torch.randn(4, 3, 9, 8)
    with torch.no_grad():
        wanted = net(x)
        deltas = live.deltas()
        live.detach()
        bare = net(x)
        for path, delta in deltas.items():
            layer = net.get_submodule(path)
            weight, bias = delta.apply(layer.weight, layer.bias, 1.0)  # type: ignore[arg-type]
            layer.weight.copy_(weight)  # type: ignore[operator]
            assert bias is layer.bias
        merged = net(x)
    assert (bare - wanted).abs().max() > 0.1
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


def test_fresh_lora_changes_nothing_and_detaching_restores_the_module() -> None:
    net = Net()
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    x = torch.randn(2, 3, 9, 8)
    bare = net(x)
    live = AttachedLora(net, PATHS, rank=2, alpha=2.0, seed=0)
    torch.testing.assert_close(net(x), bare, rtol=0, atol=0)
    live.detach()
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (kept, copy) in before.items():
        assert after[name] is kept
        assert torch.equal(kept, copy)
    assert not hasattr(net, "peft_config")


def test_only_the_adapter_gets_gradients() -> None:
    net, live = attached_net()
    net(torch.randn(2, 3, 9, 8)).square().sum().backward()
    ours = {id(value) for value in live.parameters().values()}
    with_gradient = {id(value) for value in net.parameters() if value.grad is not None}
    assert with_gradient == ours
    assert len(ours) == 2 * len(PATHS)


def test_the_seed_decides_the_initial_weights_and_leaves_the_global_generator_alone() -> None:
    def initial(seed: int) -> dict[str, torch.Tensor]:
        live = AttachedLora(Net(), PATHS, rank=2, alpha=2.0, seed=seed)
        return {name: value.detach() for name, value in live.parameters().items()}

    first, again, other = initial(5), initial(5), initial(6)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == name.endswith("lora_up")  # which starts at zero
    net = Net()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    AttachedLora(net, PATHS, rank=2, alpha=2.0, seed=5)
    assert torch.equal(torch.rand(3), wanted)


def test_the_adapter_is_float32_beside_a_base_of_half_precision() -> None:
    live = AttachedLora(Net().bfloat16(), PATHS, rank=2, alpha=2.0, seed=5)
    assert {value.dtype for value in live.parameters().values()} == {torch.float32}


def test_factors_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 3, lora_up has rank 4"):
        build({"lora_down": torch.zeros(3, 5), "lora_up": torch.zeros(7, 4)}, None)


def test_an_upward_factor_with_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel can only be of size one"):
        build({"lora_down": torch.zeros(2, 5, 3, 3), "lora_up": torch.zeros(7, 2, 3, 3)}, None)


def test_the_registry_finds_methods_by_their_files() -> None:
    assert "lora" in methods()
    assert get_method("lora").attach is AttachedLora
    with pytest.raises(DiffgraftError, match="did you mean 'lora'"):
        get_method("lorra")


def test_modules_are_found_by_whole_names() -> None:
    net = nn.ModuleDict({"to_q": nn.Linear(2, 3), "auto_q": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
    assert find_modules(net, ("to_q", "norm")) == ["to_q"]
