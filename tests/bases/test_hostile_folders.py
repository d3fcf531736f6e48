"""Damaged and hostile folders of bases: nothing in them runs, nothing is asked, and each is refused in one sentence."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.meta_base import meta_base
from diffgraft.errors import DiffgraftError
from tests.conftest import small

FOLDERS = 40
"""Random mutations in the suite; `DIFFGRAFT_FUZZ` in the environment asks for more"""
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e12,
    10**30,
    2.5,
    float("nan"),
    "",
    "x" * 500,
    "../../etc/passwd",
    [],
    {},
    [[]],
    [None, None],
    {"a": {"b": [1]}},
    "\x1b]52;c;aGk=\x07",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("hostile") / "healthy", "sd1")


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return linked(healthy, tmp_path / "base")


def linked(source: Path, target: Path) -> Path:
    """A copy that shares the contents of files that are not written anew."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace_bytes(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; those that are `...` are removed."""
    said = {**json.loads(path.read_text("utf-8")), **values}
    replace_bytes(path, json.dumps({key: value for key, value in said.items() if value is not ...}).encode())


def refused(folder: Path, *, by_plan: bool = True) -> str:
    """What loading says of a folder, in a single line; laying it out says the same."""
    with pytest.raises(DiffgraftError) as caught:
        load_base(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 700
    if by_plan:
        with pytest.raises(DiffgraftError) as caught:
            meta_base(folder)
        assert str(caught.value) == said
    return said


CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("text_encoder", ..., "lists no text_encoder"),
        ("text_encoder", [None, None], "supported classes of transformers: CLIPTextModel"),
        ("unet", {"diffusers": "UNet2DConditionModel"}, "as its unet"),
        ("unet", ["diffusers", "DiffusionPipeline"], "UNet2DConditionModel"),
        ("unet", ["diffusers", "utils"], "UNet2DConditionModel"),
        ("unet", ["../../evil", "UNet2DConditionModel"], "UNet2DConditionModel"),
        ("unet", ["evil", "UNet2DConditionModel"], "UNet2DConditionModel"),
        ("tokenizer", ["transformers", "AutoTokenizer"], "CLIPTokenizer"),
        ("tokenizer", ["transformers", "pipeline"], "CLIPTokenizer"),
        ("text_encoder", ["transformers", "AutoModel"], "CLIPTextModel"),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"], "DDIMScheduler"),
        ("scheduler", ["diffusers", ["DDIMScheduler"]], "DDIMScheduler"),
        ("scheduler", 3, "DDIMScheduler"),
        ("../../unet", ["diffusers", "UNet2DConditionModel"], "lists a part '../../unet'"),
        ("prior", ["diffusers", "PriorTransformer"], "lists a part 'prior'"),
        ("_class_name", ["StableDiffusionPipeline"], "holds a ['StableDiffusionPipeline']"),
        ("_class_name", "DiffusionPipeline", "holds a DiffusionPipeline"),
        ("_class_name", {}, "holds a {}"),
    ],
)
def test_an_index_names_known_classes_alone(folder: Path, key: str, value: Any, answer: str) -> None:
    change(folder / "model_index.json", **{key: value})
    assert answer in refused(folder)


@pytest.mark.parametrize(
    ("file", "key", "value", "answer"),
    [
        ("unet/config.json", "block_out_channels", [10**12], "block_out_channels"),
        ("unet/config.json", "layers_per_block", 10**6, "layers_per_block=1000000"),
        ("unet/config.json", "layers_per_block", True, "layers_per_block=True"),
        ("unet/config.json", "cross_attention_dim", "768", "cross_attention_dim='768'"),
        ("unet/config.json", "sample_size", ..., "has no sample_size"),
        ("unet/config.json", "class_embed_type", "timestep", "class_embed_type='timestep'"),
        ("unet/config.json", "down_block_types", ["os.system"], "down_block_types"),
        ("unet/config.json", "act_fn", ["silu"], "act_fn"),
        ("unet/config.json", "act_fn", "evil", "no UNet2DConditionModel can be built"),
        ("unet/config.json", "flip_sin_to_cos", 1, "flip_sin_to_cos=1"),
        ("unet/config.json", "freq_shift", float("nan"), "NaN is not a JSON number"),
        ("unet/config.json", "quantization_config", {"load_in_4bit": True}, "already quantized"),
        ("vae/config.json", "shift_factor", 0.1, "shift_factor=0.1"),
        ("vae/config.json", "scaling_factor", 0, "scaling_factor=0"),
        ("vae/config.json", "latent_channels", 16, "belong to different models"),
        ("text_encoder/config.json", "hidden_size", 21, "not a multiple of num_attention_heads"),
        ("text_encoder/config.json", "hidden_act", "evil", "hidden_act='evil'"),
        ("text_encoder/config.json", "num_hidden_layers", 10**12, "num_hidden_layers"),
        ("text_encoder/config.json", "num_hidden_layers", 1, "encoder.layers.1."),
        ("text_encoder/config.json", "num_hidden_layers", 3, "lacks 16 of the"),
        ("text_encoder/config.json", "quantization_config", {"quant_method": "gptq"}, "already quantized"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "num_train_timesteps=0"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "beta_start", -1, "beta_start=-1"),
        ("scheduler/scheduler_config.json", "beta_end", "0.01", "beta_end='0.01'"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2], "has 2 trained_betas"),
        ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type=sample"),
        ("scheduler/scheduler_config.json", "prediction_type", "x0", "prediction_type='x0'"),
        (
            "scheduler/scheduler_config.json",
            "prediction_type",
            "flow_prediction",
            "only bases that predict noise (epsilon) or v",
        ),
        ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"], "prediction_type=['epsilon']"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "evil", "timestep_spacing"),
    ],
)
def test_configurations_hold_sane_values(folder: Path, file: str, key: str, value: Any, answer: str) -> None:
    change(folder / file, **{key: value})
    assert answer in refused(folder)


def test_a_pipeline_keeps_the_values_of_its_configurations(folder: Path) -> None:
    """What is allowed through arrives as it is, and not as a default."""
    change(folder / "scheduler/scheduler_config.json", beta_end=0.013, set_alpha_to_one=True)
    change(folder / "unet/config.json", freq_shift=1, act_fn="mish", _unknown=[1])
    held = load_base(folder)
    assert held.scheduler.config.beta_end == 0.013
    assert held.scheduler.config.set_alpha_to_one is True
    assert (held.unet.config.freq_shift, held.unet.config.act_fn) == (1, "mish")


def test_the_code_of_a_folder_is_never_run_nor_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: str = "") -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", ask)
    trap = tmp_path / "ran"
    code = f"open({str(trap)!r}, 'w').close()\nclass Evil: pass\n"
    for part in (".", "tokenizer", "text_encoder", "unet", "scheduler"):
        for name in ("evil", "unet", "pipeline", "CLIPTokenizer", "modeling"):
            (folder / part / f"{name}.py").write_text(code, "utf-8")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "CLIPTextModel", "CLIPTokenizer"), "evil.Evil")
    auto_tokenizer = {**auto, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(folder / "tokenizer/tokenizer_config.json", auto_map=auto_tokenizer, tokenizer_class="Evil")
    change(folder / "text_encoder/config.json", auto_map=auto, model_type="evil", _attn_implementation="evil/kernel")
    change(folder / "unet/config.json", auto_map=auto, _class_name="Evil")
    assert load_base(folder).tokenizer("a dog").input_ids == load_base("tiny").tokenizer("a dog").input_ids
    meta_base(folder)
    change(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    refused(folder)
    change(folder / "model_index.json", _class_name=["evil", "Evil"])
    refused(folder)
    assert not trap.exists()


WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.mark.parametrize("part", sorted(WEIGHTS))
def test_every_weight_is_accounted_for(part: str, folder: Path) -> None:
    """A library would draw what is missing at random, and drop what is left over."""
    path = folder / WEIGHTS[part]
    whole = load_file(path)
    names = sorted(whole)

    def written(tensors: dict[str, torch.Tensor]) -> None:
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    written({name: whole[name] for name in names[: len(names) // 2]})
    lacking = len(names) - len(names) // 2
    assert f"lacks {lacking} of the {len(names)} weights" in refused(folder)
    last = names[-1]
    written({**whole, last: torch.zeros(3, 5, 7)})
    assert f"{last} of shape [3, 5, 7]" in refused(folder)
    written({**whole, "evil.weight": torch.zeros(2, 3)})
    assert "'evil.weight', which is not a weight of the" in refused(folder)
    written({**whole, last: torch.zeros(whole[last].shape, dtype=torch.int64)})
    assert "in I64" in refused(folder)
    replace_bytes(path, path.read_bytes()[:-5])
    assert "is not a readable .safetensors file" in refused(folder)
    path.unlink()
    assert "has no weights in .safetensors" in refused(folder)


def test_parts_of_two_models_that_are_whole_are_no_base(folder: Path) -> None:
    """Each fits its own configuration, but the text is not as wide as the UNet takes it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    said = json.loads((folder / "text_encoder/config.json").read_text("utf-8"))
    width = said["hidden_size"] + 4 * said["num_attention_heads"]
    shutil.rmtree(folder / "text_encoder")
    CLIPTextModel(CLIPTextConfig(**{**said, "hidden_size": width})).save_pretrained(folder / "text_encoder")
    assert f"its UNet takes text of width {width - 16}, but its text encoders return {width}" in refused(folder)


def test_names_of_earlier_releases_are_read(folder: Path) -> None:
    wanted = load_base(folder)
    text, vae = folder / WEIGHTS["text_encoder"], folder / WEIGHTS["vae"]
    said = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(text).items()}
    said |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "vision_model.x.weight": torch.ones(2)}
    text.unlink()
    save_file(said, text)
    names = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
    old = {}
    for name, value in load_file(vae).items():
        for now, before in names:
            name = name.replace(now, before)
        old[name] = value
    vae.unlink()
    save_file(old, vae)
    found = load_base(folder)
    assert found.hash == wanted.hash
    assert found.vae_hash == wanted.vae_hash
    assert meta_base(folder).hash == ""


@pytest.mark.parametrize(
    ("table", "answer"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "has no weight_map"),
        ({"weight_map": {"a": "/etc/passwd"}}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "is not a JSON object"),
        ({"weight_map": {"a": "absent.safetensors"}}, "names absent.safetensors, which is missing"),
    ],
)
def test_tables_of_shards(folder: Path, table: Any, answer: str) -> None:
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(table), "utf-8")
    assert answer in refused(folder)


@pytest.mark.parametrize(
    ("file", "content", "answer"),
    [
        ("model_index.json", b"[" * 200_000, "cannot be read as JSON"),
        ("model_index.json", b"[]", "is not a JSON object"),
        ("model_index.json", b" " * 2**23, "is larger than"),
        ("unet/config.json", b'{"a": ' * 100_000, "cannot be read as JSON"),
        ("unet/config.json", b"\xff\xfe", "cannot be read as JSON"),
        ("tokenizer/tokenizer_config.json", b"{", "cannot be read as JSON"),
        ("tokenizer/tokenizer_config.json", b'{"model_max_length": 1000000}', "returns 1000000 tokens"),
        ("tokenizer/tokenizer_config.json", b'{"model_max_length": "77"}', "tokenizer"),
        ("tokenizer/tokenizer_config.json", b'{"model_max_length": -1}', "tokenizer"),
        ("tokenizer/tokenizer_config.json", b'{"unk_token": 7}', "tokenizer"),
        ("tokenizer/tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer/tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokenizer"),
    ],
)
def test_damaged_files(folder: Path, file: str, content: bytes, answer: str) -> None:
    replace_bytes(folder / file, content)
    assert answer in refused(folder)


def test_pipes_and_folders_in_the_place_of_files(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")
    assert "is missing, or is not a file" in refused(folder)
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").mkdir()
    assert "is missing, or is not a file" in refused(folder)
    shutil.rmtree(folder / "vae")
    assert "is missing, or is not a file" in refused(folder)


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage one file of a folder in one of the ways in which files are, or doctor it; what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice(files)
    content = bytearray(path.read_bytes())
    way = chance.randrange(6)
    if path.suffix == ".json" and len(content) < 10_000 and way < 4:
        said = json.loads(content)
        key = chance.choice(sorted(said)) if way < 3 and said else f"odd{chance.random()}"
        odd = chance.choice(ODD)
        if way == 2 and isinstance(said.get(key), list) and said[key]:
            said[key][chance.randrange(len(said[key]))] = odd
        else:
            said[key] = odd
        replace_bytes(path, json.dumps(said).encode())
        return f"{path.name}: {key}={odd!r}"
    if way == 4:
        path.unlink()
        return f"{path.name} removed"
    at = chance.randrange(len(content))
    if chance.random() < 0.5:
        del content[at:]
    else:
        content[at : at + 4] = chance.randbytes(4)
    replace_bytes(path, bytes(content))
    return f"{path.name} damaged at {at}"


@pytest.mark.filterwarnings("ignore")  # the libraries remark on odd values
def test_random_mutations(healthy: Path, tmp_path: Path) -> None:
    count = int(os.environ.get("DIFFGRAFT_FUZZ", FOLDERS))
    chance = random.Random(count)
    read: list[Callable[[Path], Base]] = [meta_base, load_base]
    refusals = 0
    for number in range(count):
        target = linked(healthy, tmp_path / "base")
        done = mutate(target, chance)
        try:
            read[number % 2](target)
        except DiffgraftError as error:
            refusals += 1 if "\n" not in str(error) and len(str(error)) < 1000 else -count
        except BaseException as error:
            raise AssertionError(f"folder {number}: {done}: {error!r}") from error
        shutil.rmtree(target)
    assert refusals > count // 4


def reversed_pairs(lines: list[str]) -> list[str]:
    return [*lines[:1], *reversed(lines[1:])]


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        (lambda lines: lines[:1], "merges.txt lacks 48,894 of the tokens"),
        (lambda lines: lines[:40_000], "merges.txt lacks 8,895 of the tokens"),
        (lambda lines: lines[:-1], "merges.txt lacks 1 of the tokens in vocab.json, such as 'jekyll</w>'"),
        (reversed_pairs, "lacks some of CLIP's merges, or has them in another order"),
    ],
)
def test_merges_that_are_cut_short_would_change_every_prompt(
    folder: Path, changed: Callable[[list[str]], list[str]], answer: str
) -> None:
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    path = folder / "tokenizer" / "merges.txt"
    path.write_text("".join(changed(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")
    assert answer in refused(folder)


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (lambda old: min(old, 5), "several tokens of vocab.json have the same id"),
        (lambda old: (old + 1) % 49_406 if old < 49_406 else old, "of CLIP's tokens are missing or have other ids"),
        (lambda old: 10**9 if old == 600 else old, "but the embedding table of the text encoder has"),
    ],
)
def test_words_under_other_numbers_would_change_every_prompt(
    folder: Path, number: Callable[[int], int], answer: str
) -> None:
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    path = folder / "tokenizer" / "vocab.json"
    words = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({word: number(old) for word, old in words.items()}), "utf-8")
    assert answer in refused(folder)


def test_a_text_encoder_of_more_layers_than_are_used_is_told_as_clip_skip(folder: Path) -> None:
    change(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    said = refused(folder)
    assert "has num_hidden_layers=1, which may have been lowered for clip skip" in said
    change(folder / "text_encoder" / "config.json", num_hidden_layers=2)
    assert load_base(folder).text_encoder.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("family", "file", "key", "value", "why"),
    [
        ("flux1", "tokenizer/tokenizer_config.json", "model_max_length", 10**9, "the text encoder has 77 positions"),
        ("flux1", "tokenizer_2/tokenizer_config.json", "model_max_length", "../..", "no number as model_max_length"),
        ("zimage", "transformer/config.json", "n_layers", 10**6, "n_layers=1000000"),
        ("zimage", "text_encoder/config.json", "hidden_size", -4, "hidden_size=-4"),
        ("zimage", "text_encoder/config.json", "num_hidden_layers", 5, "no Qwen3Model can be built from it"),
        ("qwen-image", "vae/config.json", "latents_std", [0.0], "latents_std"),
        (
            "qwen-image",
            "text_encoder/config.json",
            "quantization_config",
            {"quant_method": "gptq"},
            "already quantized",
        ),
        ("flux2-klein", "scheduler/scheduler_config.json", "shift", "3", "shift='3'"),
        ("flux2-klein", "model_index.json", "text_encoder", ["transformers", "AutoModel"], "supported classes of"),
        ("flux2-klein", "model_index.json", "text_encoder", None, "has None as its text_encoder"),
        ("krea2", "transformer/config.json", "num_text_layers", 10**7, "num_text_layers"),
        ("sd3", "model_index.json", "extra", ["diffusers", "UNet2DModel"], "lists a part 'extra'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_folders_of_transformers_are_not_trusted_either(
    family: str, file: str, key: str, value: Any, why: str, tmp_path: Path
) -> None:
    from tests.flow_bases import flow_folder

    folder = flow_folder(family, tmp_path / "base")
    config = json.loads((folder / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps({**config, key: value}), "utf-8")
    with pytest.raises(DiffgraftError) as caught:
        load_base(folder)
    assert why in str(caught.value)


def test_nothing_in_a_transformers_configuration_names_code_or_kernels(tmp_path: Path) -> None:
    """Such fields are dropped: neither is code loaded, nor a kernel fetched."""
    from tests.flow_bases import flow_folder

    folder = flow_folder("zimage", tmp_path / "base")
    file = folder / "text_encoder" / "config.json"
    more = {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "trust_remote_code": True,
    }
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **more}), "utf-8")
    base = load_base(folder)
    assert base.text_encoder.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(base.text_encoder.config, "auto_map")
