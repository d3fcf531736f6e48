"""Noise of pictures, held to CUDA's numbers and to PyTorch's generator."""

import pytest
import torch

from diffgraft.generation.samplers.noise import BrownianPath, CpuNoise, GpuNoise, NoiseSource, noise_stream, start_noise


def test_the_stream_of_a_gpu_has_the_numbers_of_cuda() -> None:
    """``torch.randn((3, 4), device="cuda")`` with seed 0, as webui's documentation of its own generator has it."""
    wanted = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    found = GpuNoise(0).normal((3, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-7)


def test_streams_go_on_and_seeds_differ() -> None:
    for source in ("cpu", "gpu"):
        stream, again = noise_stream(source, 5), noise_stream(source, 5)
        first, second = stream.normal((2, 300)), stream.normal((2, 300))
        assert torch.equal(first, again.normal((2, 300)))
        assert torch.equal(second, again.normal((2, 300)))
        assert not torch.equal(first, second)
        other = 6 if source == "cpu" else 5 + 2**32  # PyTorch's generator on the CPU reads 32 bits of a seed
        assert not torch.equal(first, noise_stream(source, other).normal((2, 300)))
        values = noise_stream(source, 2**63 - 1).normal((50, 2000))
        assert float(values.mean()) == pytest.approx(0, abs=0.02)
        assert float(values.std()) == pytest.approx(1, abs=0.02)


def test_the_stream_of_the_cpu_is_that_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(CpuNoise(7).normal((4, 5, 6)), torch.randn((4, 5, 6), generator=generator))


def test_variations_turn_from_one_noise_to_another() -> None:
    shape = (4, 6, 5)
    own, other = (start_noise([CpuNoise(seed)], shape) for seed in (1, 2))

    def turned(strength: float) -> torch.Tensor:
        return start_noise([CpuNoise(1)], shape, [CpuNoise(2)], strength)

    assert torch.equal(turned(0), own)
    torch.testing.assert_close(turned(1), other)
    # along the great circle, in steps of a quarter the angle to the start grows evenly
    unit = [value[0] / value[0].norm(dim=1, keepdim=True) for value in (own, other)]
    angle = (unit[0] * unit[1]).sum(1, keepdim=True).double().acos()
    ends = own[0].double(), other[0].double()
    wanted = (torch.sin(0.75 * angle) * ends[0] + torch.sin(0.25 * angle) * ends[1]) / torch.sin(angle)
    torch.testing.assert_close(turned(0.25)[0].double(), wanted, rtol=1e-4, atol=1e-5)
    same = start_noise([CpuNoise(1)], shape, [CpuNoise(1)], 0.5)
    torch.testing.assert_close(same, own)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
@pytest.mark.parametrize("source", ["cpu", "gpu"])
def test_a_brownian_path_is_that_of_k_diffusion(source: NoiseSource) -> None:
    """k-diffusion's rule in its own words: a tree of torchsde for each seed, whose numbers webui replaces."""
    import torchsde
    from torchsde._brownian import brownian_interval

    sigmas, seeds, shape = [14.6, 3.2, 0.7, 0.1, 0.0], [5, 99], (4, 3, 5)
    path = BrownianPath(source, seeds, shape, sigmas)
    steps = [(14.6, 7.0), (14.6, 3.2), (3.2, 0.7), (0.7, 0.1)]
    found = [path(*step) for step in steps]
    numbers = brownian_interval._randn
    if source == "gpu":
        brownian_interval._randn = lambda size, dtype, device, seed: GpuNoise(int(seed)).normal(size)  # noqa: ARG005
    try:
        trees = [
            torchsde.BrownianTree(torch.as_tensor(0.1), torch.zeros(shape), torch.as_tensor(14.6), entropy=seed)
            for seed in seeds
        ]
        for (before, after), own in zip(steps, found, strict=True):
            low, high = torch.as_tensor(after), torch.as_tensor(before)
            wanted = torch.stack([tree(low, high) for tree in trees]) * -1
            assert torch.equal(own, wanted / (high - low).abs().sqrt())
    finally:
        brownian_interval._randn = numbers
    whole = torch.cat([noise.flatten() for noise in found])
    assert abs(float(whole.std()) - 1) < 0.15
    both = found[0] * (14.6 - 7.0) ** 0.5
    assert not torch.equal(both, found[1] * (14.6 - 3.2) ** 0.5)
    assert torch.equal(path(3.2, 0.7), found[2])  # a path, and not a stream
