"""``python -m diffgraft.predictor.train`` trains the predictor of `tiny` from scratch; it resumes where it stopped.

In each step it looks at one to five pictures of each of some subjects, and the denoiser, with the LoRA of each, is held
to other pictures of them. Prompts without the rare word must give what the base alone predicts, so that the
class keeps its looks (the prior preservation by prediction of `diffgraft.trainers.objectives.prior_prediction`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.tiny.train.fit import StagePlan, autocast, train_stage
from diffgraft.bases.tiny.train.pictures import to_tensor
from diffgraft.bases.tiny.train.samples import pad_ids
from diffgraft.bases.tiny.train.unet import timesteps
from diffgraft.bases.tiny.train.work_folder import positive, prepare, training_parser, with_sentences
from diffgraft.predictor.files import SHIPPED, write_predictor
from diffgraft.predictor.network import WeightPredictor
from diffgraft.predictor.subjects import VIEWS, Subjects, draw_subjects

PLAN = StagePlan(steps=8000, batch=8, lr=1e-3, decay=0.5, average=0.999, warmup=200)
"""The batch is the number of subjects."""
COUNT = 6144
"""Number of subjects"""
TARGETS = 3
"""Pictures of each subject that are predicted in a step"""
MOST_SHOWN = VIEWS - TARGETS
"""Pictures of a subject that the predictor looks at in a step, at most"""
PRIOR = 1.0
"""Weight of the term for prompts without the rare word"""


@dataclass(frozen=True)
class PredictorStage:
    """Training stage of the predictor: its model and its loss."""

    base: Base = field(repr=False)
    subjects: Subjects = field(repr=False)
    name: str = "predictor"

    @property
    def inputs(self) -> str:
        """The base, and the number of subjects."""
        return f"{self.base.hash}, {len(self.subjects.latents)} subjects"

    def new_model(self) -> WeightPredictor:
        """Create the untrained predictor, for all layers of the base's denoiser."""
        torch.manual_seed(7)
        unet = self.base.denoiser
        unet.set_attn_processor(AttnProcessor())  # on CPUs, the fused kernel's backward pass takes three times as long
        paths = choose_layers(self.base.family.denoiser, unet, "all", self.base.family)
        return WeightPredictor({path: tuple(unet.get_submodule(path).weight.shape) for path in paths})

    def loss(self, model: nn.Module, count: int, seed: tuple[int, int]) -> Tensor:
        """Return the mean loss of `count` subjects; `seed` (step, process) decides all that is random."""
        assert isinstance(model, WeightPredictor)
        rng = np.random.default_rng([7, *seed])
        held, rows = self.subjects, rng.integers(0, len(self.subjects.latents), count)
        order = rng.permuted(np.tile(np.arange(VIEWS), (count, 1)), axis=1)
        shown, targets = order[:, : rng.integers(1, MOST_SHOWN + 1)], order[:, -TARGETS:]
        pictures = held.pictures[rows[:, None], shown]
        views = to_tensor(pictures.flatten(0, 1).numpy())

        scale = self.base.latents.scale
        x = held.latents[rows[:, None], targets].flatten(0, 1).float() * scale
        mask = held.masks[rows[:, None], targets].flatten(0, 1).unsqueeze(1).float() / 255
        ids, plain = held.ids[rows[:, None], targets].flatten(0, 1), held.class_ids[rows, targets[:, 0]]
        times = torch.from_numpy(timesteps(rng, len(x)))
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        parameterization = self.base.parameterization
        noisy, wanted = parameterization.noised(x, noise, times), parameterization.target(x, noise, times)
        with autocast():
            with torch.no_grad():
                states = self.base.text_encoder(pad_ids(torch.cat([ids, plain]))).last_hidden_state
                first = slice(0, None, TARGETS)
                bare = self._predict(noisy[first], times[first], states[len(x) :])
            cores = model(views.view(*pictures.shape[:2], *views.shape[1:]))
            samples = torch.cat([cores.repeat_interleave(TARGETS, 0), cores])
            with model.acting(self.base.denoiser, samples):
                both = self._predict(torch.cat([noisy, noisy[first]]), torch.cat([times, times[first]]), states)
        weight = 0.4 + 2 * mask
        own = ((both[: len(x)].float() - wanted).square() * weight).mean() / weight.mean()
        prior = (both[len(x) :].float() - bare.float()).square().mean()
        return own + PRIOR * prior

    def _predict(self, noisy: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """Return the denoiser's prediction [n, 4, 16, 16] for text states [n, tokens, width]."""
        prediction: Tensor = self.base.denoiser(noisy, times, states).sample
        return prediction


@with_sentences
def main(arguments: Sequence[str] | None = None) -> None:
    """Train the predictor, unless the work folder has the finished one, and write its file."""
    parser = training_parser("diffgraft.predictor.train", __doc__, "runs/predictor", SHIPPED)
    parser.add_argument("--steps", type=positive, default=PLAN.steps, help="number of training steps")
    parser.add_argument("--subjects", type=positive, default=COUNT, help="number of subjects to train on")
    parser.add_argument(
        "--processes", type=positive, default=1, help="processes that draw pictures and share each step"
    )
    options = parser.parse_args(arguments)
    plan, count = replace(PLAN, steps=options.steps), options.subjects
    if options.dry_run:
        plan, count = replace(plan, steps=2, batch=2), 4
    work, output = prepare(options, SHIPPED, is_folder=False)
    torch.set_num_threads(1)
    base = load_base("tiny")
    subjects = draw_subjects(work, base.vae, base.tokenizer, count, options.processes)
    model = train_stage(PredictorStage(base, subjects), plan, work, options.processes)
    assert isinstance(model, WeightPredictor)
    write_predictor(output, model, base)
    print(json.dumps({"written to": str(output)}))


if __name__ == "__main__":
    main()
