"""At size: the naive float64 references where elements are sampled, and gradkit's eager in every element.

The references are numpy on the host, independent of gradkit and slow: an elementwise chain is followed where it is
sampled, at both ends of every tensor and between, and a chain with a measure or a split in all elements. The rest is
bits: the elements between the samples are eager's own, which runs the rules as plain torch and knows no block or chunk.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import gradkit
from bench.shapes import GPT2, RESNET50, Shape
from tests.cases import BY_NAME, CASES, Case
from tests.runs import ran_on
from tests.scenarios import LR, SHAPES
from tests.tolerance import assert_equal, assert_follows, tolerance

from .checks import rows
from .place import Place, give, parameters

STEPS = 3
DECAY = 0.1
ENDS = 64
FIVE = [BY_NAME[name] for name in ("adamw", "lion", "diffgrad", "ademamix", "grokfast_adam")]
LOW = {
    "bf16": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bf16 Kahan": (torch.bfloat16, {"rounding": "kahan"}),
}
REST = {"fp16": (torch.float16, {}), "bf16 slots": (torch.float32, {"state_dtype": torch.bfloat16})}
SAME = [case for case in FIVE if case.exact]  # elsewhere a last bit in float32 is a last bit of such a slot


def measures(case: Case) -> bool:
    """Whether a chain of it forms sums."""
    explained = case.optimizer([torch.zeros(s, requires_grad=True) for s in SHAPES], backend="eager").explain()
    return explained.count("  pass ") > explained.count("  chain: ")


def splits(case: Case) -> bool:
    """Whether it selects: a sample of a tensor isn't a tensor then."""
    p = torch.zeros(2, 2, requires_grad=True)
    return any(batch.program.split for batch in case.optimizer([p], backend="eager").batches([p]))


SPLIT = [case for case in CASES if splits(case)]
MEASURED = [case for case in CASES if measures(case)]
ELEMENTWISE = [case for case in CASES if case not in SPLIT and not measures(case)]
BY_LINES = [case for case in SPLIT if case.name != "spam_density"]  # single entries take the reference hours to select
FRUGAL = BY_NAME["frugal_columns"]


class Sample:
    """Some elements of every tensor: both ends and, between them, any."""

    def __init__(self, place: Place, params: Sequence[Tensor]):
        generator = torch.Generator(place.device).manual_seed(2)
        self.at = []
        for p in params:
            n = p.numel()
            ends = torch.arange(min(n, 2 * ENDS), device=place.device)
            ends = torch.where(ends < ENDS, ends, n - 1 - (ends - ENDS))
            between = torch.randint(n, (min(n, place.sampled),), generator=generator, device=place.device)
            self.at.append(torch.cat([ends, between]))

    def __call__(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Of all tensors in one row, in float64."""
        taken = [t.detach().flatten()[at] for t, at in zip(tensors, self.at, strict=True)]
        return torch.cat(taken).double().cpu().numpy()


def grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params]


@rows(
    {f"{case.name}, ResNet-50": (case, RESNET50) for case in ELEMENTWISE}
    | {f"{case.name}, GPT-2": (case, GPT2) for case in FIVE}
)
def test_sampled_elements_follow_the_naive_reference(place: Place, case: Case, model: Shape) -> None:
    params = parameters(place, place.shapes(model))
    sample = Sample(place, params)
    optimizer = case.optimizer(params, lr=LR, weight_decay=DECAY, decay="decoupled", backend=place.backend)
    assert ran_on(optimizer) == {place.backend}
    run = case.run([sample(params)], weight_decay=DECAY, mode="decoupled")
    ours, theirs = [sample(params)], [sample(params)]
    for t in range(STEPS):
        give(params, t)
        optimizer.step()
        ours.append(sample(params))
        theirs += run.step([sample(grads(params))], LR, LR)
    assert not np.array_equal(ours[0], ours[-1])
    assert_follows(ours, theirs, tolerance("reference", torch.float32))


@rows({case.name: (case,) for case in (*MEASURED, *BY_LINES)})
def test_all_elements_follow_the_naive_reference_of_sums_and_splits(place: Place, case: Case) -> None:
    params = parameters(place, place.shapes(RESNET50))

    def whole(tensors: Sequence[Tensor]) -> list[np.ndarray]:
        return [t.detach().double().cpu().numpy() for t in tensors]

    optimizer = case.optimizer(params, lr=LR, weight_decay=DECAY, decay="decoupled", backend=place.backend)
    assert ran_on(optimizer) == {place.backend}
    run = case.run(whole(params), weight_decay=DECAY, mode="decoupled")
    ours, theirs = [whole(params)], [whole(params)]
    for t in range(2):
        give(params, t)
        optimizer.step()
        ours.append(whole(params))
        theirs.append(run.step(whole(grads(params)), LR, LR))
    for mine, wanted in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert not np.array_equal(mine[0], mine[-1])
        assert_follows(mine, wanted, tolerance("reference", torch.float32))


@rows(
    {f"{case.name}, ResNet-50": (case, RESNET50, torch.float32, {}) for case in CASES}
    | {f"{case.name}, ResNet-50, {name}": (case, RESNET50, *stored) for case in FIVE for name, stored in LOW.items()}
    | {f"{case.name}, ResNet-50, {name}": (case, RESNET50, *stored) for case in SAME for name, stored in REST.items()}
    | {f"{case.name}, ResNet-50, bf16": (case, RESNET50, *LOW["bf16"]) for case in MEASURED}
    | {f"{case.name}, GPT-2": (case, GPT2, torch.float32, {}) for case in FIVE}
    | {f"{case.name}, GPT-2, bf16": (case, GPT2, *LOW["bf16"]) for case in FIVE}
)
def test_every_element_is_eagers(place: Place, case: Case, model: Shape, dtype: torch.dtype, options: dict) -> None:
    assert_eagers(place, case, place.shapes(model), dtype, options)


def assert_eagers(place: Place, case: Case, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, options: dict):
    """Parameters and slots after some steps: the same bits, or close where a sum or a polynomial is involved."""
    runs = []
    for backend in (place.backend, "eager"):
        params = parameters(place, shapes, dtype)
        optimizer = case.optimizer(params, lr=LR, weight_decay=DECAY, backend=backend, **options)
        assert ran_on(optimizer) == {backend}
        sample = Sample(place, params)
        seen = [sample(params)]
        for t in range(STEPS):
            give(params, t)
            optimizer.step()
            seen.append(sample(params))
        runs.append((params, optimizer, seen))
    (params, optimizer, ours), (wanted, other, theirs) = runs
    assert not np.array_equal(ours[0], ours[-1])
    if not case.exact:
        return assert_follows(ours, theirs, tolerance("backends", dtype, place.backend))
    for i, (p, q) in enumerate(zip(params, wanted, strict=True)):
        assert_equal(p.detach(), q.detach(), f"parameter {i}")
        for name, slot in other.state[q].items():
            assert_equal(optimizer.state[p][name], slot, f"{name} of parameter {i}")


@rows(
    {kind: (kind, torch.float32, {}) for kind in ("columns", "rows", "randk")}
    | {f"randk, {name}": ("randk", *stored) for name, stored in LOW.items()}
)
def test_every_element_is_eagers_when_another_part_is_selected(
    place: Place, kind: str, dtype: torch.dtype, options: dict
) -> None:
    case = replace(FRUGAL, arguments={**FRUGAL.arguments, "split": kind, "update_gap": STEPS - 1})
    assert_eagers(place, case, place.shapes(RESNET50), dtype, options)


@rows({f"{case.name}, {name}": (case, *stored) for case in FIVE for name, stored in LOW.items()})
def test_what_is_stored_is_the_reference_within_a_unit(place: Place, case: Case, dtype: torch.dtype, options: dict):
    """Each step from what was stored: the reference's slots are its own, its parameters are ours."""
    params = parameters(place, place.shapes(RESNET50), dtype)
    sample = Sample(place, params)
    optimizer = case.optimizer(params, lr=LR, weight_decay=0.0, backend=place.backend, **options)
    assert ran_on(optimizer) == {place.backend}
    rounding = options.get("rounding", "nearest")

    def held() -> np.ndarray:
        values = sample(params)
        return values + sample([optimizer.state[p]["compensation"] for p in params]) if rounding == "kahan" else values

    optimizer.init_state()
    run = case.run([held()])
    for t in range(STEPS):
        before = held()
        run.params = [before]
        give(params, t)
        optimizer.step()
        (wanted,) = run.step([sample(grads(params))], LR, LR)
        assert not np.array_equal(before, held())
        assert_follows([before, held()], [before, wanted], tolerance(rounding, dtype))


@rows({"AdamW": (gradkit.AdamW,), "Lion": (gradkit.Lion,)})
def test_two_groups_in_one_launch_have_their_own_numbers(place: Place, made: type[gradkit.Optimizer]) -> None:
    runs = []
    for backend in (place.backend, "eager"):
        params = parameters(place, place.shapes(RESNET50))
        groups = [{"params": params[::2], "lr": 0.01, "weight_decay": 0.3}, {"params": params[1::2], "lr": 0.1}]
        optimizer = made(groups, weight_decay=0.1, backend=backend)
        for t in range(STEPS):
            give(params, t)
            optimizer.param_groups[1]["lr"] *= 0.5
            optimizer.step()
        assert ran_on(optimizer) == {backend} and optimizer.explain().count("  chain:") == 1
        runs.append(params)
    for i, (p, q, first) in enumerate(zip(*runs, parameters(place, place.shapes(RESNET50)), strict=True)):
        assert not torch.equal(p, first)
        assert_equal(p.detach(), q.detach(), f"parameter {i}")
