"""T-LoRA: its schedule against exact fractions, its layers against the paper's formula and LyCORIS, and its files."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, compute_timestep_mask, set_timestep_mask
from safetensors.torch import load_file
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.methods.tlora import AttachedTlora, OrthogonalLayer
from diffgraft.adapters.ops.all_timesteps import at_all_timesteps, excess_share
from diffgraft.adapters.ops.combine import combine
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.ops.inspect import inspect
from diffgraft.adapters.ops.resize import resize
from diffgraft.adapters.rank_schedule import RankSchedule, TimestepReader
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.trainers.runtime.checkpointing import recomputing
from tests.adapters.toys import PATHS, Net, input_of, shake

TIMES = torch.tensor([0, 333, 700, 999])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"init": "first", "init_matrix": "weight", "min_rank": 1, "exponent": 2.0},
    {"init": "middle", "min_rank": 2},
    {"init": "zero", "min_rank": 1},
]


class TimedNet(Net):
    """A net of every kind of layer that is called with timesteps, as denoisers are."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x + timestep.to(x).view(-1, 1, 1, 1) / 5000)
        return y


def attach(net: nn.Module, options: dict[str, Any], paths: list[str] | None = None, rank: int = 4) -> Attached:
    method = get_method("tlora")
    spec = Spec({"unet": paths or PATHS}, rank, 1.5 * rank, 7, method.read_options(options))
    return method.attach(SimpleNamespace(unet=net), spec)


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize(("rank", "least"), [(4, 1), (7, 3), (64, 32), (100, 10), (8192, 4096)])
def test_ranks_are_those_of_the_formula_in_fractions(rank: int, least: int, exponent: int) -> None:
    for has_start in (False, True):
        schedule = RankSchedule(min_rank=least, exponent=exponent, has_start=has_start)
        for at in range(0, 1000, 1 if rank < 1000 else 37):
            wanted = int(Fraction(1000 - at, 1000) ** exponent * (rank - least)) + least
            assert schedule.active(2 * rank if has_start else rank, at) == wanted


def test_half_of_the_ranks_act_at_the_noisiest_timestep_by_default_and_one_always_does() -> None:
    plain = RankSchedule(has_start=False)
    assert [plain.active(rank, 1000) for rank in (1, 2, 3, 9)] == [1, 1, 1, 4]
    assert [plain.active(rank, 0) for rank in (1, 2, 3, 9)] == [1, 2, 3, 9]
    assert RankSchedule(min_rank=5, has_start=False).active(3, 1000) == 3
    assert [RankSchedule().active(12, at) for at in (0, 500, 1000)] == [6, 4, 3]


def formula(net: TimedNet, live: Attached, x: Tensor, times: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of each sample by the paper's formula, with its own whole weights; and the leaves, for gradients."""
    assert isinstance(live, AttachedTlora)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in live.trainable().items()}
    outputs = []
    for row, at in enumerate(times.tolist()):
        weights = {}
        for path, own in live.adapter_layers().items():
            weight = net.get_submodule(path.removeprefix("unet.")).weight
            assert isinstance(weight, Tensor)
            p, q = leaves[f"{path}.lora_up"].flatten(1), leaves[f"{path}.lora_down"].flatten(1)
            rank = len(q)
            schedule: RankSchedule = own._timing.schedule  # type: ignore[union-attr, assignment]
            least = rank // 2 if schedule.min_rank is None else schedule.min_rank
            active = int(((1000 - at) / 1000) ** schedule.exponent * (rank - least) + 1e-9) + least
            mask = torch.zeros(rank, dtype=x.dtype)
            mask[:active] = 1
            if isinstance(own, OrthogonalLayer):
                start = own.start_up.flatten(1) @ torch.diag(mask) @ own.start_down.flatten(1)
                change = p @ torch.diag(leaves[f"{path}.lora_values"] * mask) @ q - start
            else:
                change = p @ torch.diag(mask) @ q
            weights[f"{path.removeprefix('unet.')}.weight"] = weight + 1.5 * change.view_as(weight)  # alpha / rank
        live.is_disabled = True
        outputs.append(torch.func.functional_call(net, weights, (x[row : row + 1], times[row : row + 1])))
        live.is_disabled = False
    return torch.cat(outputs), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_loss_and_gradients_are_those_of_the_formula_sample_by_sample(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    net = TimedNet().requires_grad_(False)
    live = attach(net, options)
    shake(live, size=0.2)
    net, live = net.to(dtype), live.to(dtype)
    x = input_of(net)
    found = net(x, TIMES)
    wanted, leaves = formula(net, live, x, TIMES)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < tolerance
    losses = found.square().mean(), wanted.square().mean()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    for loss in losses:
        loss.backward()
    pairs = [(value.grad, leaves[name].grad) for name, value in live.trainable().items()]
    ours, theirs = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))  # type: ignore[union-attr]
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    everywhere = net(x, TIMES[:1])  # one timestep for the whole batch, as pipelines give it
    assert torch.equal(everywhere, net(x, TIMES[:1].expand(4)))
    assert not torch.allclose(everywhere, found, rtol=1e-3)


def test_a_compiled_net_has_the_ranks_of_each_call() -> None:
    net = TimedNet().requires_grad_(False)
    live = attach(net, {})
    shake(live, size=0.2)
    x, compiled = input_of(net), torch.compile(net, backend="aot_eager")
    for times in (TIMES, TIMES.flip(0)):
        found, wanted = compiled(x, times), net(x, times)
        torch.testing.assert_close(found, wanted)
        pairs = [torch.autograd.grad(out.square().mean(), [*live.trainable().values()]) for out in (found, wanted)]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("init", ["last", "middle", "first"])
def test_the_start_is_orthogonal_and_does_nothing_at_any_timestep(init: str) -> None:
    net = TimedNet()
    bare = net(input_of(net), TIMES)
    live = attach(net, {"init": init, "init_matrix": "weight"}, rank=5)
    assert isinstance(live, AttachedTlora)
    assert torch.equal(net(input_of(net), TIMES), bare)
    for path, own in live.adapter_layers().items():
        weight = net.get_submodule(path.removeprefix("unet.")).weight
        assert isinstance(weight, Tensor)
        p, q = own.leaves["lora_up"].flatten(1), own.leaves["lora_down"].flatten(1)  # type: ignore[index, union-attr]
        rank = p.shape[1]
        assert rank == min(5, *weight.flatten(1).shape)
        torch.testing.assert_close(p.T @ p, torch.eye(rank), atol=1e-5, rtol=0)
        torch.testing.assert_close(q @ q.T, torch.eye(rank), atol=1e-5, rtol=0)
        values = torch.linalg.svdvals(weight.flatten(1).double())
        begin = {"first": 0, "middle": (len(values) - rank + 1) // 2, "last": len(values) - rank}[init]
        found = (p.T @ weight.flatten(1) @ q.T).diag().double()
        torch.testing.assert_close(found, values[begin : begin + rank], rtol=1e-4, atol=1e-5)


def test_steps_are_those_of_lycoris() -> None:
    """Five steps of Adam, each at one timestep, from the same start."""
    torch.manual_seed(4)
    reference, net = nn.Linear(14, 22), nn.Module()
    net.layer = nn.Linear(14, 22).requires_grad_(False)
    net.layer.load_state_dict(reference.state_dict())
    theirs = TLoraModule("a", reference.requires_grad_(False), 1.0, 6, 9.0, bypass_mode=True)
    live = get_method("tlora").attach(
        SimpleNamespace(unet=net),
        Spec({"unet": ["layer"]}, 6, 9.0, 0, get_method("tlora").read_options(OPTIONS[1])),
    )
    assert isinstance(live, AttachedTlora)
    names = {"lora_up": theirs.p_layer.weight, "lora_down": theirs.q_layer.weight, "lora_values": theirs.lambda_layer}
    (own,) = live.adapter_layers().values()
    with torch.no_grad():
        for name, value in names.items():
            own.leaves[name].copy_(value.view_as(own.leaves[name]))  # type: ignore[index, union-attr, operator]
    own._set_start(own.leaves["lora_up"], own._folded_down())  # type: ignore[union-attr, operator, index]
    x, goal = torch.randn(3, 5, 14), torch.randn(3, 5, 22)
    ours = torch.optim.Adam(live.trainable().values(), lr=2e-2)
    others = torch.optim.Adam(names.values(), lr=2e-2)
    (reader,) = live._readers.values()
    try:
        for at in (999, 480, 0, 720, 130):
            set_timestep_mask(compute_timestep_mask(at, 1000, 6, 1, 2.0))
            reader.timesteps = torch.tensor([at])
            outputs = net.layer(x), theirs(x)
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
            for out, adam in zip(outputs, (ours, others), strict=True):
                adam.zero_grad()
                (out - goal).square().mean().backward()
                adam.step()
    finally:
        clear_timestep_mask()
    assert float((outputs[0] - reference(x)).detach().abs().max()) > 0.05


@pytest.fixture(scope="module")
def unet_base() -> Base:
    return load_base("tiny")


def on(base: Base, seed: int = 5, text: bool = False, **options: Any) -> Attached:
    """T-LoRA on the attention of a base, with random values."""
    method = get_method("tlora")
    paths = {"unet": choose_layers("unet", base.unet, "attention")}
    if text:
        paths["text_encoder"] = choose_layers("text_encoder", base.text_encoder, "attention")
    live = method.attach(base, Spec(paths, 4, 4.0, seed, method.read_options(options)))
    shake(live, seed=seed, size=0.1)
    return live


def adapter_on(base: Base, **options: Any) -> Adapter:
    live = on(base, **options)
    adapter = live.adapter({"method": "tlora"})
    live.detach()
    return adapter


LATENTS, NOISY_TO_CLEAN = (4, 8, 12), torch.tensor([990, 600, 10])


def predict(base: Base, times: Tensor = NOISY_TO_CLEAN) -> Tensor:
    latents = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(2))
    out: Tensor = base.denoise(latents, times, base.condition(["a dog", "a cat", "a bird"])).float()
    return out


def test_several_passes_at_other_timesteps_and_strengths_before_one_way_back(unet_base: Base) -> None:
    """With blocks that are computed again, gradients are those of passes each with a way back of its own."""
    live = on(unet_base)
    other = TimestepReader(unet_base.unet)  # as that of an adapter under the training
    parameters = list(live.trainable().values())
    passes = [(torch.tensor([20, 500, 900]), 1.0), (torch.tensor([970, 30, 400]), -1.0)]

    def loss(place: int) -> Tensor:
        times, strength = passes[place]
        with live.at_strength(strength):
            return predict(unet_base, times).square().sum()

    try:
        apart = [torch.autograd.grad(loss(place), parameters) for place in (0, 1)]
        unet_base.unet.enable_gradient_checkpointing(recomputing(unet_base.unet, live))
        unet_base.unet.train()
        first, second = loss(0), loss(1)
        with live.disabled(), torch.no_grad():
            predict(unet_base, torch.tensor([700, 700, 1]))
        together = torch.autograd.grad(first + second, parameters)
        assert other.timesteps is not None
        assert other.timesteps.tolist() == [700, 700, 1]
    finally:
        unet_base.unet.disable_gradient_checkpointing()
        unet_base.unet.eval()
        other.remove()
        live.detach()
    wanted = [one + two for one, two in zip(*apart, strict=True)]
    found, sums = (torch.cat([value.flatten() for value in each]) for each in (together, wanted))
    assert float((found - sums).norm() / sums.norm()) < 1e-6


@pytest.mark.parametrize("options", [{}, {"init": "zero", "min_rank": 1}], ids=str)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@torch.no_grad()
def test_drawing_uses_the_ranks_of_training(options: dict[str, Any], quantize: Any) -> None:
    """Attached is grafted, sample by sample at its own timestep, on text encoders as well, which have none."""
    base = load_base("tiny", quantize=quantize)
    bare = predict(base)
    live = on(base, text=True, **options)
    attached, adapter = predict(base), live.adapter({"method": "tlora"})
    live.detach()
    assert torch.equal(predict(base), bare)
    with graft(base, {adapter: 1.0}):
        torch.testing.assert_close(predict(base), attached, rtol=1e-3, atol=2e-4 if quantize == "none" else 5e-3)
    assert torch.equal(predict(base), bare)
    assert not base.unet._forward_pre_hooks
    schedules = {path.partition(".")[0]: delta.rank_schedule for path, (delta,) in adapter.deltas.items()}
    assert schedules["text_encoder"] is None
    assert schedules["unet"] is not None


@torch.no_grad()
def test_grafts_stack_and_come_off_in_any_order(unet_base: Base) -> None:
    bare = predict(unet_base)
    timed, lora = adapter_on(unet_base), replace(adapter_on(unet_base, seed=9), metadata={})
    plain = Adapter({path: (replace(delta, rank_schedule=None),) for path, (delta,) in lora.deltas.items()})  # type: ignore[type-var]
    with graft(unet_base, {timed: 0.5, plain: 1.0}):
        together = predict(unet_base)
    first, second = graft(unet_base, {plain: 1.0}), graft(unet_base, {timed: 0.5})
    torch.testing.assert_close(predict(unet_base), together)
    second.set({timed: 1.0})
    assert not torch.allclose(predict(unet_base), together, atol=1e-3)
    second.set({timed: 0.5})
    torch.testing.assert_close(predict(unet_base), together)
    second.remove()
    first.remove()
    assert torch.equal(predict(unet_base), bare)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "lycoris", "diffgraft"])
@torch.no_grad()
def test_a_file_is_the_same_t_lora_here_and_a_plain_lora_elsewhere(
    dialect: str, unet_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_on(unet_base, text=True, min_rank=1, exponent=1.5)
    plain = at_all(adapter)
    file = adapter.save(tmp_path / "a.safetensors", dialect)
    assert load_file(file).keys() == load_file(plain.save(tmp_path / "b.safetensors", dialect)).keys()
    again = load_adapter(file)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert again.deltas[path][0].rank_schedule == adapter.deltas[path][0].rank_schedule
    with graft(unet_base, {adapter: 0.7}):
        wanted = predict(unet_base)
    with graft(unet_base, {again: 0.7}):
        torch.testing.assert_close(predict(unet_base), wanted, rtol=1e-4, atol=1e-5)
    if dialect == "diffusers":
        with graft(unet_base, {plain: 1.0}):
            all_ranks = predict(unet_base)
        other = load_base("tiny")
        other.pipeline().load_lora_weights(tmp_path, weight_name="a.safetensors")
        torch.testing.assert_close(predict(other), all_ranks, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(all_ranks, wanted, atol=1e-2)


def at_all(adapter: Adapter) -> Adapter:
    with pytest.warns(UserWarning, match="is a T-LoRA, with fewer ranks at noisier timesteps"):
        return at_all_timesteps("It", adapter)


def test_what_other_programs_get_wrong_is_told_in_figures(unet_base: Base, tmp_path: Path) -> None:
    adapter = adapter_on(unet_base, min_rank=1)
    excess = total = 0.0
    for (delta,) in adapter.deltas.values():
        assert isinstance(delta, FactorDelta)
        up, down = delta.leaves["lora_up"].double(), delta.leaves["lora_down"].double()
        late = [1, 2, 3, 5, 6, 7]  # all but the first rank and its start
        excess += float((up[:, late] @ down[late]).square().sum())
        total += float((up @ down).square().sum())
    share = (excess / total) ** 0.5
    assert excess_share(adapter) == pytest.approx(share, rel=1e-6)
    assert excess_share(at_all(adapter)) == 0
    file = adapter.save(tmp_path / "a.safetensors")
    converted = convert(file, tmp_path / "b.safetensors", "diffusers")
    told = f"of a T-LoRA at all timesteps, which at the noisiest one are {100 * share:.0f} % of its change too much."
    assert any(remark.endswith(told) for remark in converted.remarks)
    assert converted.comparison.worst[1] < 1e-6
    assert "by timestep 4 ranks at 0, 2 ranks at 499, 1 ranks at 999, each with its start" in str(inspect(adapter))


def test_sums_and_checkpoints_have_all_ranks_with_a_warning(unet_base: Base, tmp_path: Path) -> None:
    adapter = adapter_on(unet_base)
    plain = at_all(adapter)
    path = next(iter(adapter.deltas))
    wanted = plain.deltas[path][0].apply(torch.zeros(unet_base.unet.get_submodule(path[5:]).weight.shape), None, 1.0)[0]
    for made in (lambda: combine([("a.safetensors", adapter, 1.0)]), lambda: resize(adapter, RankBudget(8))):
        with pytest.warns(UserWarning, match=r"(a\.safetensors|The adapter) is a T-LoRA, .*give the file itself"):
            reduced = made().adapter
        assert "rank_schedule" not in reduced.metadata
        found = reduced.deltas[path][0].apply(torch.zeros_like(wanted), None, 1.0)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="The adapter is a T-LoRA"):
        folder = merge_checkpoint(unet_base, {adapter: 1.0}, tmp_path / "merged")
    weight = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")[f"{path[5:]}.weight"]
    own = unet_base.unet.get_submodule(path[5:]).weight
    torch.testing.assert_close(weight - own, wanted, rtol=1e-3, atol=1e-5)


def test_training_goes_on_from_a_file_of_the_same_kind_alone(unet_base: Base) -> None:
    adapter = adapter_on(unet_base)
    with graft(unet_base, {adapter: 1.0}), torch.no_grad():
        wanted = predict(unet_base)
    again = on(unet_base, seed=3)
    assert again.load(adapter) == set(adapter.deltas)
    with torch.no_grad():
        torch.testing.assert_close(predict(unet_base), wanted, rtol=1e-3, atol=1e-4)
    again.detach()
    vanilla = on(unet_base, init="zero")
    with pytest.raises(ValueError, match=r"is a T-LoRA with a start: set options\.init"):
        vanilla.load(adapter)
    started = vanilla.adapter({})
    vanilla.detach()
    orthogonal = on(unet_base)
    with pytest.raises(ValueError, match=r"is no T-LoRA with a start: .* options\.init=zero"):
        orthogonal.load(started)
    orthogonal.detach()
    vanilla = on(unet_base, init="zero", seed=8)
    assert vanilla.load(at_all(started)) == set(adapter.deltas)
    vanilla.detach()
    lora = get_method("lora")
    plain = lora.attach(unet_base, Spec({"unet": ["mid_block.attentions.0.proj_in"]}, 4, 4.0, 0, lora.read_options({})))
    first = plain.adapter({})
    timed = Adapter({path: (replace(delta, rank_schedule=RankSchedule()),) for path, (delta,) in first.deltas.items()})  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"has ranks by timestep \(T-LoRA\), which only method=tlora trains"):
        plain.load(timed)
    plain.detach()


def test_a_file_has_one_schedule_and_a_valid_one(unet_base: Base, tmp_path: Path) -> None:
    one, other = adapter_on(unet_base), adapter_on(unet_base, min_rank=1)
    mixed = replace(one, deltas={**one.deltas, **dict([*other.deltas.items()][:3])})
    with pytest.raises(DiffgraftError, match="its LoRAs differ in how many ranks act at a timestep"):
        mixed.save(tmp_path / "a.safetensors")
    both = replace(one, deltas={path: (*own, *other.deltas[path]) for path, own in one.deltas.items()})
    with pytest.raises(DiffgraftError, match="a T-LoRA cannot be joined with others"):
        both.save(tmp_path / "a.safetensors", "kohya")
    from diffgraft.adapters.formats.header import with_rank_schedule

    for broken in ({"exponent": -1.0}, {"exponent": "1"}, [1], {"minimum": 3}, {"min_rank": 0}, {"timesteps": 0}):
        with pytest.raises(ValueError, match="its schedule of ranks is invalid"):
            with_rank_schedule(replace(one, metadata={"rank_schedule": broken}))


def test_a_denoiser_without_timesteps_is_refused(unet_base: Base) -> None:
    method = get_method("tlora")
    strange = replace(unet_base, unet=nn.Sequential(nn.Linear(3, 5)))  # type: ignore[call-arg]
    with pytest.raises(DiffgraftError, match="method=tlora cannot train bases of the family"):
        method.attach(strange, Spec({"unet": ["0"]}, 2, 2.0, 0, method.read_options({})))
