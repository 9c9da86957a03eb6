"""Terms of a loss that are there for its gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradkit.losses import vanishing_gradient_penalty
from tests.reference.vanishing_gradient_penalty import SLOPES, penalty
from tests.tolerance import assert_equal, tolerance

T, BATCH, SIZE = 6, 3, 4
F64 = torch.float64
CLOSE = tolerance("reference", F64)
each_kind = pytest.mark.parametrize("squared", [False, True])


def states(dtype: torch.dtype = F64, factor: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """Hidden states with gradients, of which one is 0, and a recurrent weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, dtype=F64, generator=generator) / 2
    hidden = []
    for t in range(T):
        h = torch.rand(BATCH, SIZE, dtype=F64, generator=generator).to(dtype).requires_grad_()
        h.grad = (factor * torch.randn(BATCH, SIZE, dtype=F64, generator=generator)).to(dtype)
        h.grad[1] *= t != 2
        hidden.append(h)
    return hidden, weight.to(dtype).requires_grad_()


def stacked(hidden: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([h.detach().numpy() for h in hidden]), np.stack([h.grad.numpy() for h in hidden])


@each_kind
@pytest.mark.parametrize("nonlinearity", SLOPES)
def test_penalty_and_gradient_are_the_references(nonlinearity, squared):
    hidden, weight = states()
    omega = vanishing_gradient_penalty(hidden, weight, nonlinearity=nonlinearity, squared=squared)
    omega.backward()
    value, gradient = penalty(*stacked(hidden), weight.detach().numpy(), nonlinearity, squared)
    np.testing.assert_allclose(omega.item(), value, rtol=CLOSE)
    np.testing.assert_allclose(weight.grad.numpy(), gradient, rtol=CLOSE, atol=CLOSE * np.abs(gradient).max())


@each_kind
def test_its_gradient_is_that_of_finite_differences(squared):
    hidden, weight = states()
    assert torch.autograd.gradcheck(lambda w: vanishing_gradient_penalty(hidden, w, squared=squared), weight)


def unrolled(
    nonlinearity: str = "tanh", scale: float = 1.0, dtype: torch.dtype = F64
) -> tuple[nn.RNNCell, list[Tensor], Tensor]:
    """A cell's states, the initial one first, all with their gradients kept; and the loss, of the last alone."""
    torch.manual_seed(1)
    cell = nn.RNNCell(2, SIZE, nonlinearity=nonlinearity, dtype=dtype)
    hidden = [torch.randn(BATCH, SIZE, dtype=dtype, requires_grad=True)]
    for x in torch.randn(T, BATCH, 2, dtype=dtype):
        hidden.append(cell(x, hidden[-1]))
        hidden[-1].retain_grad()
    return cell, hidden, scale * hidden[-1].square().sum()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_ratio_is_what_backward_through_torchs_cell_did(nonlinearity):
    """Where only the last state is in the loss, x_t is the gradient of the state before."""
    cell, hidden, loss = unrolled(nonlinearity)
    loss.backward()
    norms = torch.stack([h.grad.norm(dim=-1) for h in hidden])
    expected = (norms[:-1] / norms[1:] - 1).square().mean()
    assert 0.01 < expected.item() < 1
    omega = vanishing_gradient_penalty(hidden[1:], cell.weight_hh, nonlinearity=nonlinearity)
    np.testing.assert_allclose(omega.item(), expected.item(), rtol=CLOSE)


def test_only_the_recurrent_weight_gets_a_gradient():
    cell, hidden, loss = unrolled()
    loss.backward()
    before = {name: p.grad.clone() for name, p in cell.named_parameters()}
    kept = [h.grad.clone() for h in hidden]
    vanishing_gradient_penalty(hidden[1:], cell.weight_hh).backward()
    changed = [name for name, p in cell.named_parameters() if not torch.equal(p.grad, before[name])]
    assert changed == ["weight_hh"]
    for h, grad in zip(hidden, kept, strict=True):
        assert_equal(h.grad, grad)


@each_kind
def test_a_weight_that_keeps_norms_costs_nothing_and_a_multiple_its_distance_from_one(squared):
    hidden, weight = states()
    turn = torch.linalg.qr(weight.detach()).Q
    for factor in (1.0, 0.5, 3.0):
        omega = vanishing_gradient_penalty(hidden, factor * turn, nonlinearity="linear", squared=squared)
        np.testing.assert_allclose(omega.item(), ((factor**2 if squared else factor) - 1) ** 2, rtol=1e-9, atol=1e-20)


def test_states_without_a_gradient_count_for_nothing():
    """Those at 1e-11 as those at 0; all of them: 0, and a gradient of 0."""
    hidden, weight = states()
    expected = vanishing_gradient_penalty([h for t, h in enumerate(hidden) if t != 4], weight)
    hidden[4].grad *= 1e-11
    assert_equal(vanishing_gradient_penalty(hidden, weight), expected)
    for h in hidden:
        h.grad.zero_()
    omega = vanishing_gradient_penalty(hidden, weight)
    omega.backward()
    assert_equal(omega.detach(), torch.zeros((), dtype=F64))
    assert_equal(weight.grad, torch.zeros(SIZE, SIZE, dtype=F64))


@each_kind
def test_saturated_states_have_a_ratio_of_zero_and_finite_gradients(squared):
    hidden, weight = states()
    for h in hidden:
        h.data.fill_(1.0)
    omega = vanishing_gradient_penalty(hidden, weight, squared=squared)
    omega.backward()
    assert omega.item() == 1.0
    assert_equal(weight.grad, torch.zeros(SIZE, SIZE, dtype=F64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(value):
    hidden, weight = states()
    hidden[3].grad[0, 0] = value
    assert vanishing_gradient_penalty(hidden, weight).isnan()


@each_kind
def test_it_does_not_depend_on_the_scale_of_the_loss(squared):
    values = []
    for factor in (1.0, 2.0**16, 2.0**-16):
        hidden, weight = states(torch.float32, factor)
        omega = vanishing_gradient_penalty(hidden, weight, squared=squared)
        omega.backward()
        values.append((omega.detach(), weight.grad))
    for omega, grad in values[1:]:
        assert_equal(omega, values[0][0])
        assert_equal(grad, values[0][1])


def test_with_a_scaler_the_penalty_is_scaled_as_the_loss():
    grads = []
    for scaled in (False, True):
        cell, hidden, loss = unrolled(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        optimizer = torch.optim.SGD(cell.parameters(), lr=1.0)
        scaler.scale(loss).backward()
        scaler.scale(0.5 * vanishing_gradient_penalty(hidden[1:], cell.weight_hh)).backward()
        scaler.unscale_(optimizer)
        grads.append(cell.weight_hh.grad)
    np.testing.assert_allclose(grads[1].numpy(), grads[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_half_precision_are_seen_under_autocast(dtype):
    """In float16, products of 1e-7 would be zeros, and their ratio 0."""
    hidden, weight = states(dtype, 1e-6)
    exact = [h.detach().double().requires_grad_() for h in hidden]
    for h, half in zip(exact, hidden, strict=True):
        h.grad = half.grad.double()
    expected = vanishing_gradient_penalty(exact, weight.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        omega = vanishing_gradient_penalty(hidden, weight)
    assert omega.dtype == torch.float32
    np.testing.assert_allclose(omega.item(), expected.item(), rtol=tolerance("reference", torch.float32))
    omega.backward()
    assert weight.grad.dtype == dtype


def kept(*shape: int) -> Tensor:
    h = torch.zeros(shape, requires_grad=True)
    h.grad = torch.zeros(shape)
    return h


SQUARE = torch.eye(SIZE)
BAD = [
    ([kept(2, SIZE)], SQUARE, "relu6", ValueError, "nonlinearity='relu6': use one of 'tanh', .*; did you mean 'relu'?"),
    (kept(5, 2, SIZE), SQUARE, "tanh", TypeError, "hidden is a Tensor; give a list with the state of each time step"),
    ([], SQUARE, "tanh", ValueError, "hidden is empty"),
    ([kept(2, SIZE)], torch.zeros(4 * SIZE, SIZE), "tanh", ValueError, r"weight is \(16, 4\); give the recurrent"),
    ([kept(2, SIZE)], torch.zeros(()), "tanh", ValueError, r"weight is \(\); give the recurrent weight"),
    ([kept(2, 3)], SQUARE, "tanh", ValueError, r"hidden\[0\] is \(2, 3\), .* weight \(4, 4\); give states"),
    ([kept(2, SIZE), kept(1, SIZE)], SQUARE, "tanh", ValueError, r"hidden\[1\] is \(1, 4\), hidden\[0\] \(2, 4\)"),
    (
        [kept(2, SIZE), 0 * kept(2, SIZE)],
        SQUARE,
        "tanh",
        ValueError,
        r"hidden\[1\] has no gradient; call h\.retain_grad",
    ),
    (
        [kept(2, SIZE)],
        nn.RNNCell(2, SIZE),
        "tanh",
        TypeError,
        r"weight is RNNCell\(2, 4\); give the recurrent weight, as",
    ),
    ([np.zeros((2, SIZE))], SQUARE, "tanh", TypeError, r"hidden\[0\] is a ndarray; give tensors \[batch, size\]"),
    ([torch.zeros(2, SIZE)], SQUARE, "tanh", ValueError, r"hidden\[0\] has no gradient; .* after loss\.backward\(\)"),
]


@pytest.mark.parametrize(("hidden", "weight", "nonlinearity", "kind", "message"), BAD)
def test_bad_input_is_named_with_what_would_do(hidden, weight, nonlinearity, kind, message):
    with pytest.raises(kind, match=f"^vanishing_gradient_penalty: {message}"):
        vanishing_gradient_penalty(hidden, weight, nonlinearity=nonlinearity)


def test_squared_is_true_or_false():
    with pytest.raises(TypeError, match="^vanishing_gradient_penalty: squared='yes': use True or False"):
        vanishing_gradient_penalty([kept(2, SIZE)], SQUARE, squared="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [list, torch.unbind, lambda x: [x[t] for t in range(len(x))]])
def test_parts_of_the_fused_layers_output_are_refused(apart):
    """Also where each has a gradient: that lacks what came back through time."""
    rnn = nn.RNN(2, SIZE)
    hidden = apart(rnn(torch.randn(T, BATCH, 2))[0])
    for h in hidden:
        h.retain_grad()
    torch.stack(tuple(hidden))[-1].square().sum().backward()
    assert all(h.grad is not None for h in hidden)
    with pytest.raises(ValueError, match=r"hidden\[0\] and hidden\[1\] are parts of one tensor; .* torch.nn.RNNCell"):
        vanishing_gradient_penalty(hidden, rnn.weight_hh_l0)


def test_states_that_are_views_of_their_own_are_states():
    cell, hidden, loss = unrolled()
    loss.backward()
    alone = [torch.stack((h.detach(), h.detach()))[0].requires_grad_() for h in hidden[1:]]
    for h, given in zip(alone, hidden[1:], strict=True):
        h.grad = given.grad
    expected = vanishing_gradient_penalty(hidden[1:], cell.weight_hh)
    assert_equal(vanishing_gradient_penalty(alone, cell.weight_hh).detach(), expected.detach())


def test_before_backward_it_says_in_which_order():
    cell, hidden, _ = unrolled()
    with pytest.raises(ValueError, match=r"hidden\[0\] has no gradient; .* after loss\.backward\(\)"):
        vanishing_gradient_penalty(hidden[1:], cell.weight_hh)
