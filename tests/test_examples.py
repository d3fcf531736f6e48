"""The examples run as they stand, and do what they say."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base
from diffgraft.data.image_folder import read_folder
from diffgraft.data.latents import Latents, encode
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.generation.graft import graft
from diffgraft.generation.settings import DrawSettings
from examples import minimal
from tests.drawing import generate


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> minimal.Result:
    """A short run of the minimal example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffgraft.generation.session.DrawSettings", partial(DrawSettings, steps=5))
        return minimal.main(steps=16, folder=tmp_path_factory.mktemp("minimal"))


@pytest.fixture(scope="module")
def latents(base: Base, pictures: Path) -> Latents:
    """The pictures of the example as latents."""
    return encode(base, [picture.image for picture in read_folder(pictures)], base.resolution)


def test_minimal_lora_lowers_the_loss_and_its_file_computes_the_same(
    base: Base, latents: Latents, result: minimal.Result
) -> None:
    process = ForwardProcess(base.parameterization)
    assert minimal.fixed_loss(base, process, latents) == pytest.approx(result.before, rel=1e-5)
    assert result.after < 0.9 * result.before
    with graft(base, {result.adapter: 1.0}):
        assert minimal.fixed_loss(base, process, latents) == pytest.approx(result.after, rel=1e-4)


def test_minimal_file_holds_the_merged_difference_in_keys_of_kohya(base: Base, result: minimal.Result) -> None:
    adapter, file = load_adapter(result.adapter), load_file(result.adapter)
    assert adapter.method == "lora"
    assert len(adapter.modules) == sum(key.endswith("lora_up.weight") for key in file) > 0
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    key = "lora_" + path.replace(".", "_")
    layer = base.unet.get_submodule(path.removeprefix("unet."))
    bare = layer.weight.detach().double().numpy()
    leaves = ("lora_up.weight", "lora_down.weight", "alpha")
    up, down, alpha = (file[f"{key}.{leaf}"].astype(np.float64) for leaf in leaves)
    assert np.abs(up @ down).max() > 0
    with graft(base, {result.adapter: 0.5}):
        merged = layer.weight.detach().double().numpy()
    np.testing.assert_allclose(merged, bare + 0.5 * alpha / down.shape[0] * up @ down, atol=1e-6)
    np.testing.assert_array_equal(layer.weight.detach().double().numpy(), bare)


def test_minimal_draws_another_picture_than_the_bare_base(base: Base, result: minimal.Result) -> None:
    prompts, settings = [f"{minimal.PROMPT} in the snow"], DrawSettings(steps=5)
    (bare,) = generate(base, prompts, settings, seeds=[7])
    with graft(base, {result.adapter: 1.0}):
        (grafted,) = generate(base, prompts, settings, seeds=[7])
    with Image.open(result.picture) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(grafted))
    difference = torch.from_numpy(np.asarray(bare, dtype=np.float32) - np.asarray(grafted, dtype=np.float32)).abs()
    assert difference.mean() > 2
