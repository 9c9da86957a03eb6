"""Parameters of every supported dtype and layout, and those that are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.rows import (
    LR,
    assert_moved,
    assert_same,
    assert_same_numbers,
    everything,
    gradients,
    parameters,
    train,
    values,
)
from tests.tolerance import assert_equal

BF16, FP16 = torch.bfloat16, torch.float16
DECLARED_FLOAT32 = ("exp_avg_slow", "grad_head", "grad_tail")  # bfloat16 would lose their increments
LOW = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)


@LOW
def test_a_low_precision_parameter_has_float32_slots_and_follows_the_float32_run(make, dtype):
    """In one step a parameter may be off by the rounding of its write-back, and no more."""
    params = parameters(dtype)
    full = [p.detach().float().requires_grad_() for p in params]
    optimizer, exact = make(params), make(full)
    for t in range(3):
        rows = gradients(params, t)
        for p, q, g in zip(params, full, rows, strict=True):
            p.grad, q.grad = g, g.float()
            q.data.copy_(p.data)
        optimizer.step()
        exact.step()
        for p, q in zip(params, full, strict=True):
            torch.testing.assert_close(p.float(), q, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert {optimizer.state[p][n].dtype for p in params for n in make.row.slots} == {torch.float32}
    assert_moved(values(parameters(dtype)), values(params))
    assert all(p.dtype == dtype for p in params)


def test_float64_is_float64_throughout(make):
    params, single = parameters(torch.float64), parameters()
    optimizer = make(params)
    train(optimizer, params, range(4))
    train(make(single), single, range(4))
    assert {optimizer.state[p][n].dtype for p in params for n in make.row.slots} == {torch.float64}
    for p, q in zip(params, single, strict=True):
        off = (p - q).abs().max()
        assert 0 < off < 1e-4 * LR * 100 and not torch.equal(p.float().double(), p.detach())


def test_state_dtype_is_that_of_the_slots(make):
    params = parameters()
    optimizer = make(params, state_dtype=BF16)
    train(optimizer, params, range(2))
    for name in make.row.slots:
        kept = name in DECLARED_FLOAT32
        assert {optimizer.state[p][name].dtype for p in params} == {torch.float32 if kept else BF16}


def test_mixed_dtypes_may_share_a_group(make):
    kinds = (torch.float32, BF16, torch.float64)
    params = [p.detach().to(d).requires_grad_() for p, d in zip(parameters(), kinds, strict=True)]
    before = values(params)
    optimizer = make(params)
    train(optimizer, params, range(3))
    assert_moved(before, values(params))
    assert [optimizer.state[p][make.row.momentum].dtype for p in params] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]


def test_a_gradient_may_have_another_dtype_than_its_parameter(make):
    """float32 gradients of bf16 parameters, as master-gradient training has them; and again bf16 ones."""
    params, plain = parameters(BF16), parameters(BF16)
    optimizer, other = make(params), make(plain)
    for t in range(3):
        for p, q, g in zip(params, plain, gradients(params, t), strict=True):
            q.grad = g
            if t < 2:
                p.grad_dtype = torch.float32
                p.grad = g.float()
            else:
                p.grad = None
                p.grad_dtype = BF16
                p.grad = g
        assert params[0].grad.dtype == (torch.float32 if t < 2 else BF16)
        optimizer.step()
        other.step()
    assert_same(values(params), values(plain))
    assert_moved(values(parameters(BF16)), values(params))


def image_parameters() -> list[Tensor]:
    return parameters(shapes=((4, 3, 2, 5), (6,)))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("converted_at", [0, 2], ids=["from the start", "after two steps"])
def test_a_channels_last_parameter_moves_as_a_contiguous_one(make, converted_at):
    """Also one that is converted between steps, when its slots have the old layout."""
    params, plain = image_parameters(), image_parameters()
    optimizer, other = make(params), make(plain)
    for t in range(5):
        if t == converted_at:
            params[0].data = channels_last(params[0].data)
            params[0].grad = None
        for i, (p, g) in enumerate(zip(params, gradients(params, t), strict=True)):
            p.grad = channels_last(g) if i == 0 and t % 2 else g
        train(other, plain, [t])
        optimizer.step()
    assert params[0].is_contiguous(memory_format=torch.channels_last) and not params[0].is_contiguous()
    for name in make.row.slots - {"grad_ring"}:
        assert make.row.part or optimizer.state[params[0]][name].stride() == params[0].stride(), name
    assert_same_numbers(make.row, values(params), values(plain))


def test_a_whole_model_may_become_channels_last_and_double(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = make(model.parameters())
    images = torch.randn(2, 3, 6, 6)
    for convert in (lambda m: m, lambda m: m.to(memory_format=torch.channels_last), lambda m: m.double()):
        convert(model)
        before = values(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(images.to(next(model.parameters()).dtype)).square().sum().backward()
            optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    weight = model[0].weight
    slot = optimizer.state[weight][make.row.momentum]
    assert slot.dtype == torch.float64 and (make.row.part or slot.stride() == weight.stride())
    assert float(optimizer.param_groups[0]["clock"]) == 6


def transposed(x: Tensor) -> Tensor:
    return x.detach().t().contiguous().t().requires_grad_()


def strided(x: Tensor) -> Tensor:
    n, m = x.shape
    return torch.full((2 * n, 3 * m), 7.0)[::2, ::3].copy_(x.detach()).requires_grad_()


def overlapping(x: Tensor) -> Tensor:
    """With a dimension of length one, whose stride means nothing."""
    n, m = x.shape
    return torch.empty_strided((n, m), (m, 1)).copy_(x.detach()).as_strided((n, 1, m), (m, 999, 1)).requires_grad_()


@pytest.mark.parametrize("made", [transposed, strided, overlapping], ids=lambda f: f.__name__)
def test_a_parameter_that_is_not_contiguous_moves_as_one_that_is(make, made):
    plain = parameters(shapes=((5, 4), (3,)))
    params = [made(plain[0]), plain[1].detach().clone().requires_grad_()]
    optimizer, other = make(params), make(plain)
    assert made is overlapping or not params[0].is_contiguous()
    for t in range(4):
        for p, q, g in zip(params, plain, gradients(plain, t), strict=True):
            p.grad, q.grad = g.clone().view(p.shape), g
        optimizer.step()
        other.step()
    assert_same_numbers(
        make.row, [p.reshape(q.shape) for p, q in zip(values(params), plain, strict=True)], values(plain)
    )
    if made is strided:
        base = params[0].detach().as_strided((10, 12), (12, 1))
        assert int((base == 7.0).sum()) == 10 * 12 - 5 * 4  # what lies between was not touched


def test_zero_dimensional_and_empty_parameters(make):
    # one row: a measure of rows sees the same, a selection does not
    params = parameters(shapes=((), (0,), (3, 0, 2), *[(1, 6)] * (not make.row.part)))
    plain = [p.detach().clone().reshape(-1).requires_grad_() for p in params]
    optimizer, other = make(params), make(plain)
    for t in range(4):
        for p, q, g in zip(params, plain, gradients(params, t), strict=True):
            p.grad, q.grad = g, g.reshape(-1)
        optimizer.step()
        other.step()
    assert_same([p.reshape(-1) for p in values(params)], values(plain))
    assert params[0].dim() == 0 and not torch.equal(params[0], parameters(shapes=((),))[0])
    for p in params:
        assert {float(optimizer.state[p][n]) for n in make.row.counters} <= {4.0}
        assert optimizer.state[p].keys() == make.row.slots | make.row.counters | make.row.kept


def test_only_empty_parameters_step_too(make):
    p = torch.zeros(0, 3, requires_grad=True)
    optimizer = make([p])
    p.grad = torch.zeros(0, 3)
    optimizer.step()
    assert float(optimizer.param_groups[0]["clock"]) == 1 and p.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused_when_they_are_added(make, dtype):
    bad = torch.zeros(2, dtype=dtype)
    remedy = "view_as_real" if dtype.is_complex else "use one of torch.float32"
    with pytest.raises(TypeError, match=rf"{make.row.cls.__name__}: .*{dtype}.*{remedy}"):
        make([torch.zeros(2), bad])
    params = parameters()
    optimizer = make(params)
    before = everything(optimizer, params)
    with pytest.raises(TypeError, match=remedy):
        optimizer.add_param_group({"params": [("new", bad)] if "param_names" in optimizer.param_groups[0] else [bad]})
    assert len(optimizer.param_groups) == 1
    assert_same(everything(optimizer, params), before)


def sparse(p: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, *p.shape[1:]), p.shape, check_invariants=True)


@pytest.mark.parametrize("after", [0, 2], ids=["first step", "third step"])
def test_a_sparse_gradient_is_refused_before_anything_changed(make, after):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(after))
    before = everything(optimizer, params)
    for p, g in zip(params, gradients(params, after), strict=True):
        p.grad = g
    params[1].grad = sparse(params[1])
    with pytest.raises(RuntimeError, match=rf"{make.row.cls.__name__}: .*parameter 1 is sparse.*SparseAdam"):
        optimizer.step()
    assert_same(everything(optimizer, params), before)
    params[1].grad = params[1].grad.to_dense()
    optimizer.step()
    assert_moved(before["parameters"], values(params))


def replaced(p: Tensor) -> None:
    p.data = p.data * 0.5


def in_place(p: Tensor) -> None:
    p.data.mul_(0.5)


def test_a_parameters_data_may_be_replaced(make):
    runs: list[Any] = []
    for change in (replaced, in_place):
        params = parameters()
        optimizer = make(params)
        train(optimizer, params, range(2))
        for p in params:
            change(p)
        train(optimizer, params, range(2, 4))
        runs.append(everything(optimizer, params))
    assert_same(*runs)
    for p, moved in zip(parameters(), runs[0]["parameters"], strict=True):
        assert not torch.equal(p.detach(), moved)
    assert_equal(runs[0]["parameters"][0], runs[1]["parameters"][0])
