"""Families of flow-matching transformers, held to diffusers' pipelines and to what its training scripts compute."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from peft import LoraConfig
from torch import Tensor, nn

import diffgraft as dg
from diffgraft.adapters.rank_schedule import TimestepReader
from diffgraft.bases import Base
from diffgraft.bases.flow import packed, unpacked
from diffgraft.bases.layers import LAYERS, choose_layers
from diffgraft.bases.registry import part_names
from diffgraft.errors import DiffgraftError
from diffgraft.generation.samplers.noise import noise_stream, start_noise
from diffgraft.pixels import to_image
from diffgraft.rng import normal
from tests.conftest import flow_folder_of
from tests.flow_bases import flow_pipeline
from tests.recipes import SUBJECT

SIZE = (64, 32)
"""(width, height) in pixels"""


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A small random base of one family, for rules that all of them share."""
    return dg.load_base(flow_folder_of("flux2-klein", tmp_path_factory))


def latent_shape(base: Base) -> tuple[int, int, int]:
    width, height = SIZE
    return base.latents.channels, height // base.vae_scale_factor, width // base.vae_scale_factor


def test_a_folder_is_loaded_as_diffusers_wrote_it(flow_base: Base) -> None:
    pipe = flow_pipeline(flow_base.family.name)
    for name, part in flow_base.parts():
        theirs = getattr(pipe, name).state_dict()
        assert {key: tuple(value.shape) for key, value in part.state_dict().items()} == {
            key: tuple(value.shape) for key, value in theirs.items()
        }
        for key, value in part.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name}.{key}"
        buffers = dict(getattr(pipe, name).named_buffers())
        assert all(torch.equal(value, buffers[key]) for key, value in part.named_buffers())
    assert flow_base.prediction_type == "flow"
    assert f"family {flow_base.family.name}" in repr(flow_base)


PIPELINE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sd3": {"guidance_scale": 3.0},
    "flux1": {"guidance_scale": 2.5},
    "flux2-klein": {"guidance_scale": 3.0, "text_encoder_out_layers": (1, 2, 3)},
    "zimage": {"guidance_scale": 2.0},  # this pipeline counts from 0
    "qwen-image": {"true_cfg_scale": 8.0},
    "krea2": {"guidance_scale": 2.0},  # and so does this one
    "auraflow": {"guidance_scale": 3.0},
    "qwen-image-21": {"true_cfg_scale": 3.0},
    "anima": {"output": "images"},  # its guidance is a part of the pipeline
}
GUIDANCE = {"flux1": 1.0, "qwen-image": 8.0}


@pytest.fixture
def loud_base(flow_base: Base) -> Iterator[Base]:
    """A base whose prompts matter, so that the guidance of Qwen-Image is far from its prediction without it."""
    values = [value for name, value in flow_base.denoiser.named_parameters() if name.endswith("add_v_proj.weight")]
    for value in values if flow_base.family.name == "qwen-image" else ():
        value.mul_(32)
    yield flow_base
    for value in values if flow_base.family.name == "qwen-image" else ():
        value.div_(32)


def test_pictures_are_those_of_the_pipeline(loud_base: Base) -> None:
    """From the same noise, by Euler's method on the family's own noise levels, with guidance."""
    name, pipe = loud_base.family.name, loud_base.pipeline()
    if name == "krea2":
        vars(pipe)["text_encoder_select_layers"] = (1, 3, 5)
    noise = start_noise([noise_stream("cpu", 7)], latent_shape(loud_base), None, 0.0)
    given = packed(noise) if name in ("flux1", "qwen-image", "krea2") else noise
    settings = dict(PIPELINE_SETTINGS[name])
    if name not in ("flux1", "flux2-klein"):
        settings["negative_prompt"] = "a dog"
    if name == "qwen-image-21":
        given = noise.flatten(2).transpose(1, 2)
    if name == "anima":
        given = noise.unsqueeze(2)
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    found = pipe(
        prompt="a cat",
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=4,
        latents=given,
        output_type="pt",
        **settings,
    )
    (theirs,) = found if name == "anima" else found.images
    negative = str(settings.get("negative_prompt", ""))
    drawn = dg.DrawSettings(size=SIZE, steps=4, guidance=GUIDANCE.get(name, 3.0), negative=negative)
    if name == "flux1":
        drawn = replace(drawn, embedded_guidance=2.5)
    with dg.Session(loud_base) as session:
        (ours,) = session.draw("a cat", seeds=[7], settings=drawn)
    theirs_image = to_image(2 * theirs[:3] - 1)  # that of Qwen-Image 2.1 has an alpha channel
    differences = [abs(one - other) for one, other in zip(ours.tobytes(), theirs_image.tobytes(), strict=True)]
    assert max(differences) <= 1
    assert len(set(ours.tobytes())) > 20


def script_prediction(base: Base, noisy: Tensor, sigma: Tensor, texts: Any) -> Tensor:
    """A prediction as diffusers' DreamBooth script for the family makes it, from σ [n]."""
    model, (n, channels, height, width) = base.denoiser, noisy.shape
    times = 1000 * sigma
    name = base.family.name
    found: Tensor
    if name == "sd3":
        states, pooled = texts
        found = model(noisy, states, pooled, times, return_dict=False)[0]
    elif name == "auraflow":
        found = model(noisy, texts, times / 1000, return_dict=False)[0]
    elif name == "anima":  # as sd-scripts calls it
        mask = torch.zeros(1, 1, 8 * height, 8 * width)
        found = model(noisy.unsqueeze(2), times / 1000, texts, padding_mask=mask, return_dict=False)[0].squeeze(2)
    elif name == "flux1":
        states, pooled = texts
        tokens = model(
            hidden_states=FluxPipeline._pack_latents(noisy, n, channels, height, width),
            timestep=times / 1000,
            guidance=torch.full((n,), 1.0),
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        factor = base.vae_scale_factor
        found = FluxPipeline._unpack_latents(tokens, height * factor, width * factor, factor)
    elif name == "flux2-klein":
        ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
        tokens = model(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=times / 1000,
            encoder_hidden_states=texts,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(texts),
            img_ids=ids,
            return_dict=False,
        )[0]
        found = Flux2KleinPipeline._unpack_latents_with_ids(tokens, ids, height, width)  # type: ignore[assignment]
    elif name == "zimage":
        rows = model(list(noisy.unsqueeze(2)), (1000 - times) / 1000, texts, return_dict=False)[0]
        found = -torch.stack(rows).squeeze(2)
    elif name == "qwen-image-21":
        found = torch.cat([qwen_21_prediction(base, *row) for row in zip(noisy, times / 1000, texts, strict=True)])
    elif name == "krea2":
        states, mask = texts
        pipe = base.pipeline()
        tokens = model(
            hidden_states=pipe._pack_latents(noisy, n, channels, height, width),
            encoder_hidden_states=states,
            timestep=times / 1000,
            position_ids=pipe.prepare_position_ids(states.shape[1], height // 2, width // 2, "cpu"),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        factor = base.vae_scale_factor
        found = pipe._unpack_latents(tokens, height * factor, width * factor)[:, :, 0]
    else:
        states, mask = texts
        tokens = model(
            hidden_states=QwenImagePipeline._pack_latents(noisy, n, channels, height, width),
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            timestep=times / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        factor = base.vae_scale_factor
        found = QwenImagePipeline._unpack_latents(tokens, height * factor, width * factor, factor)[:, :, 0]
    return found


def qwen_21_prediction(base: Base, noisy: Tensor, sigma: Tensor, texts: tuple[Tensor, None, Tensor]) -> Tensor:
    """One row of the prediction, as its pipeline makes it: this model has no script."""
    pipe, model = base.pipeline(), base.denoiser
    channels, height, width = noisy.shape
    states, mask, image_mask = texts
    tokens = model(
        hidden_states=pipe._pack_latents(noisy.unsqueeze(0), 1, channels, height, width),
        encoder_hidden_states=states,
        encoder_hidden_states_mask=mask,
        timestep=sigma.view(1),
        img_shapes=[[(1, height, width)]],
        img_mask=torch.cat([image_mask, image_mask.new_ones(1, height * width // 4)], 1),
        return_dict=False,
    )[0][:, -height * width :]
    found: Tensor = pipe._unpack_latents(tokens, 16 * height, 16 * width, 16)[:, :, 0]
    return found


def script_texts(base: Base, prompts: list[str]) -> Any:
    """Text states as the scripts get them, from the pipelines."""
    pipe, name = base.pipeline(), base.family.name
    if name == "sd3":
        states, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        return states, pooled
    if name == "flux1":
        states, pooled, _ = pipe.encode_prompt(prompts, None)
        return states, pooled
    if name == "flux2-klein":
        return pipe.encode_prompt(prompts, text_encoder_out_layers=(1, 2, 3))[0]
    if name in ("zimage", "auraflow"):
        return pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
    if name == "krea2":
        vars(pipe)["text_encoder_select_layers"] = (1, 3, 5)
    if name == "qwen-image-21":
        return [pipe.encode_prompt(prompt) for prompt in prompts]
    if name == "anima":  # one prompt at a time, as then the tokenizer's side for padding makes no difference
        told = [anima_states(pipe, prompt) for prompt in prompts]
        return torch.cat(told)
    return pipe.encode_prompt(prompts)


def anima_states(pipe: Any, prompt: str) -> Tensor:
    """What the first two steps of the modular pipeline make of a prompt."""
    own = AnimaTextEncoderStep.encode_prompt(pipe, prompt, prepare_unconditional_embeds=False)
    states: Tensor = pipe.text_conditioner(
        own["qwen_prompt_embeds"], own["t5_input_ids"], own["t5_attention_mask"], own["qwen_attention_mask"]
    )
    return states


def test_losses_and_first_gradients_are_those_of_the_scripts(flow_base: Base) -> None:
    """Two pictures at unequal noise, told by prompts of unequal length, with a LoRA of peft's on the attention."""
    prompts = ["a cat", "a large dog in the snow"]
    model, timesteps = flow_base.denoiser, torch.tensor([120, 840])
    shift = flow_base.scheduler.config.shift
    even = (timesteps + 1).double() / 1000
    is_even = flow_base.scheduler.config.use_dynamic_shifting or flow_base.family.name == "anima"
    sigma = even if is_even else shift * even / (1 + (shift - 1) * even)
    model.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    try:
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.copy_(normal(value.shape, len(key)) * 0.1)
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert trained
        latents, noise = (normal((2, *latent_shape(flow_base)), seed) for seed in (3, 4))
        with torch.no_grad():
            told, theirs = flow_base.condition(prompts), script_texts(flow_base, prompts)

        def loss(predict: Callable[[Tensor], Tensor], mixed: Tensor, target: Tensor) -> tuple[float, dict[str, Tensor]]:
            value = (predict(mixed) - target).square().mean()
            gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            found = zip(trained, gradients, strict=True)
            return float(value.detach()), {key: own for key, own in found if own is not None}

        flow = flow_base.parameterization
        ours = loss(
            lambda mixed: flow_base.denoise(mixed, timesteps, told),
            flow.noised(latents, noise, timesteps),
            flow.target(latents, noise, timesteps),
        )
        level = sigma.float().view(-1, 1, 1, 1)
        script = loss(
            lambda mixed: script_prediction(flow_base, mixed, sigma.float(), theirs),
            (1 - level) * latents + level * noise,
            noise - latents,
        )
    finally:
        model.unload_lora()
        model.requires_grad_(False)
    assert ours[0] == pytest.approx(script[0], rel=1e-5)
    assert ours[1].keys() == script[1].keys()
    for key, gradient in script[1].items():
        torch.testing.assert_close(ours[1][key], gradient, rtol=1e-4, atol=3e-5 * float(gradient.abs().max()) + 1e-9)


def test_latents_are_scaled_as_the_pipeline_scales_them_back(flow_base: Base) -> None:
    pixels = normal((1, 3, SIZE[1], SIZE[0]), 5).clamp(-1, 1)
    with torch.no_grad():
        mean, std = flow_base.family.posterior(flow_base, pixels)
        decoded = flow_base.family.decode(flow_base, mean)
        if flow_base.family.name in ("qwen-image", "krea2", "anima", "qwen-image-21"):
            is_opaque = flow_base.family.name == "qwen-image-21"
            given = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1) if is_opaque else pixels
            raw = flow_base.vae.encode(given.unsqueeze(2)).latent_dist.mode()
            wanted = flow_base.vae.decode(raw).sample[:, :3, 0]
        else:
            wanted = flow_base.vae.decode(flow_base.vae.encode(pixels).latent_dist.mode()).sample
    assert mean.shape == std.shape == (1, *latent_shape(flow_base))
    assert (std > 0).all()
    torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)


def test_tokens_of_latents_and_back() -> None:
    latents = normal((2, 3, 6, 8), 1)
    theirs = FluxPipeline._pack_latents(latents, 2, 3, 6, 8)
    assert torch.equal(packed(latents), theirs)
    assert torch.equal(unpacked(theirs, 6, 8), latents)


def test_layers_are_named_by_kind(flow_base: Base) -> None:
    """No layer is of two kinds, and `all` is every linear layer of the blocks."""
    chosen = {kind: set(choose_layers("transformer", flow_base.denoiser, kind)) for kind in LAYERS}
    assert chosen["context"] == set()
    assert chosen["attention"] < chosen["attention+feedforward"] < chosen["all"]
    blocks = {
        path
        for path, layer in flow_base.denoiser.named_modules()
        if isinstance(layer, nn.Linear) and ("blocks." in path or "layers." in path or "refiner." in path)
    }
    assert all("mod" in path for path in chosen["all"] - blocks)
    assert blocks <= chosen["all"]


def test_networks_before_the_denoiser_are_frozen_and_have_no_layers_for_adapters(flow_base: Base) -> None:
    """They are among the networks that prompts pass through, and not among those that `text_encoder=true` trains."""
    names = {slot.component for slot in flow_base.family.conditioners}
    assert names == flow_base.prompt_networks().keys() - flow_base.text_encoders().keys()
    assert names.isdisjoint(part_names())
    for name in names:
        network = flow_base.prompt_networks()[name]
        assert not network.training
        assert not any(value.requires_grad for value in network.parameters())
        assert not any(choose_layers(name, network, kind, flow_base.family) for kind in LAYERS)


def test_layers_that_cannot_matter_are_known(flow_base: Base) -> None:
    """By gradients: those of the last block that only change the text, which is not used after it."""
    layers = choose_layers("transformer", flow_base.denoiser, "all")
    weights = {path: flow_base.denoiser.get_submodule(path).weight for path in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        noisy = normal((2, *latent_shape(flow_base)), 1)
        out = flow_base.denoise(noisy, torch.tensor([100, 900]), flow_base.condition(["a cat", "a dog"]))
        gradients = torch.autograd.grad(out.square().mean(), list(weights.values()), allow_unused=True)
    finally:
        flow_base.denoiser.requires_grad_(False)
    moved = {path for path, own in zip(weights, gradients, strict=True) if own is not None and own.abs().max() > 0}
    known = {path for path in layers if flow_base.family.affects_output(flow_base, "transformer", path)}
    assert moved == known


def test_timesteps_are_read_from_a_call_of_the_denoiser(flow_base: Base) -> None:
    """By a T-LoRA, whose ranks depend on them: 1000 · σ, whatever the denoiser takes for it."""
    reader = TimestepReader(flow_base.denoiser)
    timesteps = torch.tensor([99, 899])
    with torch.no_grad():
        noisy = normal((2, *latent_shape(flow_base)), 1)
        flow_base.denoise(noisy, timesteps, flow_base.condition(["a cat", "a dog"]))
    reader.remove()
    assert reader.timesteps is not None
    torch.testing.assert_close(reader.timesteps, 1000 * flow_base.parameterization.sigmas[timesteps])


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"loss": {"snr_gamma": 5}}, "min-SNR weighting is undefined for flow matching"),
        ({"loss": {"debiased": True}}, "debiased estimation is undefined for flow matching"),
        ({"noise": {"offset": 0.1}}, "pure noise is part of its schedule"),
        ({"noise": {"pyramid": 0.5}}, "noise of unit variance"),
        ({"zero_snr": True}, "zero_snr=True"),
        ({"prediction_type": "epsilon"}, "prediction_type=epsilon"),
        ({"channels_last": True}, "no convolutions"),
        ({"attention": "sliced"}, "attention=sliced has no meaning"),
        ({"method": "hypernetwork"}, "cross-attention"),
        ({"lr_scale": {"OUT00": 0.5}}, "lr_scale.OUT00"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused_by_name(
    setting: dict[str, Any], why: str, klein: Base, pictures: Path, tmp_path: Path
) -> None:
    settings = {"subject": "dog", "resolution": 32, "steps": 1, "previews": False, **setting}
    with pytest.raises(DiffgraftError, match=why):
        dg.train(SUBJECT, base=klein, images=pictures, output=tmp_path / "run", **settings)
