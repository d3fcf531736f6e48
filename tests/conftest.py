"""What tests share: the embedded base, a short run on it, and small random bases of other shapes."""

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # several at once, each with all cores, wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from filelock import FileLock
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.bases.flow import FlowFamily
from diffgraft.bases.registry import families
from diffgraft.demo.subject import POODLE
from diffgraft.generation.plots import save_image, save_loss_plot
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.hooks.samples import draw_samples, draw_steered
from diffgraft.trainers.planning.prediction_check import prediction_warning
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT

FLOW_FAMILIES = [name for name, family in families().items() if isinstance(family, FlowFamily)]


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than processors, as some tests wait for disks and other processes."""
    return (os.cpu_count() or 1) + 1


# a job in the background ignores Ctrl-C, and so does what it starts: here it is meant
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_denoising_steps() -> Iterator[None]:
    """What runs draw before, on the way and in the end would take longer than the short trainings here."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("hooks.samples", "training_data.build"):
            patch.setattr(f"diffgraft.trainers.{place}.DrawSettings", partial(DrawSettings, steps=2))
        for draw in (draw_samples, draw_steered):
            patch.setattr(draw, "__defaults__", (1,))  # pictures of each prompt
        yield


@pytest.fixture(autouse=True, scope="session")
def _plain_plots() -> Iterator[None]:
    """A loss plot takes a fifth of a short run, and is tested by itself."""

    def save(_: object, path: Path) -> Path:
        return save_image(Image.new("RGB", (8, 8)), path)

    with pytest.MonkeyPatch.context() as patch:
        _plot_by(save, patch)
        yield


def _plot_by(save: Callable[..., Path], patch: pytest.MonkeyPatch) -> None:
    for place in ("hooks.artifacts", "run.train"):
        patch.setattr(f"diffgraft.trainers.{place}.save_loss_plot", save)


@pytest.fixture(autouse=True, scope="session")
def _no_prediction_check() -> Iterator[None]:
    """What a base predicts is looked at before each run, and is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffgraft.trainers.run.train_adapter.prediction_warning", lambda *_: "")
        yield


@pytest.fixture
def real_prediction_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs look at what their base predicts, as users' do."""
    monkeypatch.setattr("diffgraft.trainers.run.train_adapter.prediction_warning", prediction_warning)


@pytest.fixture
def real_loss_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs plot their losses as users' do."""
    _plot_by(save_loss_plot, monkeypatch)


@pytest.fixture
def good_class_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class images are drawn in as many steps as users' are."""
    monkeypatch.setattr("diffgraft.trainers.training_data.build.DrawSettings", DrawSettings)


@pytest.fixture(autouse=True, scope="session")
def _libraries_are_no_garbage(_own_cache: None) -> None:
    """Each run collects garbage as it ends; without the libraries' objects that takes a tenth of the time."""
    load_base("tiny")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base() -> Base:
    """The embedded base; a test that changes it must put it back."""
    return load_base("tiny")


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The five pictures of the demo's subject."""
    return POODLE.folder / "learn"


SHORT = {
    "subject": "dog",
    "steps": 6,
    "checkpoint_every": 3,
    "seed": 3,
    "sample_every": 0,
    "previews": False,
    "prior": {"images": 4},
}


@pytest.fixture(scope="session")
def short_run(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps of DreamBooth: enough for a file with non-zero deltas, not enough to have learnt."""
    settings = {**SHORT, "previews": True}
    with pytest.MonkeyPatch.context() as patch:
        _plot_by(save_loss_plot, patch)
        return train(SUBJECT, base=base, images=pictures, output=tmp_path_factory.mktemp("runs") / "short", **settings)


def made_once(make: Callable[[Path], object], name: str, factory: pytest.TempPathFactory) -> Path:
    """A folder that the first worker makes of those that need it; no test writes into it."""
    root = factory.getbasetemp()
    folder = (root.parent if root.name.startswith("popen-") else root) / name
    with FileLock(f"{folder}.lock"):
        if not (done := Path(f"{folder}.done")).exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a random Stable Diffusion XL with every width different."""
    return made_once(_save_sdxl, "small-xl", tmp_path_factory)


def _save_sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffgraft.bases.loading import TINY

    torch.manual_seed(5)

    def text(width: int, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=width + 8,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=projection,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=6 * 6 + 40,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text(32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(text(48, 40)),
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)


@cache
def _loaded(folder: Path) -> tuple[Base, int]:
    base = load_base(folder)
    return base, _tokens(base)


def _tokens(base: Base) -> int:
    return sum(len(tokenizer) for tokenizer in base.tokenizers().values())


def fresh(folder: Path) -> Base:
    """A copy of a folder's base, which is loaded once in a process; the copies share their tokenizers."""
    base, tokens = _loaded(folder)
    if _tokens(base) != tokens:  # an earlier test has left a word in them
        _loaded.cache_clear()
        base, _ = _loaded(folder)
    shared = [base.family, *base.tokenizers().values()]
    return deepcopy(base, {id(part): part for part in shared})


UNETS: dict[str, dict[str, object]] = {
    "sd1": {"block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 20, "attention_head_dim": 4},
    "sd2": {"block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 20, "attention_head_dim": [1, 2, 3, 3]},
    "taiyi": {"block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 20, "attention_head_dim": 4},
    "sdxl": {
        "block_out_channels": [8, 16, 24],
        "cross_attention_dim": 20 + 28,
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 12,
    },
}
"""Family → what makes the UNet of its configuration small."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base of every family, in a folder of the family's name."""

    def make(folder: Path) -> None:
        for family in UNETS:
            small(folder / family, family)

    return made_once(make, "families", tmp_path_factory)


def small(folder: Path, family: str, channels: int = 4) -> Path:
    """A random model of a family's configuration, small and unequal in width, as a diffusers folder.

    With nine channels its UNet is one for inpainting.
    """
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffgraft.bases import loading
    from diffgraft.bases.registry import families
    from diffgraft.bases.unet import inpainting_class

    torch.manual_seed(8)
    source = loading.CONFIGS / (family if family != "taiyi" else "sd1")

    def configured(part: str, **small: object) -> dict[str, object]:
        return {**json.loads((source / part / "config.json").read_text("utf-8")), **small}

    def text(part: str, width: int) -> CLIPTextConfig:
        sizes = {"hidden_size": width, "intermediate_size": width + 8, "num_attention_heads": 4, "projection_dim": 12}
        return CLIPTextConfig(**configured(part, num_hidden_layers=2, **sizes))

    vae = AutoencoderKL.from_config(configured("vae", block_out_channels=[4, 8, 12, 12], norm_num_groups=4))
    unet = UNet2DConditionModel.from_config(
        configured("unet", norm_num_groups=4, in_channels=channels, **UNETS[family])
    )
    with (source / "scheduler" / "scheduler_config.json").open(encoding="utf-8") as file:
        scheduler = getattr(diffusers, json.load(file)["_class_name"]).from_pretrained(source / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(loading.TINY / "tokenizer")
    padded_with_id_0 = CLIPTokenizer.from_pretrained(loading.TINY / "tokenizer", pad_token="!")
    parts: dict[str, object]
    if family == "sdxl":
        second = CLIPTextModelWithProjection(text("text_encoder_2", 28))
        parts = {"tokenizer": tokenizer, "text_encoder_2": second, "tokenizer_2": padded_with_id_0}
        parts["add_watermarker"] = False
    else:
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts["tokenizer"] = tokenizer if family == "sd1" else padded_with_id_0
    if family == "taiyi":
        parts |= chinese(folder.with_name(f"{folder.name}-vocabulary"))
    else:
        parts["text_encoder"] = CLIPTextModel(text("text_encoder", 20))
    kind = families()[family].pipeline_class
    pipe = getattr(diffusers, kind if channels == 4 else inpainting_class(kind))(
        vae=vae, unet=unet, scheduler=scheduler, **parts
    )
    pipe.save_pretrained(folder)
    return folder


def chinese(folder: Path) -> dict[str, object]:
    """A small BERT and its tokenizer, with a vocabulary of a few characters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只狗猫在雪地里的海边花瓶", "s", "##k", "##s", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=24)
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=24, **sizes))
    return {"tokenizer": tokenizer, "text_encoder": encoder}


@pytest.fixture(scope="session", params=FLOW_FAMILIES)
def flow_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A small random base of each family of flow-matching transformers, loaded from a folder."""
    return load_base(flow_folder_of(request.param, tmp_path_factory))


def flow_folder_of(family: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of the small random base of a family of flow-matching transformers."""
    from tests.flow_bases import flow_folder  # its imports take seconds

    return made_once(partial(flow_folder, family), family, factory)
