"""What has to hold on every rank: each case is one function, run on two ranks that know only their own shards."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import gradkit
from gradkit.transforms import (
    adaptive_clip,
    cautious,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    grokfast_ma,
    zclip,
)
from tests.curvature import EVERY, SquaresOfGradients
from tests.sharding import attached, gradients, losses, selections, units
from tests.sharding.units import equal, full, line, near, shard
from tests.sharding.world import RANKS

BACKENDS = ("eager", "chunked", "native")


def scale(groups: Iterable[dict], **given: Any) -> gradkit.Optimizer:
    """SCALE: the matrix of seven rows is a hidden one, the others are last layers."""
    alone = [{**g, "params": [p]} for g in groups for p in g["params"]]
    for g in alone:
        (p,) = g["params"]
        g["role"] = "vector" if p.dim() < 2 else "matrix" if len(p) == 7 else "last"
    return gradkit.SCALE(alone, **given)


def frugal(groups: Iterable[dict], **given: Any) -> gradkit.Optimizer:
    """FRUGAL: three matrices, two of which are selected for two steps each."""
    (net, beside) = groups
    parts = [[p for p in net["params"] if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [{**net, "params": p, "role": role} for p, role in zip(parts, ("matrix", "vector"), strict=True)]
    return gradkit.FRUGAL([*groups, {**beside, "role": "vector"}], density=0.5, update_gap=2, seed=3, **given)


OPTIMIZERS = {
    "AdamW": gradkit.AdamW,
    "Lion": gradkit.Lion,
    "DiffGrad": gradkit.DiffGrad,
    "AdEMAMix": gradkit.AdEMAMix,
    "Grokfast": gradkit.Grokfast,
    "Grokfast-ma": partial(gradkit.Grokfast, filter="ma", window=2),
    "SPAM": partial(gradkit.SPAM, reset_every=2, clip_free_steps=1, threshold=3.0),
    "StableSPAM": partial(gradkit.StableSPAM, reset_every=2),
    "Sophia": partial(SquaresOfGradients, **EVERY),
    "SCALE": scale,
    "FRUGAL": frugal,
}


class Net(nn.Module):
    """7 rows over two ranks are 4 and 3, 1 row is 1 and none; `idle` never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1)
        self.idle = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class Run:
    """A model, with a plain 0-d parameter beside it, its optimizer, and what training does to them."""

    def __init__(self, make: Callable, sharded: bool = True, dtype: torch.dtype = torch.float32):
        self.net, self.scale, self.dtype = Net().to(dtype), nn.Parameter(torch.tensor(1.5, dtype=dtype)), dtype
        self.whole = nn.ModuleDict({"net": self.net})
        self.whole.scale = self.scale
        if sharded:
            fully_shard(self.net, mesh=line())
        self.opt = make([{"params": list(self.net.parameters())}, {"params": [self.scale], "lr": 1e-2}])

    def train(self, steps: range) -> None:
        """The same data on every rank, so that their mean has the bits of one process."""
        for step in steps:
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(self.dtype)
            (self.net(x) * self.scale).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()

    def values(self) -> list[Tensor]:
        return [full(p.detach()).clone() for p in self.whole.parameters()]

    def slots(self) -> list[Tensor]:
        state = (self.opt.state[p] for g in self.opt.param_groups for p in g["params"])
        return [full(s[name]) for s in state for name in sorted(s)]

    def saved(self, options: StateDictOptions) -> dict:
        optimizer = get_optimizer_state_dict(self.whole, self.opt, options=options)
        return {"model": get_model_state_dict(self.whole, options=options), "optimizer": optimizer}

    def load(self, state: dict, options: StateDictOptions) -> None:
        set_model_state_dict(self.whole, state["model"], options=options)
        set_optimizer_state_dict(self.whole, self.opt, state["optimizer"], options=options)


def agrees_with_one_process(make: Callable, compare: Callable, _: Path) -> None:
    runs = [Run(make), Run(make, sharded=False)]
    for run in runs:
        run.train(range(3))
    compare(runs[0].values(), runs[1].values())
    assert any((a != b).any() for a, b in zip(runs[0].values(), Run(make).values(), strict=True))
    here = runs[0].scale.detach()
    there = [torch.zeros_like(here) for _ in range(RANKS)]
    dist.all_gather(there, here)
    assert all(torch.equal(here, t) for t in there), "ranks measured different coefficients"


def resumes_bitwise(
    make: Callable, flat: bool, dtype: torch.dtype, folder: Path, sharded: bool = True, at: int = 0
) -> None:
    """at: the step whose layout of state is asked for; 0: torch makes the first one's."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, stopped, resumed = (Run(make, sharded, dtype) for _ in range(3))
    straight.train(range(5))
    stopped.train(range(3))
    dcp.save(stopped.saved(options), checkpoint_id=folder)
    with torch.no_grad():
        for p in resumed.whole.parameters():
            p.add_(1.0)
    before = resumed.values()
    if at:
        resumed.opt.init_state(step=at)
    state = resumed.saved(options)  # else torch makes a dummy step: zero gradients, lr 0
    equal(before, resumed.values())
    dcp.load(state, checkpoint_id=folder)
    resumed.load(state, options)
    assert float(resumed.opt.param_groups[0]["clock"]) == 3.0
    resumed.train(range(3, 5))
    assert float(resumed.opt.param_groups[0]["clock"]) == 5.0
    equal(straight.values(), resumed.values())
    equal(straight.slots(), resumed.slots())
    assert straight.opt.state[straight.net.idle], "a parameter without a gradient has no slots to save"


def hidden(params: Iterable[Tensor], **given: Any) -> gradkit.Optimizer:
    """SCALE of hidden matrices alone, or with a density FRUGAL of them."""
    return (gradkit.FRUGAL if given else gradkit.SCALE)([{"params": params, "role": "matrix"}], **given)


def a_file_of_other_tensors_is_missed(make: Callable, folder: Path) -> None:
    """Without `init_state` torch asks the file for what the first step selects."""
    options = StateDictOptions()
    stopped, resumed = Run(make), Run(make)
    stopped.train(range(3))
    dcp.save(stopped.saved(options), checkpoint_id=folder)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.state\..*low_"):
        dcp.load(resumed.saved(options), checkpoint_id=folder)


def resumes_bitwise_in_one_process_and_back(_: Path) -> None:
    options = StateDictOptions(full_state_dict=True)
    straight, part, alone, back = (Run(gradkit.AdamW, sharded) for sharded in (True, True, False, True))
    straight.train(range(6))
    part.train(range(2))
    alone.load(part.saved(options), options)
    alone.train(range(2, 4))
    back.load(alone.saved(options), options)
    back.train(range(4, 6))
    equal(straight.values(), back.values())


def takes_over_from_torch(_: Path) -> None:
    old, new = Run(torch.optim.AdamW), Run(gradkit.AdamW)
    old.train(range(2))
    new.opt.load_state_dict(old.opt.state_dict())
    set_model_state_dict(new.whole, get_model_state_dict(old.whole))
    for run in (old, new):
        run.train(range(2, 4))
    near(old.values(), new.values())


def ring_slots_stay_sharded_at_their_dtype(_: Path) -> None:
    def make() -> tuple[gradkit.Optimizer, nn.Parameter]:
        p = nn.Parameter(shard(torch.randn(7, 3).bfloat16(), Shard(0)))
        p.grad = torch.ones_like(p)
        return gradkit.Grokfast([p], filter="ma", window=3, state_dtype=torch.float32, rounding="kahan"), p

    (old, _p), (new, q) = make(), make()
    old.step()
    new.load_state_dict(old.state_dict())
    new.step()
    for name, slot in new.state[q].items():
        if name in ("step", "filter_step"):
            continue
        assert isinstance(slot, DTensor), name
        ring = name == "grad_ring"
        assert slot.shape == ((3, 7, 3) if ring else (7, 3)), name
        assert tuple(slot.placements) == (Shard(1 if ring else 0),), name
        assert slot.dtype == slot.to_local().dtype == (torch.bfloat16 if name == "compensation" else torch.float32), (
            name
        )


def writes_back_the_bits_of_one_process(rounding: str, backend: str, _: Path) -> None:
    torch.manual_seed(3)
    start = [torch.randn(7, 4).bfloat16(), torch.randn(5, 6).bfloat16(), torch.randn(1).bfloat16()]
    grads = [[torch.randn_like(t) for t in start] for _ in range(3)]
    plain = [nn.Parameter(t.clone()) for t in start]
    split = [nn.Parameter(shard(t, where)) for t, where in zip(start, (Shard(0), Shard(1), Shard(0)), strict=True)]
    for params in (plain, split):
        opt = gradkit.AdamW(params, lr=1e-3, rounding=rounding, backend=backend, seed=5)
        for now in grads:
            for p, g in zip(params, now, strict=True):
                p.grad = shard(g, p.placements[0]) if isinstance(p, DTensor) else g.clone()
            opt.step()
    equal([p.detach() for p in plain], [full(p.detach()) for p in split])
    assert not torch.equal(plain[0], start[0])


def counts_are_those_of_one_process(_: Path) -> None:
    runs = [Run(partial(gradkit.StableSPAM, transforms=[clip_by_value(0.05)]), sharded) for sharded in (True, False)]
    seen = []
    for run in runs:
        run.opt.stats(every=3)
        run.train(range(3))
        seen.append(run.opt.stats())
    for name, one in seen[1].items():
        assert seen[0][name] == pytest.approx(one, rel=1e-5, abs=1e-12), name
    assert any(0 < one["clip_by_value.clipped"] < 1 for one in seen[1].values())


def all_cases() -> Iterator[tuple[str, Callable[[Path], None]]]:
    sums = {"lr": 1e-2, "transforms": [clip_by_global_norm(0.1), clip_by_norm(0.05), cautious()]}
    elementwise = {"lr": 1e-2, "transforms": [clip_by_value(0.05), cautious()], "weight_decay": 0.1}
    largest = {"lr": 1e-2, "transforms": [clip_by_global_norm(0.01, norm_type=float("inf"))]}
    rows = {"lr": 1e-2, "eps": 1e-2, "transforms": [adaptive_clip(0.05)]}  # an eps that shows a gradient's size
    scores = {"lr": 1e-2, "transforms": [zclip(warmup_steps=2, z_thresh=0.3)]}
    for backend in BACKENDS:
        for name, make in OPTIMIZERS.items():
            for kind, how, compare in (("sums", sums, near), ("elementwise", elementwise, equal)):
                one = partial(make, **how, backend=backend)
                yield (
                    f"agrees_with_one_process {name} {kind} {backend}",
                    partial(agrees_with_one_process, one, compare),
                )
        for kind, how, compare in (("largest", largest, equal), ("zclip", scores, near), ("rows", rows, near)):
            one = partial(gradkit.AdamW, **how, backend=backend)
            yield f"agrees_with_one_process AdamW {kind} {backend}", partial(agrees_with_one_process, one, compare)
        for rounding in ("stochastic", "kahan"):
            case = partial(writes_back_the_bits_of_one_process, rounding, backend)
            yield f"writes_back_the_bits_of_one_process {rounding} {backend}", case
        case = partial(gradients.rank_without_a_gradient_holds_up_none, backend)
        yield f"rank_without_a_gradient_holds_up_none {backend}", case
    ring = {"lr": 1e-2, "transforms": [grokfast_ma(window=2, name="slow"), clip_by_norm(0.1)]}
    kinds = [("AdamW", False), *((name, True) for name in OPTIMIZERS if name not in ("Lion", "Grokfast", "FRUGAL"))]
    for name, flat in kinds:  # Lion and Grokfast have no kind of slot that these lack
        case = partial(resumes_bitwise, partial(OPTIMIZERS[name], **ring), flat, torch.float32)
        yield f"resumes_bitwise {name} {'flat' if flat else 'nested'}", case
    for flat in (True, False):
        one = partial(resumes_bitwise, frugal, flat, torch.float32, at=3)
        yield f"resumes_bitwise FRUGAL blocks {'flat' if flat else 'nested'}", one
        early = partial(gradkit.AdamW, lr=1e-2, transforms=[zclip(warmup_steps=4, max_grad_norm=0.3)])
        yield f"resumes_bitwise zclip {flat}", partial(resumes_bitwise, early, flat, torch.float32)
    how = {"lr": 1e-2, "weight_decay": 0.1, "decay": "independent", "transforms": [clip_by_global_norm(0.1)]}
    yield "resumes_bitwise independent", partial(resumes_bitwise, partial(gradkit.AdamW, **how), True, torch.float32)
    for rounding in ("stochastic", "kahan"):
        case = partial(resumes_bitwise, partial(gradkit.AdamW, rounding=rounding), True, torch.bfloat16)
        yield f"resumes_bitwise {rounding}", case
    for norm_type in (2.0, float("inf")):
        yield (
            f"nan_on_one_rank_reaches_all {norm_type}",
            partial(gradients.nan_on_one_rank_reaches_all, norm_type),
        )
    for split in ("blocks", "columns", "randk"):  # columns and entries are as many in each turn: any layout will do
        for at in (0, 3) if split != "blocks" else (3,):
            one = partial(resumes_bitwise, partial(frugal, split=split), at > 0, torch.float32, sharded=False, at=at)
            yield f"resumes_bitwise FRUGAL {split} plain {at}", one
        if split != "blocks":
            one = partial(selections.parts_of_plain_tensors_are_selected_as_in_one_process, split)
            yield f"parts_of_plain_tensors_are_selected_as_in_one_process {split}", one
    rows = partial(selections.parts_of_plain_tensors_are_selected_as_in_one_process, "rows")
    yield "parts_of_plain_tensors_are_selected_as_in_one_process rows", rows
    yield "a_file_of_other_tensors_is_missed", partial(a_file_of_other_tensors_is_missed, frugal)
    for backend in BACKENDS:
        for base in ("adamw", "lion"):
            one = partial(selections.whole_tensors_are_selected_as_in_one_process, {"base": base, "backend": backend})
            yield f"whole_tensors_are_selected_as_in_one_process {base} {backend}", one
    for original in (True, False):
        one = partial(selections.flat_parameters_are_selected_whole_or_refused, original)
        yield f"flat_parameters_are_selected_whole_or_refused {original}", one
    for name, make in (("SCALE", hidden), ("FRUGAL", partial(hidden, density=0.0))):
        one = partial(selections.an_optimizer_without_state_is_saved_again_as_it_was_loaded, make)
        yield f"an_optimizer_without_state_is_saved_again_as_it_was_loaded {name}", one
    for law in (
        resumes_bitwise_in_one_process_and_back,
        takes_over_from_torch,
        ring_slots_stay_sharded_at_their_dtype,
        counts_are_those_of_one_process,
        *attached.LAWS,
        *gradients.LAWS,
        *selections.LAWS,
        *losses.LAWS,
        *units.LAWS,
    ):
        yield law.__name__, law


CASES = dict(all_cases())
