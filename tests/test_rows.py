"""Measures of rows: every layout, cuts inside rows and between them, and what rules and measures do with them."""

import pytest
import torch

import gradkit
from gradkit import chain, measure, rule
from gradkit import transforms as tx
from gradkit.backends import csource
from gradkit.ops import absolute, maximum, sqrt, where
from tests.cases import BACKENDS
from tests.runs import ran_on
from tests.tolerance import tolerance

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def finish_rows(total, largest, mean, size):
    return sqrt(total), largest, mean * size


ALL_THREE = {"total": "sum", "largest": "max", "mean": "mean"}


@measure(scope="row", reduce=ALL_THREE, gives=("norm", "top", "usual"), finish=finish_rows)
def three(u, p):
    return u * u, absolute(u), absolute(p)


def finish_again(total, norm, coef):
    return total / maximum(norm, 1e-30) * coef


@measure(scope="row", reduce={"total": "sum"}, gives=("again",), finish=finish_again)
def of_what_was_scaled(u):
    return absolute(u)


def finish_tensor(total):
    return 1.0 / maximum(sqrt(total), 1e-30)


@measure(scope="tensor", reduce={"total": "sum"}, gives=("coef",), finish=finish_tensor)
def of_the_tensor(u):
    return u * u


@rule
def by_norm(u, norm, top, usual):
    return where(top > 1.5, u / norm, u) * usual


@rule
def by_both(u, again, coef):
    return u * again + coef * u


BOTH = chain(three, by_norm, of_the_tensor, of_what_was_scaled, by_both, name="both", size=2.0)


def expected(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """BOTH in float64, on the tensor as a matrix."""
    x, w = g.double(), p.double()
    if not x.numel():
        return x
    x, w = (t.reshape(len(t), -1) if g.dim() > 1 else t.reshape(1, -1) for t in (x, w))
    norm, top, usual = x.norm(dim=1, keepdim=True), x.abs().amax(1, keepdim=True), 2 * w.abs().mean(1, keepdim=True)
    u = torch.where(top > 1.5, x / norm, x) * usual
    coef = 1 / u.norm()
    again = u.abs().sum(1, keepdim=True) / norm * coef
    return (u * again + coef * u).reshape(g.shape)


def laid_out(kind: str, dtype: torch.dtype) -> torch.Tensor:
    shapes = {"vector": (7,), "scalar": (), "flat row": (1, 9), "column": (9, 1), "empty": (0, 3), "no row": (3, 0)}
    shapes |= {"matrix": (5, 13), "channels_last": (4, 3, 5, 2), "transposed": (6, 5), "cube": (3, 2, 4)}
    shapes |= {"many rows": (100, 700), "long rows": (3, csource.BLOCK * 2 + 5), "a long vector": (csource.BLOCK + 3,)}
    x = torch.randn(shapes[kind], generator=torch.Generator().manual_seed(len(kind))).to(dtype)
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return x.t().contiguous().t() if kind == "transposed" else x


KINDS = ("vector", "scalar", "flat row", "column", "matrix", "cube", "channels_last", "transposed", "many rows")
LONG = ("long rows", "a long vector")


def stepped(backend: str, kinds, dtype: torch.dtype, **options):
    """What one step of SGD at lr 1 subtracts, and what should be subtracted."""
    params = [laid_out(k, dtype).requires_grad_() for k in kinds]
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    optimizer = gradkit.Optimizer(params, BOTH, lr=1.0, backend=backend, **options)
    wanted = [p.detach().double() - expected(p.grad, p.detach()) for p in params]
    optimizer.step()
    return optimizer, params, wanted


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, *LONG])
def test_rows_are_the_slices_of_the_first_dimension(kind, dtype, backend):
    optimizer, (p,), (wanted,) = stepped(backend, [kind], dtype)
    relative = tolerance("reference", dtype)
    torch.testing.assert_close(p.detach().double(), wanted, rtol=relative, atol=relative)
    assert ran_on(optimizer) == {"eager" if kind == "transposed" else backend}
    assert ("its rows are not consecutive in memory" in optimizer.explain()) == (kind == "transposed")


@each_backend
def test_tensors_of_a_batch_keep_their_rows_apart(backend):
    kinds = [*KINDS, "empty", "no row", *LONG]
    _, params, wanted = stepped(backend, kinds, torch.float32)
    for kind, p, x in zip(kinds, params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), x, rtol=2e-5, atol=2e-5, msg=kind)


@each_backend
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_bf16_rows(rounding, backend):
    optimizer, params, wanted = stepped(backend, ["matrix", "many rows", "vector"], torch.bfloat16, rounding=rounding)
    assert ran_on(optimizer) == {backend}
    for p, x in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), x, rtol=2**-7, atol=2**-7)


@each_backend
def test_adaptive_clip_leaves_excluded_parameters_alone(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    clip = tx.adaptive_clip(clip=1e-3, exclude=("1.*", "*.bias"))
    optimizer = gradkit.Optimizer(model.named_parameters(), chain(clip), lr=1.0, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    clipped = [not torch.allclose(x, torch.ones_like(x)) for x in moved]
    assert clipped == [True, False, False, False]
    assert len(optimizer._plans["step"].batches) == 1 and len(optimizer._plans["step"].batches[0].table) == 2
    optimizer.param_groups[0]["adaptive_clip.excluded"] = True  # a whole group
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.allclose(b - 1.0, p.detach()) for b, p in zip(before, model.parameters(), strict=True))


def test_patterns_that_cannot_match_are_refused():
    model = torch.nn.Linear(4, 3)
    named, clip = list(model.named_parameters()), tx.adaptive_clip(exclude=("wieght",))
    with pytest.raises(ValueError, match="'wieght' matches no parameter; did you mean 'weight'?"):
        gradkit.AdamW(named, transforms=[clip])
    with pytest.raises(ValueError, match="needs names: give model.named_parameters()"):
        gradkit.AdamW(model.parameters(), transforms=[clip])
    with pytest.raises(TypeError, match="give a tuple"):
        tx.adaptive_clip(exclude="head.*")
    optimizer = gradkit.AdamW(named, transforms=[tx.adaptive_clip(exclude=("weight",))])
    optimizer.param_groups[0]["adaptive_clip.exclude"] = ("head",)
    model.weight.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="'head' matches no parameter"):
        optimizer.step()


def test_what_has_no_value_for_each_row_is_refused():
    p = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="use 'row', 'tensor' or 'all'"):
        measure(scope="rows", reduce={"x": "sum"}, gives=("y",), finish=finish_tensor)(by_norm.fn)
    with pytest.raises(ValueError, match="is kept of a tensor or of all"):
        measure(scope="row", reduce={"total": "sum"}, state=("s",), gives=("y",), finish=finish_tensor)(by_norm.fn)

    with pytest.raises(ValueError, match="of_the_tensor_again is over each tensor: 'norm' has a value for each row"):
        gradkit.Optimizer([p], chain(three, of_the_tensor_again, name="both", size=2.0, coef=1.0))


@measure(scope="tensor", reduce={"total": "sum"}, gives=("again",), finish=finish_again)
def of_the_tensor_again(u):
    return absolute(u)


@each_backend
def test_the_number_of_threads_changes_no_bit(backend):
    ends, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            ends.append(stepped(backend, ["many rows", *LONG], torch.float32)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
