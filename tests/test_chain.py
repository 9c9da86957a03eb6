"""Chains: their order, slots, scalars, counters and names, and where a user's transforms go."""

import pytest
import torch

import gradkit
from gradkit import Stage, chain, rule
from gradkit import transforms as tx
from gradkit.ops import lerp
from gradkit.optim.adamw import adam, adam_scalars
from gradkit.optim.lion import lion, lion_scalars
from tests.cases import BACKENDS
from tests.moves import G, moves
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


@pytest.mark.parametrize(
    "links",
    [lambda: chain(adam, doubled), lambda: chain(negated, chain(adam)), lambda: chain(chain(lion), chain(doubled))],
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


def test_a_chain_may_say_the_stage_of_its_first_links():
    for links, wanted in (
        (chain(plus_one, stage=Stage.UPDATE), [2]),
        (chain(chain(plus_one), plus_one, stage=Stage.PRECONDITION), [1, 1]),
        (chain(plus_one, negated, plus_one, stage=Stage.PRECONDITION), [1, 2, 2]),
        (chain(doubled, chain(plus_one, stage=Stage.PRECONDITION), plus_one), [0, 1, 1]),
    ):
        assert [int(x.stage) for x in links.place()] == wanted


@pytest.mark.parametrize(
    "links",
    [
        lambda: chain(negated, chain(plus_one, stage=Stage.PRECONDITION)),
        lambda: chain(lion, chain(chain(plus_one), stage=Stage.GRAD)),
        lambda: chain(doubled, stage=Stage.PRECONDITION) and chain(plus_one, doubled, stage=Stage.PRECONDITION),
    ],
)
def test_a_chain_with_a_stage_doesnt_go_back_either(links):
    with pytest.raises(ValueError, match="(plus_one|doubled) .* stands behind .* the order is GRAD -> PRECONDITION"):
        links()


def test_a_stage_of_a_chain_is_a_stage():
    with pytest.raises(TypeError, match="chain: stage='update'; use one of Stage.GRAD, Stage.PRECONDITION"):
        chain(plus_one, stage="update")


@each_backend
def test_l2_comes_before_a_chain_of_the_stage_precondition(backend):
    g = torch.tensor(G)
    clip = tx.clip_by_value(0.1, name="own")
    for stage, wanted in ((Stage.PRECONDITION, (g + 2.0).clamp(-0.1, 0.1)), (None, g.clamp(-0.1, 0.1) + 2.0)):
        p = torch.ones(g.shape[1], requires_grad=True)
        made = chain(clip, stage=stage)
        optimizer = gradkit.Optimizer([p], made, lr=1.0, weight_decay=2.0, decay="l2", backend=backend)
        p.grad = g[0].clone()
        optimizer.step()
        torch.testing.assert_close(1.0 - p.detach(), wanted[0], **CLOSE)


def test_two_owners_of_a_slot_are_both_named():
    p = torch.ones(2, requires_grad=True)
    both = chain(chain(adam, derive=adam_scalars), chain(lion, derive=lion_scalars))
    with pytest.raises(ValueError, match="two owners of the slot 'exp_avg': adam and lion; borrow it with uses="):
        gradkit.Optimizer([p], both)
    with pytest.raises(ValueError, match="two owners of the slot 'total': accumulate and accumulate"):
        gradkit.Optimizer([p], chain(accumulate, accumulate))


def test_a_borrower_without_an_owner_is_named_with_the_slots_there_are():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(
        ValueError, match="add_total borrows the slot 'total', which no link of the chain owns; .*no slots"
    ):
        gradkit.Optimizer([p], chain(add_total))
    with pytest.raises(ValueError, match="add_total borrows the slot 'total'.*exp_avg"):
        gradkit.Lion([p], transforms=[chain(add_total)])


@each_backend
def test_borrowers_see_the_slot_as_it_stands_where_they_stand(backend):
    """Before its owner: last step's; behind it: this step's; and what one leaves, the next one finds."""
    g = torch.tensor(G)
    assert (
        moves(chain(add_total, accumulate), G, backend=backend).tolist()
        == torch.stack([g[0], g[1] + 2 * g[0]]).tolist()
    )
    assert moves(chain(accumulate, add_total), G, backend=backend).tolist() == [*(2 * g.cumsum(0)).tolist()]
    emptied = chain(accumulate, add_total, empty_total, add_total)
    assert moves(emptied, G, backend=backend).tolist() == (2 * g).tolist()
    first = chain(empty_total, accumulate)
    assert moves(first, G, backend=backend).tolist() == g.tolist()


def test_the_same_link_twice_wants_a_name():
    """Two clips passed in silence otherwise, and the last limit won."""
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"two links named 'clip_by_value': give one of them name=, e.g. clip_by_value\("
    ):
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
    assert optimizer.state[p].keys() == {"filter_step", "slow_grad_ema", "fast_grad_ema"}
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
        "chain: clip_by_value.clip_value -> doubled -> ema_filter -> l2 -> adam -> negated -> cautious.agreement -> "
        "cautious.keep_agreeing -> write"
    )
    other = gradkit.Grokfast([p], weight_decay=0.1, decay="cautious", transforms=users[2:0:-1])
    assert chain_line(other) == (
        "chain: doubled -> clip_by_value.clip_value -> ema_filter -> adam -> cautious_decay -> write"
    )


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


def test_chains_may_be_shared_and_nested():
    shared = chain(chain(doubled, plus_one), chain(accumulate))
    a, b = moves(shared, G), moves(chain(shared), G)
    assert torch.equal(a, b) and a.tolist() == [[3.0, -3.0], [10.0, -1.0]]
    assert moves(chain(), G).tolist() == G


def test_a_splits_density_and_gap_stand_in_the_group_and_can_be_changed_there():
    p = torch.zeros(8, 8, requires_grad=True)
    optimizer = gradkit.Optimizer([p], gradkit.split("columns", doubled, density=0.5), lr=1.0)
    group = optimizer.param_groups[0]
    assert (group["split.density"], group["split.update_gap"]) == (0.5, 200)
    p.grad = torch.ones(8, 8)
    for density, columns in (0.5, 4), (0.25, 2), (1.0, 8), (0.0, 0):
        group["split.density"], before = density, p.detach().clone()
        optimizer.step()
        assert (before - p.detach()).sum().item() == 2.0 * 8 * columns
    group["split.density"] = 1.5
    with pytest.raises(ValueError, match=r"split\.density=1\.5: give a number in \[0, 1\]"):
        optimizer.step()
    over = gradkit.Optimizer([{"params": [p], "split.density": 0.25}], gradkit.split("columns", doubled, density=0.5))
    assert "16 elements selected" in over.explain()


@pytest.mark.parametrize("who", [lambda d: gradkit.split("rows", doubled, density=d), lambda d: frugal(density=d)])
def test_a_density_is_a_share(who):
    for density in (0.0, 1.0):
        who(density)
    for density in (-0.1, 1.0001, float("nan")):
        with pytest.raises(ValueError, match=r"density=.*: give a number in \[0, 1\]"):
            who(density)


def frugal(**given):
    return gradkit.FRUGAL([{"params": [torch.zeros(2, 2, requires_grad=True)], "role": "matrix"}], **given)


def test_a_split_takes_rules_alone_and_refuses_what_has_no_state_to_stand_on():
    p = torch.zeros(4, 4, requires_grad=True)
    optimizer = gradkit.Optimizer([p], gradkit.split("randk", accumulate, doubled, density=0.25), lr=1.0)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.state[p]["low_total"].tolist() == [1.0] * 4 and -p.detach().sum().item() == 4.0 + 2.0 * 12
    inner = gradkit.split("rows", doubled)
    for inside, outside, why in [
        (tx.clip_by_norm(1.0), None, "clip_by_norm.squares_of_each can't stand in it, it is a measure"),
        (tx.grokfast_ma(3), None, "grokfast_ma.ma_filter keeps a ring"),
        (doubled, accumulate, "accumulate keeps or borrows state, which the rest has none of"),
        (inner, None, "another split stands in it: a chain may have one"),
        (chain(), doubled, "the chain for what is selected is empty"),
    ]:
        with pytest.raises(ValueError, match=why):
            gradkit.split("columns", inside, outside)
