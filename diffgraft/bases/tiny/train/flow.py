"""``python -m diffgraft.bases.tiny.train.flow`` trains the denoiser of ``tiny-flow``, a transformer with flow matching.

Autoencoder, text encoder and tokenizer are those of ``tiny``, and so are the pictures and captions.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffgraft.bases.loading import TINY, TINY_FLOW
from diffgraft.bases.tiny.train.fit import StagePlan, autocast, fingerprint, train_stage
from diffgraft.bases.tiny.train.pool import draw_pool
from diffgraft.bases.tiny.train.samples import END, LENGTH
from diffgraft.bases.tiny.train.text import WIDTH
from diffgraft.bases.tiny.train.unet import caption_batch
from diffgraft.bases.tiny.train.work_folder import positive, prepare, training_parser, with_sentences
from diffgraft.files import atomic_folder

PLAN = StagePlan(steps=12_000, batch=128, lr=2e-3, decay=0.4, average=0.9995, muon=True)
POOL = 160_000
"""Number of pictures of the broad world"""


def new_transformer() -> AuraFlowTransformer2DModel:
    """Create the untrained denoiser: 64 tokens of 2 × 2 latents; each block begins as the identity."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        caption_projection_dim=192,
        pos_embed_max_size=64,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith(("norm1.linear.weight", "norm1_context.linear.weight", "proj_out.weight")):
                weight.zero_()
    return transformer


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Create the scheduler of the base; its shift is 1, as pictures are small."""
    return FlowMatchEulerDiscreteScheduler()


@dataclass(frozen=True)
class FlowStage:
    """Training of the denoiser on latents and captions: timesteps are logit-normal (Esser et al. 2024, section 3.1)."""

    z: Tensor
    """Latents [n, 4, 16, 16], scaled to a standard deviation of 1"""
    ids: Tensor
    """Caption token ids [n, wordings, `LENGTH`]"""
    text_encoder: CLIPTextModel
    """Text encoder of ``tiny``; it stays frozen"""
    inputs: str = ""
    name: str = "flow"

    def new_model(self) -> AuraFlowTransformer2DModel:
        """Create the untrained denoiser."""
        torch.manual_seed(6)
        return new_transformer()

    def loss(self, model: nn.Module, count: int, seed: tuple[int, int]) -> Tensor:
        """Return the mean loss of `count` pictures; `seed` (step, process) decides pictures, noise and timesteps."""
        rng = np.random.default_rng([6, *seed])
        rows = rng.integers(0, len(self.z), count)
        batch, x = caption_batch(self.ids, rng, rows).long(), self.z[rows].float()
        sigma = torch.from_numpy(rng.standard_normal(count, np.float32)).sigmoid()
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        with autocast():
            with torch.no_grad():
                states = self.text_encoder(input_ids=batch).last_hidden_state * told(batch).unsqueeze(-1)
            prediction = model(noisy, states, sigma, return_dict=False)[0]
        total: Tensor = (prediction.float() - (noise - x)).square().mean()
        return total


def told(ids: Tensor) -> Tensor:
    """Return the mask of token ids [n, `LENGTH`]: True up to the first end token, as padding is that token as well."""
    ends = ids == END
    return ends.cumsum(-1) - ends.int() == 0


@with_sentences
def main(arguments: Sequence[str] | None = None) -> None:
    """Train the denoiser, unless the work folder has the finished one, and write it to the output folder."""
    parser = training_parser("diffgraft.bases.tiny.train.flow", __doc__, "runs/tiny", TINY_FLOW)
    parser.add_argument("--steps", type=positive, default=PLAN.steps, help="number of training steps")
    parser.add_argument("--pool", type=positive, default=POOL, help="number of pictures to train on")
    parser.add_argument(
        "--processes", type=positive, default=1, help="processes that draw pictures and share each step"
    )
    options = parser.parse_args(arguments)
    plan, count = replace(PLAN, steps=options.steps), options.pool
    if options.dry_run:
        plan, count = replace(plan, steps=2, batch=4), 20
    work, output = prepare(options, TINY_FLOW)
    torch.set_num_threads(1)
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    text_encoder = CLIPTextModel.from_pretrained(TINY / "text_encoder").float().eval()
    z, ids = draw_pool(work, vae, CLIPTokenizer.from_pretrained(TINY / "tokenizer"), count, options.processes)
    assert ids.shape[-1] == LENGTH
    inputs = f"{count} pictures, VAE {fingerprint(vae)}, text encoder {fingerprint(text_encoder)}"
    stage = FlowStage((z * vae.config.scaling_factor).half(), ids, text_encoder, inputs)
    transformer = train_stage(stage, plan, work, options.processes)
    with atomic_folder(output) as partial:
        if output.exists():
            shutil.copytree(output, partial, dirs_exist_ok=True)
        for name, part in (("transformer", transformer.half()), ("scheduler", new_scheduler())):
            shutil.rmtree(partial / name, ignore_errors=True)
            part.save_pretrained(partial / name)  # type: ignore[operator]
    print(json.dumps({"written to": str(output)}))


if __name__ == "__main__":
    main()
