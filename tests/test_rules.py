"""Rules: all that the language takes, with Python's meaning on every backend; rules without source; pickling."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import Stage, chain, fn, rule
from gradkit.ops import absolute, exp, isfinite, lerp, minimum, sign, sqrt, tanh, where
from gradkit.ops import maximum as larger
from tests.cases import BACKENDS
from tests.runs import ran_on


@fn
def halved(x):
    return 0.5 * x


@fn
def softened(x, limit):
    """An @fn may call another, and take values and scalars."""
    small = halved(x)
    return where(absolute(x) > limit, tanh(small) * limit, x)


@rule(slots=("s",))
def everything_allowed(u, p, g, s, k, gate):
    """All constructs at once."""
    both = (u > 0.0) & (g <= k) | ~(p >= 1e-1)
    v = -u + p * 2.0 * k / (1.0 + exp(-p))  # a comment
    v = where(both & isfinite(v), v, lerp(v, s, k))
    v = where(gate > 0.5, v, -3.5e-1)
    v = softened(
        larger(v, minimum(s, k)),
        k,
    )
    t = where(sign(u) < 0.25, s, k)
    return v * sqrt(absolute(g)), t - u * 0.125


@gradkit.derive("step")
def given(step):
    return {"k": 0.75, "gate": step > 1}


def by_hand(u: Tensor, p: Tensor, s: Tensor, k: float, gate: bool) -> tuple[Tensor, Tensor]:
    both = ((u > 0) & (u <= k)) | ~(p >= 0.1)
    v = -u + p * 2 * k / (1 + torch.exp(-p))
    v = torch.where(both & v.isfinite(), v, v + (s - v) * k)
    v = v if gate else torch.full_like(v, -0.35)
    v = torch.maximum(v, s.clamp(max=k))
    v = torch.where(v.abs() > k, torch.tanh(v / 2) * k, v)
    return v * u.abs().sqrt(), torch.where(u.sign() < 0.25, s, torch.full_like(s, k)) - u * 0.125


@pytest.mark.parametrize("backend", ["eager", "chunked", "native"])
def test_all_that_is_taken_means_what_python_means(backend):
    torch.manual_seed(0)
    p = torch.randn(200, dtype=torch.float64, requires_grad=True)
    optimizer = gradkit.Optimizer([p], chain(everything_allowed, derive=given), lr=0.1, backend=backend)
    expected, slot = p.detach().clone(), torch.zeros(200, dtype=torch.float64)
    for t in range(3):
        p.grad = torch.randn(200, dtype=torch.float64)
        p.grad[:2] = torch.tensor([torch.inf, 0.0])
        u, slot = by_hand(p.grad, expected, slot, 0.75, t > 0)
        expected = expected - 0.1 * u
        optimizer.step()
    assert ran_on(optimizer) == {backend}
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(optimizer.state[p]["s"], slot, rtol=1e-12, atol=1e-12)
    assert slot.isinf().any() and expected[1:].isfinite().all()


def typed_into_a_prompt(text: str, name: str) -> Any:
    names: dict[str, Any] = {"rule": rule, "fn": fn, "where": where, "sign": sign, "halved": halved, "Stage": Stage}
    exec(compile(text, "<stdin>", "exec"), names)
    return names[name]


@pytest.mark.parametrize(
    "text",
    [
        "@rule(stage=Stage.GRAD)\ndef prompt(u):\n    return where(u > 0.0, u, 0.5 * u)",
        "@fn\ndef leak(x):\n    return where(x > 0.0, x, 0.5 * x)\n@rule\ndef prompt(u):\n    return leak(u)",
    ],
    ids=["rule", "fn and rule"],
)
def test_a_rule_without_source_runs_on_eager_and_chunked_and_the_plan_says_so(text):
    prompt = typed_into_a_prompt(text, "prompt")
    runs = []
    for backend, ran in (("auto", "chunked"), ("eager", "eager"), ("chunked", "chunked")):
        p = torch.linspace(-1, 1, 5).requires_grad_()
        optimizer = gradkit.Optimizer([p], chain(prompt), lr=0.5, backend=backend)
        p.grad = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
        optimizer.step()
        assert ran_on(optimizer) == {ran}
        assert ("the source of prompt can't be read" in optimizer.explain()) == (backend == "auto")
        runs.append(p.detach())
    assert torch.equal(runs[0], torch.tensor([-0.5, -0.25, 0.0, 0.0, 0.0]))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer = gradkit.Optimizer([p], chain(prompt), backend="native")
    with pytest.raises(RuntimeError, match="backend='native' can't run: the source of prompt can't be read.*'auto'"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state and float(optimizer.param_groups[0]["clock"]) == 0


def test_rules_derives_and_measures_pickle_by_name():
    from gradkit.optim.adamw import adam, adam_scalars
    from gradkit.transforms.clip import squares

    for link in (everything_allowed, given, adam, adam_scalars, squares):
        assert pickle.loads(pickle.dumps(link)) is link
        assert copy.deepcopy(link) is link and copy.deepcopy([link])[0] is link
    whole = chain(everything_allowed, derive=given)
    again = pickle.loads(pickle.dumps(whole))
    assert again.items == whole.items and again.derive is given

    @rule
    def local(u):
        return u

    with pytest.raises(AttributeError, match="Can't pickle local object"):
        pickle.dumps(local)


def test_a_rule_is_still_the_function():
    u, p, s = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 2.0]), torch.zeros(2)
    out, slot = everything_allowed(u, p, u, s, torch.tensor(0.75), torch.tensor(1.0))
    wanted, kept = by_hand(u, p, s, 0.75, True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(slot, kept)
    assert everything_allowed.name == "everything_allowed"
    assert everything_allowed.fn.__doc__ == "All constructs at once."
    assert float(lerp(torch.tensor(1.0), torch.tensor(3.0), 0.5)) == 2.0 and math.isclose(halved(3.0), 1.5)


@rule
def scribbles(u, p, g, k):
    """Every parameter is a name of the rule's own."""
    g = g * 2.0
    p = p + 1.0
    k = u * k
    return p + g + k


@rule
def sums(u, p, g, k):
    return u + p * 10.0 + g * 100.0 * k


@pytest.mark.parametrize("backend", ["eager", "chunked", "native"])
def test_what_a_rule_does_to_its_names_no_other_link_sees(backend):
    p = torch.tensor([1.0, -2.0], requires_grad=True)
    p.grad = torch.tensor([1.0, 2.0])
    gradkit.Optimizer([p], chain(scribbles, sums, name="both", k=3.0), lr=1.0, backend=backend).step()
    # p + 1 + 2 g + 3 g, then + 10 p + 300 g
    assert p.tolist() == [1.0 - (1 + 1 + 5 + 10 + 300), -2.0 - (-2 + 1 + 10 - 20 + 600)]


@rule(slots=("kept", "moved"), stage=Stage.PRECONDITION)
def reads_one(u, kept, moved):
    moved = moved + u
    return u + kept, kept, moved


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_no_rule_changes_is_not_stored(backend):
    p = torch.zeros(3, requires_grad=True)
    optimizer = gradkit.Optimizer([p], chain(reads_one), lr=1.0, backend=backend)
    assert reads_one.changes == (False, True)
    optimizer.init_state()
    optimizer.state[p]["kept"].fill_(2.0)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    state = optimizer.state[p]
    assert (p.tolist(), state["kept"].tolist(), state["moved"].tolist()) == ([-6.0] * 3, [2.0] * 3, [2.0] * 3)
    assert "24 bytes an element" in optimizer.explain()  # p, g, kept, moved read; p, moved written
