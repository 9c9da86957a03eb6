"""Several losses: one gradient from theirs, and the backwards that it takes."""

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradkit
from bench.devices import Cpu
from bench.protocol import Contender
from gradkit import gradients
from gradkit.backends import csource, mix
from gradkit.multiloss import CAGrad, Method, PCGrad
from tests.reference import multiloss as reference
from tests.tolerance import assert_equal, tolerance

F64 = torch.float64
SHAPES = ((3, 4), (5,), (2, 3, 2))
ORDERS = {
    2: [[1, 0], [0, 1]],
    3: [[2, 1, 0], [0, 1, 2], [1, 0, 2]],
    4: [[3, 0, 2, 1], [1, 0, 3, 2], [1, 3, 0, 2], [0, 2, 1, 3]],
}
METHODS: dict[str, Callable[[], Method]] = {
    "PCGrad": PCGrad,
    "PCGrad, sum": lambda: PCGrad("sum"),
    "PCGrad, tensor": lambda: PCGrad(granularity="tensor"),
    "CAGrad": CAGrad,
    "CAGrad, c 0.9": lambda: CAGrad(0.9, 0),
}
each_method = pytest.mark.parametrize("name", METHODS)


def draw(tasks: int, dtype: torch.dtype = F64, seed: int = 0) -> list[list[Tensor]]:
    """Gradients that conflict: most of what they have in common is taken out."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(s, dtype=F64, generator=generator) for s in SHAPES] for _ in range(tasks)]
    mean = [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]
    return [[(g - 0.7 * m).to(dtype) for g, m in zip(row, mean, strict=True)] for row in rows]


def flat(row: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([g.detach().double().numpy().ravel() for g in row])


def matrix(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    return np.stack([flat(row) for row in rows])


def close(ours: np.ndarray, theirs: np.ndarray, relative: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tasks", ORDERS)
def test_pcgrad_is_the_references(tasks, reduction, dtype):
    rows = draw(tasks, dtype)
    expected = reference.pcgrad(matrix(rows), ORDERS[tasks], reduction)
    ours = PCGrad(reduction).combine(rows, ORDERS[tasks])
    close(flat(ours), expected, tolerance("reference", dtype))
    assert {g.dtype for g in ours} == {dtype}


def test_pcgrad_by_tensor_is_the_references_of_each():
    rows, order = draw(4), ORDERS[4]
    method = PCGrad(granularity="tensor")
    ours = method.combine(rows, order)
    for column, g in zip(zip(*rows, strict=True), ours, strict=True):
        close(flat([g]), reference.pcgrad(matrix([[x] for x in column]), order), 1e-12)
    assert method.last.gram.shape == (3, 4, 4)
    assert np.abs(flat(ours) - flat(PCGrad().combine(rows, order))).max() > 0.01


@pytest.mark.parametrize("rescale", [0, 1, 2])
@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("tasks", [2, 3])
def test_cagrad_is_the_references(tasks, c, rescale):
    rows = draw(tasks)
    close(flat(CAGrad(c, rescale).combine(rows)), reference.cagrad(matrix(rows), c, rescale), 1e-6)


@pytest.mark.parametrize("tasks", [3, 5, 8])
def test_no_other_direction_within_reach_gives_cagrads_worst_task_more(tasks):
    """Small steps from the solution, back to the ball around the mean: none raises the least of <g_i, d>."""
    rows = matrix(draw(tasks, seed=tasks))
    (found,) = CAGrad(0.5, 0).combine([[torch.tensor(row)] for row in rows])
    d, mean = found.numpy(), rows.mean(0)
    radius = 0.5 * np.linalg.norm(mean)
    assert np.linalg.norm(d - mean) == pytest.approx(radius, rel=1e-6)
    generator = np.random.default_rng(0)
    for size in (1.0, 0.1, 0.01):
        others = d + size * radius * generator.standard_normal((2000, len(d)))
        away = others - mean
        others = mean + away * np.minimum(1, radius / np.linalg.norm(away, axis=1))[:, None]
        assert (others @ rows.T).min(1).max() <= (rows @ d).min() + 1e-9
    assert (rows @ d).min() > (rows @ mean).min() + 0.1 * radius


@pytest.mark.parametrize("tasks", ORDERS)
def test_pcgrads_weights_are_torchjds(tasks):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd comes with the extra [dev]")
    for seed in range(5):
        rows = torch.tensor(matrix(draw(tasks, seed=seed)))
        torch.manual_seed(seed)
        theirs = aggregation.PCGrad()(rows)
        torch.manual_seed(seed)
        order = [torch.randperm(tasks).tolist() for _ in range(tasks)]
        (ours,) = PCGrad("sum").combine([[row] for row in rows], order)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        weights = PCGrad("sum").weights(rows @ rows.T, order)
        torch.testing.assert_close(weights @ rows, ours)


@pytest.mark.filterwarnings("ignore")  # of the solver's own, when it is imported
@pytest.mark.parametrize("tasks", ORDERS)
def test_cagrads_weights_are_torchjds(tasks):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd comes with the extra [dev]")
    pytest.importorskip("cvxpy", reason="torchjd's solver comes with the extra [dev]")
    for c, seed in itertools.product((0.3, 0.8), range(2)):
        rows = torch.tensor(matrix(draw(tasks, seed=seed)))
        theirs = aggregation.CAGrad(c).gramian_weighting(rows @ rows.T)
        torch.testing.assert_close(CAGrad(c, 0).weights(rows @ rows.T, None), theirs, rtol=1e-3, atol=1e-3)


# laws


@each_method
def test_the_names_of_the_tasks_do_not_matter(name):
    rows, order = draw(4), ORDERS[4]
    method, new = METHODS[name](), [2, 0, 3, 1]  # task k stands where new[k] stood
    renamed = [[new.index(j) for j in order[old]] for old in new]
    given = (order, renamed) if isinstance(method, PCGrad) else (None, None)
    one = method.combine(rows, given[0])
    other = method.combine([rows[old] for old in new], given[1])
    close(flat(other), flat(one), 1e-7)


@pytest.mark.parametrize("name", ["PCGrad", "PCGrad, tensor"])
def test_gradients_without_conflict_are_averaged(name):
    rows = [[g.abs() for g in row] for row in draw(3)]
    method = METHODS[name]()
    close(flat(method.combine(rows)), matrix(rows).mean(0), 1e-15)
    assert method.last.conflict_rate == 0


@pytest.mark.parametrize("name", ["PCGrad", "CAGrad, c 0.9"])
def test_two_tasks_in_conflict_both_gain(name):
    a, b = matrix(draw(2))
    b = b - (a @ b) / (a @ a) * a - 0.5 * a
    rows = np.stack([a, 4 * b])  # their mean hurts the first
    assert rows[0] @ rows[1] < 0 and (rows @ rows.mean(0)).min() < 0
    (g,) = METHODS[name]().combine([[torch.tensor(row)] for row in rows])
    assert (rows @ g.numpy() > 0).all()


@each_method
@pytest.mark.parametrize("scale", [1e-15, 65536.0, 1e15])
def test_scaled_gradients_give_the_scaled_result(name, scale):
    """So a GradScaler's factor doesn't matter, and no eps hides gradients that are small."""
    rows = draw(3, torch.float32)
    one, other = (METHODS[name]().combine([[f * g for g in row] for row in rows]) for f in (1.0, scale))
    close(flat(other) / scale, flat(one), 1e-5)


def test_cagrad_with_c_0_is_the_mean():
    rows = draw(3)
    close(flat(CAGrad(0.0).combine(rows)), matrix(rows).mean(0), 1e-15)


@each_method
def test_equal_tasks_give_their_gradient(name):
    (row,) = draw(2)[:1]
    size = {"PCGrad, sum": 3, "CAGrad": 1.5 / 1.25, "CAGrad, c 0.9": 1.9}.get(name, 1)
    close(flat(METHODS[name]().combine([row, row, row])), size * flat(row), 1e-7)


@each_method
def test_a_task_without_gradient_hinders_none(name):
    """Its gradient is 0, or None: the authors' code divides by its norm."""
    rows = draw(3)
    nothing: list[Any] = [None] * len(SHAPES)
    zeros = [torch.zeros_like(g) for g in rows[0]]
    with_zeros = METHODS[name]().combine([*rows, zeros])
    assert np.isfinite(flat(with_zeros)).all()
    if name.startswith("CAGrad"):
        close(flat(METHODS[name]().combine([*rows, nothing])), flat(with_zeros), 1e-12)
    assert not flat(METHODS[name]().combine([zeros, zeros])).any()


def test_a_parameter_that_some_task_lacks_gets_the_sum():
    (a, b, _), (c, d, _) = draw(2)
    method = PCGrad()
    combined = method.combine([[a, b, None], [c, None, None]])
    both = np.stack([np.concatenate([flat([a]), flat([b])]), np.concatenate([flat([c]), 0 * flat([d])])])
    expected = reference.pcgrad(both, ORDERS[2], "sum")
    close(flat(combined[:1]), expected[: a.numel()] / 2, 1e-12)
    close(flat(combined[1:2]), expected[a.numel() :], 1e-12)
    assert combined[2] is None


@each_method
def test_a_nan_stays_one(name):
    rows = draw(3, torch.float32)
    rows[1][0][0, 0] = torch.nan
    combined = METHODS[name]().combine(rows)
    assert combined[0][0, 0].isnan()


@each_method
def test_gradients_are_left_as_they_are(name):
    rows = draw(3)
    before = copy.deepcopy(rows)
    METHODS[name]().combine(rows)
    for g, b in zip(itertools.chain(*rows), itertools.chain(*before), strict=True):
        assert_equal(g, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_half_precision_is_float32_rounded_once(name, dtype):
    low = draw(3, dtype)
    ours = METHODS[name]().combine(low)
    exact = METHODS[name]().combine([[g.float() for g in row] for row in low])
    for g, e in zip(ours, exact, strict=True):
        assert_equal(g, e.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tasks", [2, 3, mix.MOST])
def test_loops_in_c_do_what_torch_does(tasks, dtype, monkeypatch):
    rows = [[g.to(dtype) for g in row] for row in draw(tasks)]
    for i, row in enumerate(rows):
        row += [torch.randn(csource.BLOCK + 3).to(dtype), torch.randn(5, 4).to(dtype).t()]
        row += [torch.randn(()).to(dtype).expand(3, 2), torch.randn(0, 2).to(dtype), None, torch.randn(4).to(dtype)]
        row[-1] = row[-1] if i else None
    assert gradients.alike(list(zip(*rows, strict=True)), [0])[0][0] is False  # a loop takes it
    for granularity in ("global", "tensor"):
        looped, plain = (PCGrad(granularity=granularity) for _ in range(2))
        results = looped.combine(rows)
        with monkeypatch.context() as patch:
            patch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
            wanted = plain.combine(rows)
        torch.testing.assert_close(looped.last.gram, plain.last.gram, rtol=1e-12, atol=1e-12)
        assert wanted[-2] is results[-2] is None
        for x, y in zip(results, wanted, strict=True):
            if x is not None:
                torch.testing.assert_close(x, y)
                assert x.dtype == dtype and x.shape == y.shape


def test_large_tensors_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
    rows = draw(3)
    whole = PCGrad()
    whole.combine(rows)
    for size in (1, 3, 8, 24, 1000):
        monkeypatch.setitem(gradkit.gradients.PIECES, "cpu", size)
        pieces = PCGrad()
        pieces.combine(rows)
        torch.testing.assert_close(pieces.last.gram, whole.last.gram, rtol=1e-13, atol=0)


def test_elements_meet_whatever_their_layout():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    plain, mixed, image = PCGrad(), PCGrad(), PCGrad()
    plain.combine([[a], [b]])
    mixed.combine([[a], [b.to(memory_format=torch.channels_last)]])
    (g,) = image.combine([[x.to(memory_format=torch.channels_last)] for x in (a, b)])
    torch.testing.assert_close(mixed.last.gram, plain.last.gram)
    torch.testing.assert_close(image.last.gram, plain.last.gram)
    assert g.is_contiguous(memory_format=torch.channels_last)


def test_last_tells_gram_cosines_and_conflicts():
    method = PCGrad()
    assert method.last is None
    method.combine([[torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 4.0])], [torch.tensor([0.0, 2.0])]])
    assert method.last.gram.tolist() == [[1, -3, 0], [-3, 25, 8], [0, 8, 4]]
    torch.testing.assert_close(
        method.last.cosines, torch.tensor([[1, -0.6, 0], [-0.6, 1, 0.8], [0, 0.8, 1]], dtype=F64)
    )
    assert method.last.conflict_rate.item() == pytest.approx(1 / 3)


# random orders


def test_orders_are_permutations_that_follow_from_seed_and_call():
    method = PCGrad()
    drawn = []
    for call in range(300):
        method.calls = call
        drawn.append(tuple(map(tuple, method.drawn(3))))
    assert {tuple(sorted(row)) for order in drawn for row in order} == {(1, 2), (0, 2), (0, 1)}
    assert len(set(drawn)) == 8  # 2 orders of the others for each of 3 tasks
    assert [drawn.count(x) > 15 for x in set(drawn)] == [True] * 8
    assert tuple(map(tuple, PCGrad().drawn(3))) == drawn[0]
    assert len({str(PCGrad(seed=seed).drawn(4)) for seed in range(20)}) > 15


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_draws_on(how):
    rows, method = draw(4), PCGrad(seed=3)
    for _ in range(2):
        method.combine(rows)
    if how == "state_dict":
        resumed = PCGrad(seed=3)
        resumed.load_state_dict(method.state_dict())
    else:
        resumed = pickle.loads(pickle.dumps(method)) if how == "pickle" else copy.deepcopy(method)
    fresh = PCGrad(seed=3)
    assert fresh.drawn(4) != resumed.drawn(4) == method.drawn(4)
    for a, b in zip(method.combine(rows), resumed.combine(rows), strict=True):
        assert_equal(a, b)


def test_torchs_generator_is_left_alone():
    before = torch.get_rng_state()
    PCGrad().combine(draw(4))
    assert torch.equal(before, torch.get_rng_state())


# backward


class Net(nn.Module):
    """A trunk with two layers and a head for each task; `idle` is reached by none, `frozen` isn't trained."""

    def __init__(self, tasks: int = 3, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(tasks))
        self.idle, self.frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(6), requires_grad=False)
        self.to(dtype)

    def losses(self, x: Tensor, checkpointed: bool | None = None) -> list[Tensor]:
        if checkpointed is None:
            h = self.trunk(x)
        else:
            h = checkpoint(self.trunk, x, use_reentrant=checkpointed)
        return [(head(h * self.frozen) - k).square().mean() * (k + 1) for k, head in enumerate(self.heads)]


def batch(dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def by_hand(net: Net, x: Tensor, method: Method) -> dict[str, Tensor]:
    """What backward should leave: one plain backward for each task."""
    of_tasks = []
    for k in range(len(net.heads)):
        for p in net.parameters():
            p.grad = None
        net.losses(x)[k].backward()
        of_tasks.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    names = [n for n, _ in net.trunk.named_parameters(prefix="trunk")]
    merged = method.combine([[of[n] for n in names] for of in of_tasks])
    for p in net.parameters():
        p.grad = None
    heads = {n: g for of in of_tasks for n, g in of.items() if n.startswith("heads")}
    return {**dict(zip(names, merged, strict=True)), **heads}


def left(net: Net) -> dict[str, Tensor]:
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for n, g in theirs.items():
        torch.testing.assert_close(ours[n], g, rtol=relative, atol=relative)


@each_method
def test_the_trunk_is_combined_and_heads_get_their_own_gradient(name):
    net, x = Net(), batch()
    expected = by_hand(net, x, METHODS[name]())
    gradkit.backward(net.losses(x), torch.optim.SGD(net.parameters(), 0.1), METHODS[name]())
    same(left(net), expected)
    assert net.idle.grad is None and net.frozen.grad is None


@pytest.mark.parametrize("form", ["parameters", "named_parameters", "gradkit"])
def test_parameters_come_in_every_form(form):
    net, x = Net(), batch()
    expected = by_hand(net, x, PCGrad())
    given = gradkit.AdamW(net.parameters()) if form == "gradkit" else getattr(net, form)()
    gradkit.backward(net.losses(x), given, PCGrad())
    same(left(net), expected)


@each_method
def test_gradients_accumulate(name):
    net, method = Net(), METHODS[name]()
    parts = []
    for seed in (1, 2):
        parts.append(by_hand(net, batch(seed=seed), method))
    kept = METHODS[name]()
    for seed in (1, 2):
        gradkit.backward(net.losses(batch(seed=seed)), net.parameters(), kept)
    same(left(net), {n: parts[0][n] + parts[1][n] for n in parts[0]})
    assert kept.calls == 2


def test_shared_says_what_is_combined_and_the_rest_gets_the_sum():
    net, x = Net(), batch()
    combined, total = by_hand(net, x, PCGrad()), Net()
    sum(total.losses(x)).backward()
    first = [[*net.trunk.parameters()][i] for i in (0, 1)]
    method = PCGrad()
    gradkit.backward(net.losses(x), net.parameters(), method, shared=first)
    last = {n: p.grad for n, p in total.trunk[2].named_parameters(prefix="trunk.2")}
    for n, g in left(net).items():
        if n.startswith("heads"):
            torch.testing.assert_close(g, combined[n])
        elif n in last:
            torch.testing.assert_close(g, last[n])
    grads = [torch.autograd.grad(loss, first, retain_graph=True) for loss in net.losses(x)]
    for p, g in zip(first, PCGrad().combine(grads), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_parameter_of_two_losses_out_of_three_is_shared():
    w, v = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(1))
    gradkit.backward([w.sum() * v.sum(), w[0] * v.sum(), v.sum()], [w, v], PCGrad())
    assert w.grad.tolist() == [2.0, 1.0]  # 1 + 1 and 1: the sum, since one has none
    torch.testing.assert_close(v.grad, torch.tensor([5 / 3]))


def test_graphs_are_freed():
    net, x = Net(), batch()
    losses = net.losses(x)
    gradkit.backward(losses, net.parameters(), PCGrad())
    with pytest.raises(RuntimeError, match="a second time"):
        losses[0].backward()


def test_a_graph_that_no_later_loss_needs_is_freed_at_once():
    """Tasks with batches of their own: the saved tensors of the first are gone when the second goes backward."""
    net, order = Net(2), []
    saved: dict[int, int] = {}

    class Kept:
        def __init__(self, task: int, tensor: Tensor):
            self.task, self.tensor = task, tensor
            saved[task] = saved.get(task, 0) + 1

        def __del__(self):
            saved[self.task] -= 1

    losses = []
    for k in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=k: Kept(k, t), lambda kept: kept.tensor):
            losses.append(net.losses(batch(seed=k))[k])
    assert saved[0] > 0 and saved[1] > 0
    losses[1].register_hook(lambda g: order.append(saved[0]))
    gradkit.backward(losses, net.parameters(), PCGrad())
    assert order == [0]


def test_a_gradient_that_autograd_gives_twice_is_no_ones_twice():
    """Of a sum both terms get the same tensor."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    a, b, _, _ = params
    gradkit.backward([sum(params).square().sum(), (a + b).sum()], params, PCGrad())
    assert len({p.grad.data_ptr() for p in params}) == 4


def keep_detached(p: Tensor, kept: list[Tensor]) -> None:
    p.register_hook(lambda g: kept.append(g.detach()))


def keep_as_grad(p: Tensor, kept: list[Tensor]) -> None:
    """Only torch holds it then, no name in Python."""

    def hook(g: Tensor) -> None:
        kept.append(torch.zeros_like(g))
        kept[-1].grad = g

    p.register_hook(hook)


KEEPERS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "itself": lambda p, kept: p.register_hook(kept.append),
    "detached": keep_detached,
    "as another's grad": keep_as_grad,
    "a part of it": lambda p, kept: p.register_hook(lambda g: kept.append(g[1:])),
    "its memory": lambda p, kept: p.register_hook(lambda g: kept.append(g.untyped_storage())),
}


@pytest.mark.parametrize("how", KEEPERS)
@pytest.mark.parametrize("loops", [True, False])
def test_gradients_that_a_hook_kept_stay_as_they_are(how, loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
    p, kept = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), []
    KEEPERS[how](p, kept)
    gradkit.backward([p.square().sum(), -p.exp().sum()], [p], PCGrad())
    for x, wanted in zip(kept, (2 * p.detach(), -p.detach().exp()), strict=True):
        g = torch.empty(0).set_(x, 0, (3,)) if how == "its memory" else x.grad if x.grad is not None else x
        torch.testing.assert_close(g, wanted[3 - len(g) :], rtol=1e-6, atol=0)


class Given(torch.autograd.Function):
    """Its backward returns a tensor that it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return (x * slope).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.saved_tensors[0], None


@pytest.mark.parametrize("loops", [True, False])
def test_tensors_that_a_function_returns_as_gradients_stay_as_they_are(loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
    p, slope = nn.Parameter(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])
    gradkit.backward([Given.apply(p, slope), -p.sum()], [p], PCGrad())
    torch.testing.assert_close(slope, torch.tensor([1.0, 2.0, 3.0]), rtol=0, atol=0)


def test_gradients_that_share_memory_are_combined_each_by_itself():
    """A sum gives its terms one gradient; what a concatenation gives are slices of one, which here overlaps a's."""
    params = [nn.Parameter(torch.ones(n)) for n in (4, 2, 2)]
    a, b, c = params
    gradkit.backward([(a + torch.cat([b, c])).square().sum(), -a.sum() + b.sum() - c.sum()], params, PCGrad())
    others = [nn.Parameter(torch.ones(n)) for n in (4, 2, 2)]
    a, b, c = others
    both = [(a + torch.cat([b, c])).square().sum(), -a.sum() + b.sum() - c.sum()]
    grads = [[g.clone() for g in torch.autograd.grad(x, others)] for x in both]
    for p, g in zip(params, PCGrad().combine(grads), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=0)


class Strided(torch.autograd.Function):
    """Its backward returns a gradient whose elements overlap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return torch.tensor([1.0, 2.0, 3.0, 0.0]).as_strided((2, 2), (1, 1))


def test_a_sum_has_memory_of_its_own_size_that_does_not_overlap():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    first = torch.cat([p, torch.ones(1000)]).square().sum() + Strided.apply(q)
    gradkit.backward([first, p.sum() + q.sum()], [p, q], PCGrad())
    assert p.grad.untyped_storage().nbytes() == p.grad.nbytes
    torch.testing.assert_close(p.grad, torch.full((3,), 1.5))
    torch.testing.assert_close(q.grad, torch.tensor([[1.0, 1.5], [1.5, 2.0]]))


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_takes_the_place_of_the_first_gradient(loops, dtype, monkeypatch):
    if not loops:
        monkeypatch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
    p, places = nn.Parameter(torch.randn(500, 3, dtype=dtype)), []
    p.register_hook(lambda g: places.append(g.data_ptr()))
    gradkit.backward([p.square().sum(), (p - 1).square().sum(), (p * p * p).sum()], [p], PCGrad())
    assert p.grad.data_ptr() == places[0]
    placed, p.grad = p.grad.clone(), None
    monkeypatch.setattr(gradients, "COUNTED", False)  # a torch that doesn't tell who holds what
    gradkit.backward([p.square().sum(), (p - 1).square().sum(), (p * p * p).sum()], [p], PCGrad())
    assert p.grad.data_ptr() not in places[3:]
    assert torch.equal(p.grad, placed)


OWNERS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Any]]] = {
    "numpy": (torch.from_numpy, lambda array: array),
    "bytes": (lambda data: torch.frombuffer(data, dtype=torch.float32), lambda array: array.tobytes()),
    "dlpack": (torch.from_dlpack, lambda array: array),
}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("loops", [True, False])
def test_memory_of_others_stays_as_it_is(owner, loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(mix, "why_not", lambda *kind: "torch is to do it")
    array = np.array([1.0, 2.0, 3.0], np.float32)
    made, owned = OWNERS[owner][0], OWNERS[owner][1](array)
    p = nn.Parameter(torch.ones(3))
    p.register_hook(lambda g: made(owned) if g[0] > 0 else None)  # nobody else holds that tensor
    gradkit.backward([p.sum(), -p.sum()], [p], PCGrad())
    now = np.frombuffer(owned, np.float32) if owner == "bytes" else owned
    np.testing.assert_array_equal(now, [1.0, 2.0, 3.0])


def test_a_sum_is_a_plain_tensor_whatever_the_first_gradient_was():
    """No view, as a linear layer's gradient; without a graph; usable in place."""
    layer, p, q = nn.Linear(4, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.register_hook(lambda g: g.clone().requires_grad_())

    def made_in_inference(g: Tensor) -> Tensor:
        with torch.inference_mode():
            return g + 1

    q.register_hook(made_in_inference)
    params = [*layer.parameters(), p, q]
    gradkit.backward([(layer(torch.ones(2, 4)) * (p + q)).square().sum() * k for k in (1.0, -2.0)], params, PCGrad())
    for x in params:
        assert x.grad._base is None and not x.grad.requires_grad and not x.grad.is_inference()
        x.grad.detach_().mul_(2.0)


@pytest.mark.parametrize("name", ["PCGrad", "CAGrad"])
def test_a_scaler_scales_the_losses(name):
    net, x = Net(dtype=torch.float32), batch(torch.float32)
    expected = by_hand(net, x, METHODS[name]())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    gradkit.backward(net.losses(x), optimizer, METHODS[name](), scaler=scaler)
    same(left(net), {n: 1024 * g for n, g in expected.items()}, 1e-5)
    scaler.unscale_(optimizer)
    same(left(net), expected, 1e-5)


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_seen_by_the_scaler_and_by_no_other_head(name, bad):
    net, x = Net(dtype=torch.float32), batch(torch.float32)
    before = copy.deepcopy(net.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = net.losses(x)
    losses[1] = losses[1] * bad
    gradkit.backward(losses, optimizer, METHODS[name](), scaler=scaler)
    assert not any(p.grad.isfinite().all() for p in net.trunk.parameters())
    assert [all(p.grad.isfinite().all() for p in head.parameters()) for head in net.heads] == [True, False, True]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for n, value in net.state_dict().items():
        assert_equal(value, before[n])


def test_under_autocast_inner_products_are_those_of_the_gradients():
    net, x = Net(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(net, x, PCGrad())
        method = PCGrad()
        gradkit.backward(net.losses(x), net.parameters(), method)
    same(left(net), expected, 1e-6)
    assert method.last.gram.dtype == F64


def test_checkpointed_parts_are_computed_again():
    net, x = Net(), batch()
    expected = by_hand(net, x, PCGrad())
    gradkit.backward(net.losses(x, checkpointed=False), net.parameters(), PCGrad())
    same(left(net), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules(whole):
    """A compiled part reaches its parameters from each of its outputs: `shared` tells heads that it holds."""
    net, x = Net(2), batch()
    expected = by_hand(net, x, PCGrad())
    if whole:
        losses = torch.compile(net.losses, backend="aot_eager")(x)
        gradkit.backward(losses, net.parameters(), PCGrad(), shared=net.trunk.parameters())
    else:
        net.trunk.forward = torch.compile(net.trunk.forward, backend="aot_eager")
        gradkit.backward(net.losses(x), net.parameters(), PCGrad())
    same(left(net), expected)


@pytest.mark.parametrize("name", ["PCGrad", "PCGrad, tensor", "CAGrad"])
def test_no_number_is_read_back_from_the_device(name):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    net, method = Net(dtype=torch.float32), METHODS[name]()
    losses = net.losses(batch(torch.float32))
    with Watch():
        gradkit.backward(losses, net.parameters(), method)
        gram = method.last.conflict_rate
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            gram.item()


@pytest.mark.parametrize(
    ("way", "layers", "width", "counted"),
    [("plain", 11, 768, True), ("plain", 11, 768, False), ("plain", 1, 2560, True), ("transposed", 11, 768, True)],
)
def test_memory_is_a_trunk_of_gradients_for_each_task(way, layers, width, counted, monkeypatch):
    """Layers of 2.25 MiB, and one of 25 MiB, more than may be taken beside the trunks."""
    monkeypatch.setattr(gradients, "COUNTED", counted)
    tasks = 3
    trunk = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    x, y, method = torch.randn(2, width), torch.randn(width, width), PCGrad()

    def prepare() -> None:
        for p in trunk.parameters():
            p.grad = None

    def step() -> None:
        if way == "plain":
            h = trunk(x)
            losses = [(h - k).square().mean() for k in range(tasks)]
        else:  # gradients of all tasks but one lie otherwise than their parameter, and are copied to be combined
            losses = [sum(((p.t() if k else p) * y).sum() for p in trunk.parameters()) for k in range(tasks)]
        gradkit.backward(losses, trunk.parameters(), method)

    step()
    extra = Cpu().extra_memory(Contender(step, prepare))
    if extra is None:
        pytest.skip("this system doesn't tell a process's peak memory")
    mib = layers * width * width * 4 / 2**20
    beside = 16 if way == "plain" else 32  # copies of each size come and go, which leaves gaps; all of them are 50
    assert 0.9 * tasks * mib < extra < tasks * mib + beside


# bad input


def losses() -> list[Tensor]:
    return [NET.trunk(batch()).sum(), NET.trunk(batch()).square().sum()]


NET = Net(2)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no losses": (lambda: dict(losses=[]), ValueError, "losses has 0; give two or more"),
    "one loss": (lambda: dict(losses=losses()[:1]), ValueError, r"losses has 1;.*call loss.backward\(\) for one"),
    "their sum": (lambda: dict(losses=sum(losses())), TypeError, "give a list with the loss of each task"),
    "a number": (lambda: dict(losses=[losses()[0], 1.0]), TypeError, r"losses\[1\]=1.0: give the tensor"),
    "not reduced": (lambda: dict(losses=[losses()[0], NET.trunk(batch())]), ValueError, r"losses\[1\] has the shape"),
    "no graph": (lambda: dict(losses=[losses()[0], losses()[1].detach()]), ValueError, r"losses\[1\] has no graph"),
    "nothing shared": (
        lambda: dict(losses=[net.sum() for net in (NET.heads[0].weight, NET.heads[1].weight)]),
        ValueError,
        r"no parameter is reached by two losses; sum\(losses\).backward\(\)",
    ),
    "other parameters": (lambda: dict(params=[NET.idle]), ValueError, r"losses\[0\] reaches none of the parameters"),
    "no parameters": (lambda: dict(params=iter(())), ValueError, "params is empty"),
    "a module": (lambda: dict(params=NET), TypeError, r"model.parameters\(\)"),
    "shared elsewhere": (lambda: dict(shared=[NET.idle]), ValueError, "none of shared= is a parameter that a loss"),
    "a class": (lambda: dict(method=PCGrad), TypeError, r"method=<class.*give gradkit.multiloss.PCGrad\(\)"),
    "a scale": (lambda: dict(scaler=1024.0), TypeError, "scaler=1024.0: give a torch.amp.GradScaler"),
    "reentrant": (
        lambda: dict(losses=[checkpoint(NET.trunk, batch().requires_grad_(), use_reentrant=True).sum()] * 2),
        RuntimeError,
        "give torch.utils.checkpoint.checkpoint use_reentrant=False",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_backward_cannot_take_is_refused_before_anything_changed(wrong):
    make, error, message = WRONG[wrong]
    method = PCGrad()
    given = {"losses": losses(), "params": NET.parameters(), "method": method, **make()}
    with pytest.raises(error, match=f"^backward.*{message}"):
        gradkit.backward(given.pop("losses"), given.pop("params"), given.pop("method"), **given)
    assert method.calls == 0 and all(p.grad is None for p in NET.parameters())


def test_an_error_in_a_later_backward_leaves_no_gradient():
    ours = losses()
    ours[1].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradkit.backward(ours, NET.parameters(), PCGrad())
    assert all(p.grad is None for p in NET.parameters())


def test_a_sparse_p_grad_is_refused_before_anything_has_changed():
    table, row = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2))
    table.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(TypeError, match=r"backward: in p.grad: a gradient is .*sparse"):
        gradkit.backward([(table * row).sum() * k for k in range(1, 3)], [row, table], PCGrad())
    assert row.grad is None


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(TypeError, match=r"losses\[0\]: a gradient is .*sparse.*nn.Embedding\(sparse=False\)"):
        gradkit.backward([table(torch.tensor([k])).sum() for k in range(2)], table.parameters(), PCGrad())


G = torch.ones(2)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "PCGrad: grads has 0 tasks; give two or more"),
        ([[G]], ValueError, "PCGrad: grads has 1 tasks"),
        ([G, G], TypeError, "PCGrad: grads=.*give a list of each task"),
        ([[G, None], [G]], ValueError, r"grads\[1\] has 1 gradients, grads\[0\] 2"),
        ([[G], [G, G]], ValueError, r"grads\[1\] has 2 gradients, grads\[0\] 1; give one or None for each"),
        ([[G], [torch.ones(3)]], ValueError, r"grads\[1\]\[0\] has the shape \(3,\), another task's \(2,\)"),
        ([[G], [1.0]], TypeError, r"grads\[1\]\[0\] is 1.0; give a tensor or None"),
        ([[G], [G.to(torch.int64)]], TypeError, r"grads\[1\]\[0\]: a gradient is torch.int64"),
        ([[G], [G.to(torch.complex64)]], TypeError, "a gradient is torch.complex64"),
    ],
)
def test_what_combine_cannot_take_is_refused(grads, error, message):
    with pytest.raises(error, match=message):
        PCGrad().combine(grads)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCGrad("max"), "PCGrad: reduction='max': use one of 'mean', 'sum'"),
        (lambda: PCGrad(granularity="layer"), "PCGrad: granularity='layer': use one of 'global', 'tensor'"),
        (lambda: PCGrad(seed=-1), r"PCGrad: seed=-1: give a whole number in \[0, 2\*\*32\)"),
        (lambda: CAGrad(-0.1), "CAGrad: c=-0.1: give a number >= 0"),
        (lambda: CAGrad(rescale=3), "CAGrad: rescale=3: give 0, 1 or 2"),
        (lambda: PCGrad().combine([[G], [G]], [[1], [1]]), "PCGrad: order=.*give 2 permutations of the tasks"),
        (lambda: PCGrad().combine([[G], [G]], [[1]]), "PCGrad: order=.*give 2 permutations"),
        (lambda: CAGrad().combine([[G], [G]], ORDERS[2]), "CAGrad: the tasks have no order; leave order=None"),
        (lambda: PCGrad().load_state_dict({"state": {}}), "PCGrad.load_state_dict: .*has no 'calls'"),
    ],
)
def test_an_argument_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_parameters_at_all():
    assert PCGrad().combine([[], []]) == [] and CAGrad().combine([[None], [None]]) == [None]
