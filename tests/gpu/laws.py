"""What a step may do on a device: launches, copies, waiting; a scaler's skips; going on from a file."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gradkit
from bench.shapes import RESNET50
from gradkit.transforms import clip_by_global_norm, clip_by_norm, grokfast_ma
from tests.runs import ran_on
from tests.scenarios import LR
from tests.tolerance import assert_equal

from .checks import rows
from .place import Place, give, parameters

Make = Callable[..., gradkit.Optimizer]


def with_links(*links: Any) -> Make:
    return lambda params, **given: gradkit.AdamW(params, transforms=list(links), **given)


# how it is made, how many sums it forms, the parameters' dtype and options
CHAINS = {
    "AdamW": (gradkit.AdamW, 0, torch.float32, {}),
    "Lion, bf16 stochastic": (gradkit.Lion, 0, torch.bfloat16, {"rounding": "stochastic"}),
    "AdamW, bf16 Kahan": (gradkit.AdamW, 0, torch.bfloat16, {"rounding": "kahan"}),
    "AdamW behind a window": (with_links(grokfast_ma(window=3)), 0, torch.float32, {}),
    "AdamW behind a global clip": (with_links(clip_by_global_norm(1.0)), 1, torch.float32, {}),
    "AdamW behind two clips": (with_links(clip_by_global_norm(1.0), clip_by_norm(0.1)), 2, torch.bfloat16, {}),
}


@rows({f"{name}, {size} tensors": (size, *chain) for name, chain in CHAINS.items() for size in ("few", "many")})
def test_a_step_is_one_launch_and_one_for_each_sum(
    place: Place, size: str, make: Make, sums: int, dtype: torch.dtype, options: dict
) -> None:
    params = parameters(place, [(5 + i % 7, 11) for i in range(place.tensors[size])], dtype)
    optimizer = make(params, lr=LR, backend=place.backend, **options)
    assert ran_on(optimizer) == {place.backend} and f"  launches: {1 + sums};" in optimizer.explain()
    give(params, 0)
    for _ in range(2):  # compiles, and the profiler's own first time
        place.queued(optimizer.step)
    for t in (0, 1, 2):  # the same gradients as before, and others
        if t:
            give(params, t)
        queued = place.queued(optimizer.step)
        assert dict(queued) == {"kernels": 1 + sums, "copies": 1}, queued


@rows(CHAINS)
def test_no_step_waits_for_the_device(place: Place, make: Make, _: int, dtype: torch.dtype, options: dict) -> None:
    params = parameters(place, place.shapes(RESNET50), dtype)
    optimizer = make(params, lr=LR, backend=place.backend, **options)
    assert ran_on(optimizer) == {place.backend}
    give(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    for t in range(1, 4):
        give(params, t)  # other addresses
        optimizer.param_groups[0]["lr"] = LR / t
        with place.unsynchronised():
            optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def trained(place: Place, backend: str, dtype: torch.dtype) -> tuple[list[Tensor], gradkit.Optimizer, list[float]]:
    """A small network in autocast under a scaler that begins far too high -> parameters, optimizer, scales."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.LayerNorm(256), torch.nn.Linear(256, 8))
    model = torch.nn.Sequential(*layers).to(place.device)
    inputs, targets = torch.randn(128, 64, device=place.device), torch.randn(128, 8, device=place.device)
    optimizer = gradkit.AdamW(model.parameters(), lr=1e-3, transforms=[clip_by_global_norm(1e9)], backend=backend)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**24, growth_interval=5)
    scales = []
    for _ in range(20):
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        with torch.autocast(place.device.type, dtype):
            loss = (model(inputs).float() - targets).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return list(model.parameters()), optimizer, scales


def test_under_autocast_and_a_scaler_a_run_is_eagers(place: Place) -> None:
    """The clip is never reached: its coefficient is 1, and no sum shows in the bits."""
    params, optimizer, scales = trained(place, place.backend, torch.float16)
    wanted, other, others = trained(place, "eager", torch.float16)
    assert ran_on(optimizer) == {place.backend} and ran_on(other) == {"eager"}
    skipped = sum(b < a for a, b in zip(scales, scales[1:], strict=False))
    assert scales == others and 0 < skipped < len(scales) - 5, scales
    steps = float(optimizer.param_groups[0]["clock"])
    assert steps == float(other.param_groups[0]["clock"]) and len(scales) - skipped - 1 <= steps < len(scales)
    for i, (p, q) in enumerate(zip(params, wanted, strict=True)):
        assert p.isfinite().all()
        assert_equal(p.detach(), q.detach(), f"parameter {i}")


def begun(place: Place, backend: str, make: Make, dtype: torch.dtype, options: dict) -> tuple[list, Any]:
    params = parameters(place, [(40, 30), (7,), (4097,), ()], dtype)
    return params, make(params, lr=LR, weight_decay=0.1, backend=backend, **options)


def go(params: Sequence[Tensor], optimizer: gradkit.Optimizer, steps: range) -> None:
    for t in steps:
        give(params, t)
        optimizer.step()


@rows(CHAINS)
def test_going_on_from_a_file_is_going_on(
    place: Place, make: Make, sums: int, dtype: torch.dtype, options: dict
) -> None:
    """In the same backend, and in eager where no sum is formed: what is stored belongs to no backend."""
    params, optimizer = begun(place, place.backend, make, dtype, options)
    go(params, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    go(params, optimizer, range(4, 8))
    for backend in (place.backend, "eager") if sums == 0 else (place.backend,):
        others, other = begun(place, backend, make, dtype, options)
        file.seek(0)
        held = torch.load(file, weights_only=True)
        for p, x in zip(others, held["params"], strict=True):
            p.data.copy_(x)
        other.load_state_dict(held["optimizer"])
        go(others, other, range(4, 8))
        assert ran_on(other) == {backend}
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert_equal(p.detach(), q.detach(), f"parameter {i}, gone on in {backend}")
            for name, slot in optimizer.state[p].items():
                assert_equal(slot, other.state[q][name], f"{name} of parameter {i}, gone on in {backend}")
