"""Measures of rows: every layout, cuts inside rows and between them, and what rules and measures do with them."""

import pytest
import torch

import gradkit
from gradkit import chain, measure, rule
from gradkit import transforms as tx
from gradkit.backends import csource, native
from gradkit.ops import absolute, maximum, sqrt, where
from tests.cases import BACKENDS
from tests.runs import ran_on
from tests.tolerance import tolerance

each_scope = pytest.mark.parametrize("scope", ["row", "column"])
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def finish_rows(total, largest, mean, size):
    return sqrt(total), largest, mean * size


ALL_THREE = {"total": "sum", "largest": "max", "mean": "mean"}


def three(u, p):
    return u * u, absolute(u), absolute(p)


def finish_again(total, norm, coef):
    return total / maximum(norm, 1e-30) * coef


def magnitude(u):
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


def both(scope):
    """A measure of parts of a tensor, then one of the whole, then one of parts again, and rules between them."""
    first = measure(scope=scope, reduce=ALL_THREE, gives=("norm", "top", "usual"), finish=finish_rows)(three)
    again = measure(scope=scope, reduce={"total": "sum"}, gives=("again",), finish=finish_again)(magnitude)
    return chain(first, by_norm, of_the_tensor, again, by_both, name="both", size=2.0)


BOTH = {scope: both(scope) for scope in ("row", "column")}


def expected(scope: str, g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """In float64, on the tensor as a matrix whose rows are the parts."""
    x, w = g.double(), p.double()
    if not x.numel():
        return x
    if x.dim() > 1 and scope == "column":
        x, w = x.transpose(0, 1), w.transpose(0, 1)
    shape = x.shape
    x, w = (t.reshape(len(t), -1) if t.dim() > 1 else t.reshape(1, -1) for t in (x, w))
    norm, top, usual = x.norm(dim=1, keepdim=True), x.abs().amax(1, keepdim=True), 2 * w.abs().mean(1, keepdim=True)
    u = torch.where(top > 1.5, x / norm, x) * usual
    coef = 1 / u.norm()
    again = u.abs().sum(1, keepdim=True) / norm * coef
    out = (u * again + coef * u).reshape(shape)
    return out.transpose(0, 1) if out.dim() > 1 and scope == "column" else out


def laid_out(kind: str, dtype: torch.dtype) -> torch.Tensor:
    shapes = {"vector": (7,), "scalar": (), "flat row": (1, 9), "column": (9, 1), "empty": (0, 3), "no row": (3, 0)}
    shapes |= {"matrix": (5, 13), "channels_last": (4, 3, 5, 2), "transposed": (6, 5), "cube": (3, 2, 4)}
    shapes |= {"many rows": (100, 700), "many columns": (700, 99), "a long vector": (csource.BLOCK + 3,)}
    shapes |= {"long rows": (3, csource.BLOCK * 2 + 5), "long columns": (csource.BLOCK * 2 + 5, 3)}
    shapes |= {"transposed convolution": (6, 4, 3, 3), "channels_last rows": (70, 5, 4, 30)}
    x = torch.randn(shapes[kind], generator=torch.Generator().manual_seed(len(kind))).to(dtype)
    if kind.startswith("channels_last"):
        return x.to(memory_format=torch.channels_last)
    return x.t().contiguous().t() if kind == "transposed" else x


KINDS = ("vector", "scalar", "flat row", "column", "matrix", "cube", "channels_last", "transposed", "many rows")
LONG = ("many columns", "long rows", "long columns", "a long vector", "transposed convolution", "channels_last rows")


def stepped(backend: str, scope: str, kinds, dtype: torch.dtype, **options):
    """What one step of SGD at lr 1 subtracts, and what should be subtracted."""
    params = [laid_out(k, dtype).requires_grad_() for k in kinds]
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    optimizer = gradkit.Optimizer(params, BOTH[scope], lr=1.0, backend=backend, **options)
    wanted = [p.detach().double() - expected(scope, p.grad, p.detach()) for p in params]
    optimizer.step()
    return optimizer, params, wanted


@each_backend
@each_scope
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, *LONG])
def test_rows_and_columns_are_slices_of_a_dimension(kind, dtype, scope, backend):
    optimizer, (p,), (wanted,) = stepped(backend, scope, [kind], dtype)
    relative = tolerance("reference", dtype)
    torch.testing.assert_close(p.detach().double(), wanted, rtol=relative, atol=relative)
    assert ran_on(optimizer) == {backend}


@each_backend
@each_scope
def test_tensors_of_a_batch_keep_their_rows_apart(scope, backend):
    kinds = [*KINDS, "empty", "no row", *LONG]
    optimizer, params, wanted = stepped(backend, scope, kinds, torch.float32)
    for kind, p, x in zip(kinds, params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), x, rtol=2e-5, atol=2e-5, msg=kind)
    assert len(optimizer._plans["step"].batches) == 1


APART = [*KINDS, "empty", "no row", "transposed convolution", "many rows"]  # a box holds their units


@each_scope
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float64, {"maximize": True}), (torch.bfloat16, {"rounding": "kahan"})],
    ids=str,
)
def test_the_last_pass_measures_units_that_a_box_holds_to_the_same_bits(dtype, options, scope, monkeypatch):
    together, params, _ = stepped("native", scope, APART, dtype, **options)
    with monkeypatch.context() as patch:
        patch.setattr(native, "passes_of", lambda batch: [(ps, None) for ps in batch.program.passes])
        apart, others, _ = stepped("native", scope, APART, dtype, **options)
    passes = [sorted(x._plans["step"].batches[0].backend.passes) for x in (together, apart)]
    assert [len(x) for x in passes] == [3, 4] and {*passes[1]} - {*passes[0]} == {3}
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@each_scope
def test_a_batch_with_a_unit_in_several_boxes_measures_in_a_pass_of_its_own(scope):
    optimizer, *_ = stepped("native", scope, ["matrix", f"long {scope}s"], torch.float32)
    assert len(optimizer._plans["step"].batches[0].backend.passes) == 4
    assert "read with the next pass" not in optimizer.explain()


@each_backend
@each_scope
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_bf16_rows(rounding, scope, backend):
    optimizer, params, wanted = stepped(
        backend, scope, ["matrix", "many rows", "vector"], torch.bfloat16, rounding=rounding
    )
    assert ran_on(optimizer) == {backend}
    for p, x in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), x, rtol=2**-7, atol=2**-7)


@each_scope
def test_stochastic_rounding_draws_by_element_in_boxes_too(scope):
    ends = [
        stepped(b, scope, ["many rows", "many columns"], torch.bfloat16, rounding="stochastic")[1] for b in BACKENDS
    ]
    for end in ends[1:]:
        differs = [(a != b).float().mean() for a, b in zip(ends[0], end, strict=True)]
        assert max(differs) < 1e-3  # where a sum's last bit decides


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
    with pytest.raises(ValueError, match="use 'row', 'column', 'tensor' or 'all'"):
        measure(scope="rows", reduce={"x": "sum"}, gives=("y",), finish=finish_tensor)(magnitude)
    with pytest.raises(ValueError, match="is kept of a tensor or of all"):
        measure(scope="row", reduce={"total": "sum"}, state=("s",), gives=("y",), finish=finish_tensor)(magnitude)
    rows, columns = (x.items[0] for x in BOTH.values())
    tensor = measure(scope="tensor", reduce={"total": "sum"}, gives=("again",), finish=finish_again)(magnitude)
    with pytest.raises(ValueError, match="magnitude is over each tensor: 'norm' has a value for each part of one"):
        gradkit.Optimizer([p], chain(rows, tensor, name="both", size=2.0, coef=1.0))
    with pytest.raises(ValueError, match="a.three measures rows and b.three columns: a chain may do one of them"):
        gradkit.Optimizer([p], chain(chain(rows, name="a", size=1.0), chain(columns, name="b", size=1.0)))


@each_backend
@each_scope
def test_the_number_of_threads_changes_no_bit(scope, backend):
    ends, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            ends.append(stepped(backend, scope, ["many rows", *LONG], torch.float32)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@each_backend
@each_scope
def test_a_batch_without_any_row_steps(scope, backend):
    _, params, wanted = stepped(backend, scope, ["empty"], torch.float32)
    assert torch.equal(params[0].detach().double(), wanted[0])


def test_patterns_of_a_late_group_are_checked_before_it_is_added():
    net, late = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    optimizer = gradkit.AdamW(net.named_parameters(), transforms=[tx.adaptive_clip()])
    for names in (("zzz",), ("weigth",)):
        with pytest.raises(ValueError, match="matches no parameter"):
            optimizer.add_param_group({"params": late.named_parameters(), "adaptive_clip.exclude": names})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": late.named_parameters(), "adaptive_clip.exclude": ("weight",)})


def test_names_are_those_of_the_model_that_is_here():
    """A file's may have a prefix, of DDP or torch.compile."""
    net = torch.nn.Linear(3, 2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    other = torch.optim.AdamW([("module." + n, p) for n, p in net.named_parameters()])
    other.step()
    optimizer = gradkit.AdamW(net.named_parameters(), transforms=[tx.adaptive_clip(exclude=("bias",))])
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.step()
