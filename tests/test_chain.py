"""Chains: their order, slots, scalars, names and scopes, and where a user's transforms go."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import Slot, Stage, chain, derive, measure, rule
from gradkit import transforms as tx
from gradkit.ops import absolute, lerp, sign, sqrt, where
from gradkit.optim.adamw import adam, adam_scalars
from gradkit.optim.lion import lion, lion_scalars
from tests.cases import BACKENDS
from tests.runs import ran_on
from tests.tolerance import tolerance

each_backend = pytest.mark.parametrize("backend", BACKENDS)
CLOSE = {"rtol": tolerance("reference", torch.float32), "atol": 1e-7}


@rule(stage=Stage.GRAD)
def doubled(u):
    return u * 2.0


@rule
def plus_one(u):
    return u + 1.0


@rule(stage=Stage.UPDATE)
def negated(u):
    return -u


@rule(slots=("total",), stage=Stage.PRECONDITION)
def accumulate(u, total):
    """The sum of all gradients so far."""
    total = total + u
    return total, total


@rule(uses=("total",))
def add_total(u, total):
    return u + total, total


@rule(uses=("total",))
def empty_total(u, total):
    return u, total * 0.0


@rule
def scaled(u, strength):
    return u * strength


def step(links: Any, gradients: list[Any], start: Any = (0.0, 0.0), **given: Any) -> Tensor:
    """The parameter's moves at lr 1, one row a step."""
    p = torch.tensor(start, requires_grad=True)
    optimizer = gradkit.Optimizer([p], links, **{"lr": 1.0, **given})
    seen = [p.detach().clone()]
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
        seen.append(p.detach().clone())
    assert given.get("backend", "auto") in ("auto", *ran_on(optimizer))
    return torch.stack(seen[:-1]) - torch.stack(seen[1:])


G = [[1.0, -2.0], [3.0, 0.5]]


@pytest.mark.parametrize(
    "links", [lambda: chain(adam, doubled), lambda: chain(negated, chain(adam)), lambda: chain(chain(lion), chain(doubled))]
)
def test_a_chain_never_goes_back(links):
    order = "the order is GRAD -> PRECONDITION -> UPDATE -> WRITE"
    with pytest.raises(ValueError, match=rf"stands behind (adam|negated|lion) \((PRECONDITION|UPDATE)\); {order}"):
        links()


def test_a_rule_without_a_stage_has_that_of_the_link_before():
    for links, wanted in (
        (chain(plus_one), [0]),
        (chain(doubled, plus_one, lion, plus_one, negated, plus_one), [0, 0, 1, 1, 2, 2]),
        (chain(chain(lion), chain(plus_one)), [1, 1]),
        (chain(chain(plus_one), chain(lion)), [0, 1]),
    ):
        assert [int(x.stage) for x in links.place()] == wanted


def test_two_owners_of_a_slot_are_both_named():
    p = torch.ones(2, requires_grad=True)
    both = chain(chain(adam, derive=adam_scalars), chain(lion, derive=lion_scalars))
    with pytest.raises(ValueError, match="two owners of the slot 'exp_avg': adam and lion; borrow it with uses="):
        gradkit.Optimizer([p], both)
    with pytest.raises(ValueError, match="two owners of the slot 'total': accumulate and accumulate"):
        gradkit.Optimizer([p], chain(accumulate, accumulate))


def test_a_borrower_without_an_owner_is_named_with_the_slots_there_are():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="add_total borrows the slot 'total', which no link of the chain owns; .*no slots"):
        gradkit.Optimizer([p], chain(add_total))
    with pytest.raises(ValueError, match="add_total borrows the slot 'total'.*exp_avg"):
        gradkit.Lion([p], transforms=[chain(add_total)])


@each_backend
def test_borrowers_see_the_slot_as_it_stands_where_they_stand(backend):
    """Before its owner: last step's; behind it: this step's; and what one leaves, the next one finds."""
    g = torch.tensor(G)
    assert step(chain(add_total, accumulate), G, backend=backend).tolist() == torch.stack([g[0], g[1] + 2 * g[0]]).tolist()
    assert step(chain(accumulate, add_total), G, backend=backend).tolist() == [*(2 * g.cumsum(0)).tolist()]
    emptied = chain(accumulate, add_total, empty_total, add_total)
    assert step(emptied, G, backend=backend).tolist() == (2 * g).tolist()
    first = chain(empty_total, accumulate)
    assert step(first, G, backend=backend).tolist() == g.tolist()


def test_a_scalar_that_nobody_gives_is_named_with_rule_and_chain():
    p = torch.ones(2, requires_grad=True)
    for links, where_ in ((chain(scaled), r"\(unnamed\)"), (chain(scaled, name="louder", volume=3.0), "louder")):
        with pytest.raises(ValueError, match=rf"scaled asks for the scalar 'strength', which nobody gives.*{where_}.*lr"):
            gradkit.Optimizer([p], links)
    with pytest.raises(ValueError, match="scaled asks for the scalar 'strength'"):
        gradkit.AdamW([p], transforms=[chain(scaled)])


@derive("step")
def from_derive(step):
    return {"strength": 10.0 * step, "step": step, "clock": -1.0}


def itself(strength):
    return strength


@measure(scope="tensor", reduce={"strength": "sum"}, gives=("strength",), finish=itself)
def sum_of_all(u):
    return u


@rule
def times_step(u, step):
    return u * step


@rule
def times_clock(u, clock):
    return u * clock


def test_scalars_are_looked_up_in_one_order():
    """Counters and the clock, the chain's derive, its measures, its arguments, the group."""
    ones = [[1.0, 1.0]] * 2
    group = {"params": [torch.zeros(2, requires_grad=True)], "strength": 2.0}
    optimizer = gradkit.Optimizer([group], chain(scaled), lr=1.0)
    group["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == [-2.0, -2.0]
    assert step(chain(scaled, name="a", strength=3.0), ones).tolist() == [[3.0, 3.0]] * 2
    assert step(chain(sum_of_all, scaled, name="a", strength=3.0), ones).tolist() == [[2.0, 2.0]] * 2
    assert step(chain(sum_of_all, scaled, derive=from_derive, name="a", strength=3.0), ones).tolist() == [[10.0] * 2, [20.0] * 2]
    assert step(chain(times_step, times_clock, derive=from_derive), ones).tolist() == [[1.0] * 2, [4.0] * 2]


def test_a_chain_is_the_scope_of_its_scalars():
    """Two chains with an argument of one name, and a link outside of both."""
    inner = chain(scaled, name="a", strength=3.0)
    assert step(chain(inner, chain(scaled, name="b", strength=5.0)), G[:1]).tolist() == [[15.0, -30.0]]
    with pytest.raises(ValueError, match="scaled asks for the scalar 'strength'"):
        step(chain(inner, scaled), G)


def test_the_same_link_twice_wants_a_name():
    """Two clips passed in silence otherwise, and the last limit won."""
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"two links named 'clip_by_value': give one of them name=, e.g. clip_by_value\("):
        gradkit.Lion([p], transforms=[tx.clip_by_value(1.0), tx.clip_by_value(2.0)])
    with pytest.raises(ValueError, match="two links named 'clip_by_value'"):
        gradkit.Optimizer([p], chain(tx.clip_by_value(1.0)), transforms=[tx.clip_by_value(2.0)])
    with pytest.raises(ValueError, match="two links named 'twice'"):
        gradkit.Lion([p], transforms=[tx.clip_by_value(1.0, name="twice"), tx.clip_by_norm(2.0, name="twice")])


@each_backend
def test_two_named_links_have_values_and_slots_of_their_own(backend):
    p = torch.zeros(2, requires_grad=True)
    slow, fast = tx.grokfast_ema(0.9, 1.0, name="slow"), tx.grokfast_ema(0.5, 2.0, name="fast")
    optimizer = gradkit.Optimizer([p], chain(), lr=1.0, transforms=[slow, fast], backend=backend)
    group = optimizer.param_groups[0]
    assert (group["slow.alpha"], group["fast.alpha"], group["slow.lamb"], group["fast.lamb"]) == (0.9, 0.5, 1.0, 2.0)
    a, b, moved = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for t, row in enumerate(G):
        p.grad = torch.tensor(row)
        optimizer.step()
        a = p.grad if t == 0 else lerp(a, p.grad, 0.1)
        u = p.grad + 1.0 * a
        b = u if t == 0 else lerp(b, u, 0.5)
        moved = moved - (u + 2.0 * b)
        torch.testing.assert_close(p.detach(), moved, **CLOSE)
    assert optimizer.state[p].keys() == {"step", "slow_grad_ema", "fast_grad_ema"}
    torch.testing.assert_close(optimizer.state[p]["slow_grad_ema"], a, **CLOSE)
    group["fast.lamb"] = 0.0  # a link's argument is a hyperparameter like any other
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - (p.grad + lerp(a, p.grad, 0.1)), **CLOSE)


def chain_line(optimizer: gradkit.Optimizer) -> str:
    (line,) = [x.strip() for x in optimizer.explain().splitlines() if x.strip().startswith("chain:")]
    return line


def test_users_transforms_run_at_the_place_that_their_stage_says():
    """User GRAD as given, built-in GRAD, l2, PRECONDITION, built-in UPDATE, user UPDATE, decay and write."""
    p = torch.ones(2, requires_grad=True)
    users = [chain(negated), tx.clip_by_value(1.0), chain(doubled), tx.cautious()]
    optimizer = gradkit.Grokfast([p], weight_decay=0.1, transforms=users)
    assert chain_line(optimizer) == (
        "chain: clip_value -> doubled -> ema_filter -> l2 -> adam -> negated -> agreement -> keep_agreeing -> write"
    )
    other = gradkit.Grokfast([p], weight_decay=0.1, decay="cautious", transforms=users[2:0:-1])
    assert chain_line(other) == "chain: doubled -> clip_value -> ema_filter -> adam -> cautious_decay -> write"


@each_backend
def test_l2_comes_after_the_clip_and_before_the_moments(backend):
    """As torch.optim.Adam behind clip_grad_norm_: the decay isn't clipped."""
    start = [torch.full((3,), 5.0), torch.full((2, 2), -4.0)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    clip = tx.clip_by_global_norm(0.5)
    optimizer = gradkit.AdamW(ours, lr=0.1, weight_decay=0.3, decay="l2", transforms=[clip], backend=backend)
    reference = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.3)
    torch.manual_seed(0)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        assert torch.nn.utils.clip_grad_norm_(theirs, 0.5) > 0.5
        optimizer.step()
        reference.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], **CLOSE)
    torch.testing.assert_close(optimizer.state[ours[0]]["exp_avg"], reference.state[theirs[0]]["exp_avg"], **CLOSE)


@each_backend
@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
def test_one_clip_reaches_over_groups_and_dtypes(norm_type, backend):
    kinds = (torch.float32, torch.float64, torch.float32)
    torch.manual_seed(1)
    start = [torch.randn(s).to(d) for s, d in zip(((4, 3), (5,), ()), kinds, strict=True)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    groups = [[{"params": x[:1], "lr": 0.05}, {"params": x[1:], "weight_decay": 0.2}] for x in (ours, theirs)]
    clip = tx.clip_by_global_norm(0.7, norm_type)
    optimizer = gradkit.AdamW(groups[0], lr=0.1, transforms=[clip], backend=backend)
    reference = torch.optim.AdamW(groups[1], lr=0.1)
    for t in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * (0.01 if t == 2 else 1.0)  # once it is not reached
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type)
        assert (norm > 0.7) == (t != 2)
        optimizer.step()
        reference.step()
    assert ran_on(optimizer) == {backend} and len(optimizer.explain().split("chain:")) == 3
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], **CLOSE)


def test_a_measure_over_all_has_one_value_of_each_argument():
    def groups(**second: Any) -> list[dict[str, Any]]:
        return [{"params": [torch.ones(2, requires_grad=True)]}, {"params": [torch.ones(3, requires_grad=True)], **second}]

    key, clip = "clip_by_global_norm.max_norm", tx.clip_by_global_norm(1.0)
    wanted = r"AdamW: clip_by_global_norm.max_norm is \[1.0, 0.5\] in the groups.*set it alike in every group"
    with pytest.raises(ValueError, match=wanted):
        gradkit.AdamW(groups(**{key: 0.5}), transforms=[clip])
    optimizer = gradkit.AdamW(groups(), transforms=[clip])
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], key: 0.5})
    assert len(optimizer.param_groups) == 2
    params = [g["params"][0] for g in optimizer.param_groups]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[1][key] = 0.5
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert float(optimizer.param_groups[0]["clock"]) == 1 and float(optimizer.state[params[1]]["step"]) == 1
    optimizer.param_groups[0][key] = 0.5
    optimizer.step()
    assert float(optimizer.param_groups[0]["clock"]) == 2


class ByGroup(gradkit.Optimizer):
    """Groups that say which links they run."""

    def __init__(self, params: Any, lr: float = 1.0, links: tuple[str, ...] = (), **options: Any):
        super().__init__(params, lr=lr, links=links, **options)

    def links(self, group: Any) -> gradkit.Chain:
        return chain(*(TRANSFORMS[name] for name in group["links"]))


TRANSFORMS = {"clip": tx.clip_by_global_norm(1.0), "peak": tx.clip_by_global_norm(4.0, math.inf, name="peak")}


@each_backend
def test_a_measure_covers_the_tensors_whose_chain_holds_it(backend):
    params = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    names = (("clip",), (), ("clip",))
    groups = [{"params": [p], "links": n} for p, n in zip(params, names, strict=True)]
    optimizer = ByGroup(groups, backend=backend)
    for p, g in zip(params, (3.0, 100.0, 4.0), strict=True):
        p.grad = torch.tensor([g])
    optimizer.step()
    moves = torch.cat([-p.detach() for p in params])
    torch.testing.assert_close(moves, torch.tensor([0.6, 100.0, 0.8]), **CLOSE)


@each_backend
def test_measures_run_in_an_order_that_suits_every_group(backend):
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1], "links": ("peak", "clip")}, {"params": params[1:], "links": ("clip",)}]
    optimizer = ByGroup(groups, backend=backend)
    params[0].grad, params[1].grad = torch.tensor([8.0]), torch.tensor([3.0])
    optimizer.step()  # 8 -> 4 by its peak, then (4, 3) -> (0.8, 0.6)
    torch.testing.assert_close(torch.cat(params).detach(), torch.tensor([-0.8, -0.6]), **CLOSE)
    groups[1]["links"] = ("clip", "peak")
    crossed = ByGroup([{**g, "params": g["params"]} for g in groups], backend=backend)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="another order in another group: use one order"):
        crossed.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True)) and not crossed.state


@derive("step", "since")
def restarted(step, since, clock, every):
    since = 1 if clock % every == 0 else since
    return {"strength": since, "since": since}


@each_backend
def test_a_counter_that_derive_returns_is_set(backend):
    p = torch.zeros(2, requires_grad=True)
    optimizer = gradkit.Optimizer([p], chain(scaled, derive=restarted, name="ramp", every=3), lr=1.0, backend=backend)
    moves = []
    for _ in range(8):
        before = p.detach().clone()
        p.grad = torch.ones(2)
        optimizer.step()
        moves.append(float((before - p.detach())[0]))
    assert moves == [1, 2, 1, 2, 3, 1, 2, 3]
    assert float(optimizer.state[p]["since"]) == 3 and float(optimizer.state[p]["step"]) == 8


@each_backend
def test_tensors_with_different_counters_have_rows_of_their_own(backend):
    """With its group's row a late parameter's first move of AdamW would be 2.5 lr."""
    params = [torch.zeros(3, requires_grad=True) for _ in range(4)]
    optimizer = gradkit.AdamW(params, lr=0.1, weight_decay=0.0, backend=backend)
    firsts: dict[int, float] = {}
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = torch.ones(3) if t >= i and not (i == 1 and t == 3) else None
            if t == i:
                firsts[i] = t
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            move = (before[i] - p.detach())[0]
            assert float(move) == pytest.approx(0.1 if p.grad is not None else 0.0, rel=1e-5), (t, i)
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 4, 4, 3] and len(firsts) == 4


def two(small, total, floor):
    """Two results of two reductions, arithmetic among scalars, a gate."""
    root = sqrt(total)
    return where(small > floor, 1.0 / root, 1.0), root + 1.0


@measure(scope="tensor", reduce={"small": "max", "total": "sum"}, gives=("gain", "bias"), finish=two)
def sizes(u, p):
    return absolute(u), u * u + p * 0.0


@rule
def standardise(u, p, gain, bias):
    return u * gain + sign(p) * bias


@each_backend
def test_a_measure_may_reduce_and_give_several_values(backend):
    links = chain(sizes, standardise, name="standard", floor=2.5)
    moves = step(links, [[3.0, -4.0], [1.0, 2.0]], start=(1.0, 100.0), backend=backend)
    root = math.sqrt(5.0)
    expected = torch.tensor([[0.6 + 6.0, -0.8 + 6.0], [1.0 - (root + 1.0), 2.0 + root + 1.0]])
    torch.testing.assert_close(moves, expected, rtol=1e-4, atol=1e-4)


RING = Slot("recent", kind="ring", length="window")


@rule(slots=(RING,))
def delayed(u, recent):
    return recent, u


@derive("step")
def counted(step):
    return {}


@each_backend
def test_a_ring_hands_out_what_it_took_a_window_ago(backend):
    rows = [[float(t), -float(t)] for t in range(1, 8)]
    moves = step(chain(delayed, derive=counted, name="late", window=3), rows, backend=backend)
    assert moves[:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"delayed: the ring 'recent' needs @derive\('step'\)"):
        gradkit.Optimizer([p], chain(delayed, name="late", window=3))


def test_chains_may_be_shared_and_nested():
    shared = chain(chain(doubled, plus_one), chain(accumulate))
    a, b = step(shared, G), step(chain(shared), G)
    assert torch.equal(a, b) and a.tolist() == [[3.0, -3.0], [10.0, -1.0]]
    assert step(chain(), G).tolist() == G
