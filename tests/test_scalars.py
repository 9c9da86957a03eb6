"""Scalars: where each comes from, who may see it, counters that derive sets, rows of the table, rings."""

import pytest
import torch

import gradkit
from gradkit import Slot, chain, derive, measure, rule
from tests.cases import BACKENDS
from tests.moves import G, moves

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@rule
def scaled(u, strength):
    return u * strength


def test_a_scalar_that_nobody_gives_is_named_with_rule_and_chain():
    p = torch.ones(2, requires_grad=True)
    for links, where_ in ((chain(scaled), r"\(unnamed\)"), (chain(scaled, name="louder", volume=3.0), "louder")):
        with pytest.raises(
            ValueError, match=rf"scaled asks for the scalar 'strength', which nobody gives.*{where_}.*lr"
        ):
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
    assert moves(chain(scaled, name="a", strength=3.0), ones).tolist() == [[3.0, 3.0]] * 2
    assert moves(chain(sum_of_all, scaled, name="a", strength=3.0), ones).tolist() == [[2.0, 2.0]] * 2
    assert moves(chain(sum_of_all, scaled, derive=from_derive, name="a", strength=3.0), ones).tolist() == [
        [10.0] * 2,
        [20.0] * 2,
    ]
    assert moves(chain(times_step, times_clock, derive=from_derive), ones).tolist() == [[1.0] * 2, [4.0] * 2]


def test_a_chain_is_the_scope_of_its_scalars():
    """Two chains with an argument of one name, and a link outside of both."""
    inner = chain(scaled, name="a", strength=3.0)
    assert moves(chain(inner, chain(scaled, name="b", strength=5.0)), G[:1]).tolist() == [[15.0, -30.0]]
    with pytest.raises(ValueError, match="scaled asks for the scalar 'strength'"):
        moves(chain(inner, scaled), G)


@derive("step", "since")
def restarted(step, since, clock, every):
    since = 1 if clock % every == 0 else since
    return {"strength": since, "since": since}


@each_backend
def test_a_counter_that_derive_returns_is_set(backend):
    p = torch.zeros(2, requires_grad=True)
    optimizer = gradkit.Optimizer([p], chain(scaled, derive=restarted, name="ramp", every=3), lr=1.0, backend=backend)
    taken = []
    for _ in range(8):
        before = p.detach().clone()
        p.grad = torch.ones(2)
        optimizer.step()
        taken.append(float((before - p.detach())[0]))
    assert taken == [1, 2, 1, 2, 3, 1, 2, 3]
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
    taken = moves(chain(delayed, derive=counted, name="late", window=3), rows, backend=backend)
    assert taken[:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"delayed: the ring 'recent' needs @derive\('step', ...\) on its chain"):
        gradkit.Optimizer([p], chain(delayed, name="late", window=3))
