"""Bad input of splits: refused in one sentence, before anything has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from gradkit.selection import Choices, Turn
from tests.test_bad_input import snapshot

PARTS = ("columns", "rows", "randk")


@gradkit.rule
def doubled(u):
    return u * 2.0


@gradkit.rule(stage=gradkit.Stage.WRITE)
def writes_half(u, p):
    return p - 0.5 * u


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def frugal(params: list[Tensor], **given: Any) -> gradkit.FRUGAL:
    return gradkit.FRUGAL([{"params": params, "role": "matrix"}], **given)


def step(optimizer: gradkit.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.arange(1.0, p.numel() + 1).mul(optimizer.clock + 1).cos().view(p.shape)
    optimizer.step()


def refuses(call: Callable, optimizer: gradkit.Optimizer, kind: type, match: str) -> None:
    """It raises, and nothing has changed."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = snapshot(optimizer, params)
    with pytest.raises(kind, match=match):
        call()
    assert snapshot(optimizer, params) == before


def test_frugal_wants_roles_and_a_matrix():
    p = torch.ones(3, 2, requires_grad=True)
    for groups, says in [
        (
            [{"params": [p], "role": "embedding"}],
            "no matrix among the parameters, and only these .*: use gradkit.AdamW",
        ),
        ([{"params": [p]}], "a group has no role: use gradkit.param_groups"),
        ([{"params": [p], "role": "hidden"}], "role='hidden': use one of 'matrix', 'embedding', 'last', 'vector'"),
    ]:
        with pytest.raises(ValueError, match=f"FRUGAL: {says}"):
            gradkit.FRUGAL(groups)


@pytest.mark.parametrize("kind", PARTS)
def test_a_vector_among_matrices_has_no_parts(kind):
    says = rf"FRUGAL: a parameter of shape \(3,\) is a vector, and split='{kind}' takes .* use split='blocks'"
    with pytest.raises(ValueError, match=says):
        frugal(drawn((4, 6), (3,)), split=kind)
    optimizer = frugal(drawn((4, 6)), split=kind)
    more = {"params": drawn((3,)), "role": "matrix"}
    refuses(lambda: optimizer.add_param_group(more), optimizer, ValueError, says)


def test_a_mirror_takes_pairs():
    optimizer = frugal(drawn((2, 2), (2, 2), (2, 2)), block_order="mirror", density=0.34)
    says = "block_order='mirror' takes pairs, and density selects 1 of 3: make it even"
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    for call in (optimizer.step, optimizer.init_state):
        refuses(call, optimizer, ValueError, says)


def test_what_cannot_stand_with_a_split():
    """What can't stand in one is in test_chain.py."""
    columns, (p,) = gradkit.split("columns", doubled), drawn((4, 6))
    for call, says in [
        (lambda: gradkit.split("rows", writes_half), "writes_half can't stand in it, it is a rule of WRITE: put it"),
        (lambda: gradkit.split("rows", doubled, writes_half), "writes_half can't stand in it, it is a rule of WRITE"),
        (
            lambda: gradkit.Optimizer([p], gradkit.chain(columns, gradkit.split("rows", doubled, name="two"))),
            "two splits in one chain: a chain may have one",
        ),
        (lambda: frugal([p], transforms=[gradkit.split("rows", doubled)]), "two splits in one chain"),
        (lambda: gradkit.Optimizer([p], columns, transforms=[columns]), "two links named 'split': give one .* name="),
        (
            lambda: frugal([p], split="columns", transforms=[tx.adaptive_clip()]),
            "a measure of rows and a split of columns: a chain may have one",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match="split: reset_state='no': use True or False"):
        gradkit.split("rows", doubled, reset_state="no")  # type: ignore[arg-type]


class Given(Choices):
    """Whatever it was made with."""

    def __init__(self, picks: Any):
        self.picks = picks

    def tensors(self, turn: Turn, group: int, count: int) -> Any:
        return self.picks

    def within(self, turn: Turn, index: int, count: int) -> Any:
        return self.picks


NONSENSE = [
    ([1, 99], ValueError),
    ([-1, 2], ValueError),
    (np.array([0, 0]), ValueError),
    (np.array([99]), ValueError),
    ([2, 1], ValueError),
    ([1, 1], ValueError),
    (None, TypeError),
    ({0, 1}, TypeError),
    ([[0, 1]], TypeError),
    ([0.5], TypeError),
    ([True, False], TypeError),
]


@pytest.mark.parametrize("kind", ("blocks", *PARTS))
def test_choices_of_nothing_there_are_refused(kind):
    """Kernels would read and write outside."""
    optimizer = frugal(drawn(*[(4, 3)] * 4), split=kind)
    method = "tensors" if kind == "blocks" else "within"
    last = {"blocks": 3, "columns": 2, "rows": 3, "randk": 11}[kind]
    for picks, error in NONSENSE:
        optimizer.choices = Given(picks)
        for call in (lambda: step(optimizer), optimizer.init_state):
            with pytest.raises(error) as raised:
                call()
            says = f"Given.{method} gave {picks!r}: give whole numbers from 0 to {last}, each once, in ascending order"
            assert str(raised.value) == says and not optimizer.state


@pytest.mark.parametrize("kind", ("blocks", *PARTS))
@pytest.mark.parametrize("given", [{}, {"update_gap": 1}, {"update_gap": 1, "reset_state": False}], ids=str)
def test_a_parameter_of_another_shape_is_refused(kind, given):
    """Also where as much of it would be selected, and where a new selection begins."""
    for shape in ((4, 8), (4, 7), (3, 8)):
        params = drawn((4, 6), (4, 6))
        optimizer = frugal(params, split=kind, density=1.0 if kind == "blocks" else 0.5, **given)
        step(optimizer)
        params[1].grad, params[1].data = None, torch.ones(shape)
        params[1].grad = torch.ones(shape)
        says = rf"shape \({shape[0]}, {shape[1]}\) was \(4, 6\) when its state was made; delete that: del optimizer"
        refuses(optimizer.step, optimizer, ValueError, says)
        del optimizer.state[params[1]]
        optimizer.step()
        assert float(optimizer.state[params[1]]["low_step"]) == 1


def test_a_place_among_all_is_a_part_of_the_selection():
    """Where groups have gone, another part is selected, from what a file of that step has, too."""
    first, *params = drawn((2,), (6, 8), (4, 8))
    optimizer = gradkit.FRUGAL(
        [{"params": [first], "role": "vector"}, {"params": params, "role": "matrix"}], split="rows"
    )
    step(optimizer)
    del optimizer.param_groups[0], optimizer.state[first]
    step(optimizer)
    assert all(optimizer.state[p]["low_step"] == 1 for p in params)
    others = [p.detach().clone().requires_grad_() for p in params]
    again = frugal(others, split="rows")
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        step(one)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_file_of_other_choices_is_refused():
    """Where it shows: as many other columns can't be told apart."""
    params = drawn((4, 6), (4, 6))
    for kind, picks, says in [
        ("blocks", [1], "'low_exp_avg' of parameter 0 belongs to another selection than step 1 of seed 0 has; load it"),
        ("columns", [1], r"'low_exp_avg' of parameter 0 has shape \(4, 3\), it needs \(4, 1\)"),
        ("columns", [], "'low_exp_avg' of parameter 0 belongs to another selection"),
    ]:
        first, then = (frugal(params, split=kind, density=0.5) for _ in range(2))
        first.choices = Given([0] if kind == "blocks" else [0, 2, 4])
        then.choices = Given(picks)
        for optimizer in (first, then):
            step(optimizer)
        refuses(lambda f=first, t=then: t.load_state_dict(f.state_dict()), then, ValueError, f"load_state_dict: {says}")


def test_a_slot_that_was_edited_is_refused():
    optimizer = frugal(drawn((4, 6), (4, 6)), split="columns", density=0.5)
    step(optimizer)
    file = optimizer.state_dict()
    file["state"] = {n: {**state} for n, state in file["state"].items()}
    file["state"][1]["low_exp_avg_sq"] = torch.zeros(4, 6)
    says = r"'low_exp_avg_sq' of parameter 1 has shape \(4, 6\), it needs \(4, 3\)"
    refuses(lambda: optimizer.load_state_dict(file), optimizer, ValueError, says)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer)


def test_a_file_that_lacks_the_state_of_what_is_selected_says_so(caplog):
    params = drawn((4, 6), (4, 6))
    full, empty = (frugal(params, density=density) for density in (1.0, 0.0))
    step(full)
    step(empty)
    file = full.state_dict()
    file["state"] = {}
    full.load_state_dict(file)
    (record,) = caplog.records
    assert record.getMessage() == "FRUGAL: the state dict lacks low_exp_avg, low_exp_avg_sq, low_step: it starts fresh"
    caplog.clear()
    full.load_state_dict(frugal(params, density=1.0).state_dict())  # of no step
    empty.load_state_dict(empty.state_dict())
    assert not caplog.records


@pytest.mark.parametrize(
    ("at", "kind"), [(-1, ValueError), (1.5, ValueError), (float("nan"), ValueError), (None, TypeError)]
)
def test_state_is_made_as_at_a_step(at, kind):
    optimizer = frugal(drawn((4, 6)))
    says = f"FRUGAL.init_state: step={at}: give a whole number >= 0"
    refuses(lambda: optimizer.init_state(step=at), optimizer, kind, says)
    optimizer.init_state(step=torch.tensor(3.0))  # as groups hold it
