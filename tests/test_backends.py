"""Every backend against eager: in every bit where neither sums nor polynomials are involved, else within the table."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradkit
from gradkit import transforms as tx
from tests.cases import BY_NAME, CASES, DECAYS
from tests.runs import ran_on, replay
from tests.tolerance import assert_equal, assert_follows, tolerance

OTHERS = ("chunked", "native")
SMALL = ((0,), (1,), (63,), (64,), (65,), (), (3, 0, 2))
AROUND_A_BLOCK = ((65535,), (65536,), (65537,), (131073,))
EXACT = [c.name for c in CASES if c.exact]
INEXACT = [c.name for c in CASES if not c.exact]


class Storage(NamedTuple):
    """How parameters and slots are kept."""

    dtype: torch.dtype
    options: dict[str, Any] = {}

    def __str__(self) -> str:
        return "-".join(str(x).removeprefix("torch.") for x in (self.dtype, *self.options.values()))


BF16, FP16 = torch.bfloat16, torch.float16
STORAGES = (
    Storage(torch.float32),
    Storage(torch.float64),
    Storage(torch.float32, {"state_dtype": BF16}),
    Storage(torch.float64, {"state_dtype": torch.float32}),
    *(Storage(dtype, {"rounding": how}) for dtype in (BF16, FP16) for how in ("nearest", "stochastic", "kahan")),
    Storage(BF16, {"rounding": "stochastic", "state_dtype": BF16, "seed": 7}),
    Storage(FP16, {"rounding": "kahan", "state_dtype": FP16}),
)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def hostile(like: torch.Tensor, t: int) -> torch.Tensor:
    """A gradient with everything in it that is not a plain number."""
    g = torch.randn(like.shape).to(like.dtype)
    odd = torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 1e6, 1e-7])
    if g.numel() > 60 and t == 1:
        g.view(-1)[5 : 5 + len(odd)] = odd.to(like.dtype)
    return g


def run(
    make: Any, start: list[torch.Tensor], grads: list[list[Any]], backend: str, **options: Any
) -> dict[str, torch.Tensor]:
    """What is left after the steps: parameters and all state, by name."""
    params = [p.clone().requires_grad_() for p in start]
    optimizer = make(params, lr=0.05, backend=backend, **options)
    # stochastic rounding, and a selection, count elements in logical order
    logical = optimizer.defaults["rounding"] == "stochastic" or "  split: " in optimizer.explain()
    detour = {"eager"} if logical and any(not p.is_contiguous() for p in params) else set()
    assert ran_on(optimizer) == {backend} | detour
    replay(optimizer, params, grads, [0.05, 0.02, 0.1, 0.1][: len(grads)])
    left = {f"parameter {i} {tuple(p.shape)}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        left |= {f"{name} of parameter {i} {tuple(p.shape)}": s for name, s in optimizer.state[p].items()}
    return left


def assert_backends_agree(name: str, shapes: Any, storage: Storage, decay: str, steps: int) -> None:
    torch.manual_seed(0)
    start = [torch.randn(s).to(storage.dtype) for s in shapes]
    start += [channels_last((2, 3, 5, 4), storage.dtype)]
    grads = [[hostile(p, t) for p in start] for t in range(steps)]
    grads[-1][-1] = grads[-1][-1].contiguous(memory_format=torch.channels_last)
    options = {"decay": decay, "weight_decay": 0.3, **storage.options}
    theirs = run(BY_NAME[name].optimizer, start, grads, "eager", **options)
    assert all(theirs[f"parameter {i} {tuple(p.shape)}"].ne(p).any() for i, p in enumerate(start) if p.numel() > 1)
    for backend in OTHERS:
        ours = run(BY_NAME[name].optimizer, start, grads, backend, **options)
        assert ours.keys() == theirs.keys()
        for what, value in ours.items():
            assert_equal(value, theirs[what], f"{backend}, {what}, decay {decay}")


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_every_storage_and_decay_is_eager_in_every_bit(name, storage):
    for decay in DECAYS:
        assert_backends_agree(name, SMALL, storage, decay, steps=4)


@pytest.mark.parametrize("storage", STORAGES[:3] + STORAGES[-2:], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_a_chain_without_sums_and_polynomials_is_eager_in_every_bit(name, storage):
    for decay in ("l2", "cautious"):
        assert_backends_agree(name, SMALL, storage, decay, steps=4)


@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[5]], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "grokfast_adam_window"])
def test_tensors_that_do_not_fill_their_last_block_are_eager_in_every_bit(name, storage):
    assert_backends_agree(name, AROUND_A_BLOCK, storage, "cautious", steps=2)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "storage", [s for s in STORAGES if not s.options or s.options == {"rounding": "nearest"}], ids=str
)
@pytest.mark.parametrize("name", INEXACT)
def test_sums_and_polynomials_stay_within_the_table(name, storage, backend):
    torch.manual_seed(0)
    many = 65537 if storage.dtype == torch.float32 else 129  # two blocks: reductions do not know the storage
    start = [torch.randn(s).to(storage.dtype) for s in ((1,), (65,), (many,), (0,))]
    start += [channels_last((2, 3, 5, 4), storage.dtype)]
    grads = [[torch.randn(p.shape).to(p.dtype) for p in start] for _ in range(3)]
    relative = tolerance("backends", storage.dtype, backend)
    for decay in ("decoupled", "l2"):
        histories = []
        for which in (backend, "eager"):
            params = [p.clone().requires_grad_() for p in start]
            made = BY_NAME[name].optimizer(params, lr=0.05, backend=which, decay=decay, weight_decay=0.3)
            histories.append(replay(made, params, grads, backend=which))
        for ours, theirs in zip(*histories, strict=True):
            assert_follows([x.double().numpy() for x in ours], [x.double().numpy() for x in theirs], relative)
            assert theirs[0].numel() < 2 or not torch.equal(theirs[0], theirs[-1])


@pytest.mark.parametrize("backend", ("eager", *OTHERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_the_number_of_threads_changes_no_bit(dtype, backend):
    """Nine blocks of 64K elements: enough for two threads, in measures and in the apply."""
    torch.manual_seed(0)
    start = [torch.randn(530_000).to(dtype), torch.randn(70_000).to(dtype)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(2)]

    # torch's own sigmoid changes last bits with the number of threads: eager and chunked go without
    cls = gradkit.DiffGrad if backend == "native" else gradkit.AdamW

    def make(params: Any, **options: Any) -> gradkit.Optimizer:
        return cls(params, transforms=[tx.clip_by_global_norm(1.0), tx.clip_by_norm(0.5)], **options)

    before, left = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            left.append(run(make, start, grads, backend, weight_decay=0.1))
    finally:
        torch.set_num_threads(before)
    for what, value in left[0].items():
        assert_equal(value, left[1][what], what)


@pytest.mark.parametrize("backend", ("eager", *OTHERS))
def test_the_order_and_company_of_tensors_changes_no_bit(backend):
    """An elementwise chain gives a tensor the same, alone or among others, whatever block it is in."""
    torch.manual_seed(0)
    start = [torch.randn(n).to(BF16) for n in (70_001, 5, 64)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(2)]
    together = run(gradkit.AdEMAMix, start, grads, backend, decay="cautious", weight_decay=0.1)
    for i, p in enumerate(start):
        alone = run(gradkit.AdEMAMix, [p], [[row[i]] for row in grads], backend, decay="cautious", weight_decay=0.1)
        shape = tuple(p.shape)
        assert_equal(alone[f"parameter 0 {shape}"], together[f"parameter {i} {shape}"], f"parameter {i}")


GRAD_LINKS = {
    "clip_by_value": lambda: tx.clip_by_value(0.5, name="cut"),
    "grokfast_ema": lambda: tx.grokfast_ema(0.9, 2.0, init="zero", name="slow"),
    "grokfast_ma": lambda: tx.grokfast_ma(2, 3.0, name="recent"),
}
CLASSES = (gradkit.AdamW, gradkit.Lion, gradkit.AdEMAMix, gradkit.Grokfast)
SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=SHAPES,
    cls=st.sampled_from(CLASSES),
    links=st.lists(st.sampled_from(sorted(GRAD_LINKS)), unique=True),
    storage=st.sampled_from(STORAGES),
    decay=st.sampled_from(DECAYS),
    maximize=st.booleans(),
    backend=st.sampled_from(OTHERS),
    absent=st.integers(0, 5),
)
def test_any_chain_over_any_shapes_is_eager_in_every_bit(shapes, cls, links, storage, decay, maximize, backend, absent):
    torch.manual_seed(len(shapes))
    start = [torch.randn(s).to(storage.dtype) for s in shapes]
    grads: list[list[Any]] = [[torch.randn_like(p) for p in start] for _ in range(3)]
    grads[absent % 3][absent % len(start)] = None
    if all(g is None for g in grads[0]):
        grads[0] = [torch.ones_like(p) for p in start]
    transforms = [GRAD_LINKS[n]() for n in links]
    options = {"decay": decay, "weight_decay": 0.2, "maximize": maximize, "transforms": transforms, **storage.options}
    theirs = run(cls, start, grads, "eager", **options)
    for what, value in run(cls, start, grads, backend, **options).items():
        assert_equal(value, theirs[what], what)


def test_auto_is_native_and_says_so():
    params = [torch.ones(3, requires_grad=True)]
    assert ran_on(gradkit.Lion(params)) == {"native"}
    for backend in ("eager", *OTHERS):
        assert ran_on(gradkit.Lion(params, backend=backend)) == {backend}
