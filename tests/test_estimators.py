"""Estimates of the Hessian's diagonal against the exact one, and what they leave alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradkit import estimators
from gradkit.estimators import gnb_labels, hutchinson

DISTRIBUTIONS = estimators.DISTRIBUTIONS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def parabola(*params: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A loss without mixed second derivatives, and its Hessian's diagonal, of both signs."""
    curvatures = [torch.randn_like(p) for p in params]
    return torch.stack([(c * p * p).sum() / 2 for c, p in zip(curvatures, params, strict=True)]).sum(), curvatures


def coupled(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor]:
    """A loss with mixed second derivatives over two parameters, and the Hessian's diagonal of all five."""
    a, b = leaf(3, dtype=dtype), leaf(2, dtype=dtype)

    def loss(x: Tensor) -> Tensor:
        return (x[0] * x[3]).sin() + (x * x).prod() + x.pow(4).sum() + x[1] * x[2] * x[4]

    x = torch.cat((a, b))
    return loss(x), [a, b], torch.autograd.functional.hessian(loss, x.detach()).diagonal()


def test_one_rademacher_sample_is_exact_where_the_hessian_is_diagonal():
    params = [leaf(4), leaf(2, 3)]
    loss, curvatures = parabola(*params)
    for found, exact in zip(hutchinson(loss, params), curvatures, strict=True):
        torch.testing.assert_close(found, exact)
    gaussian = hutchinson(loss, params, distribution="gaussian")
    assert not torch.allclose(gaussian[0], curvatures[0], rtol=0.1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_over_samples_is_the_diagonal(distribution):
    loss, params, exact = coupled()
    samples = 1500
    each = torch.stack([torch.cat(hutchinson(loss, params, distribution=distribution)) for _ in range(samples)])
    error = each.std(0) / samples**0.5
    assert (error > 0).all() and (error < 0.1 * exact.abs().max()).all()
    assert ((each.mean(0) - exact).abs() < 4 * error).all()


def test_samples_are_averaged():
    loss, params, _ = coupled()
    torch.manual_seed(3)
    together = hutchinson(loss, params, samples=5, distribution="gaussian")
    torch.manual_seed(3)
    alone = [hutchinson(loss, params, distribution="gaussian") for _ in range(5)]
    for found, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each).mean(0))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_directions_have_mean_zero_and_mean_square_one(distribution, dtype):
    u = estimators.drawn(torch.zeros(100_000, dtype=dtype), distribution)
    assert u.dtype == dtype and not u.requires_grad
    assert abs(float(u.double().mean())) < 4 / u.numel() ** 0.5
    assert abs(float(u.double().square().mean()) - 1) < 4 * (2 / u.numel()) ** 0.5
    if distribution == "rademacher":
        assert set(u.tolist()) == {-1.0, 1.0}


def test_gradients_are_left_alone_and_the_loss_still_goes_backward():
    params = [leaf(3), leaf(3)]
    loss = (params[0] * params[1]).exp().sum()
    expected = torch.autograd.grad(loss, params, retain_graph=True)
    kept = torch.ones(3)
    params[0].grad = kept
    hutchinson(loss, params, samples=2)
    assert params[0].grad is kept and torch.equal(kept, torch.ones(3)) and params[1].grad is None
    params[0].grad = None
    loss.backward()
    for p, g in zip(params, expected, strict=True):
        assert torch.equal(p.grad, g)
    with pytest.raises(RuntimeError, match=r"^hutchinson: loss.backward\(\) has freed the graph of the loss; call hut"):
        hutchinson(loss, params)


def test_the_loop_needs_no_gradient_mode():
    p = leaf(4)
    loss, (curvature,) = parabola(p)
    with torch.no_grad():
        (found,) = hutchinson(loss, [p])
    torch.testing.assert_close(found, curvature)
    assert not found.requires_grad


def test_what_the_loss_does_not_curve_has_zeros_in_order():
    curved, linear, unused, frozen = leaf(2), leaf(3), leaf(4), torch.randn(5)
    loss = 3 * curved.square().sum() + linear.sum() + frozen.sum()
    found = hutchinson(loss, iter([unused, curved, frozen, linear]))
    torch.testing.assert_close(found, [torch.zeros(4), torch.full((2,), 6.0), torch.zeros(5), torch.zeros(3)])
    assert hutchinson(linear.sum(), [linear])[0].tolist() == [0.0] * 3
    assert hutchinson(frozen.sum(), [frozen])[0].tolist() == [0.0] * 5


def test_named_parameters_are_parameters():
    model = torch.nn.Linear(3, 2)
    loss = model(torch.randn(4, 3)).square().sum()
    torch.manual_seed(1)
    plain = hutchinson(loss, model.parameters())
    torch.manual_seed(1)
    assert all(map(torch.equal, plain, hutchinson(loss, model.named_parameters())))


def test_halves_are_averaged_in_float32():
    p = leaf(4, dtype=torch.bfloat16)
    loss, (curvature,) = parabola(p)
    (found,) = hutchinson(loss, [p], samples=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, curvature.float(), rtol=1e-6, atol=0)


def test_fused_attention_gets_an_error_with_the_remedy():
    q = leaf(1, 2, 8, 16)

    def loss() -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()

    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        hutchinson(loss(), [q])
    with sdpa_kernel(SDPBackend.MATH):
        plain = loss()
    (found,) = hutchinson(plain, [q])
    assert found.isfinite().all() and found.abs().sum() > 0


def test_a_compiled_model_gets_an_error_with_the_remedy():
    """Also where torch itself raises nothing, and has zeros."""
    q = leaf(3)
    torch._dynamo.reset()
    loss = torch.compile(lambda x: x.exp().sum(), backend="aot_eager")(q)
    for given in (loss, (3 * q).sum() + loss.square()):
        with pytest.raises(
            RuntimeError, match="^hutchinson: a part of the loss is from torch.compile, which has no second"
        ):
            hutchinson(given, [q])


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("of the model's own")


def test_other_errors_of_torch_pass():
    p = leaf(2)
    with pytest.raises(RuntimeError, match="^of the model's own$"):
        hutchinson(Broken.apply(p).sum(), [p])


LEAF = torch.ones(2, requires_grad=True)
MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2))
REFUSED = [  # loss, params, what it says
    (LEAF.sum(), LEAF, TypeError, "params=a Tensor of shape|params=tensor.*: give a list of tensors, or model.par"),
    (LEAF.sum(), MODEL[0], TypeError, "params=Linear.*: give a list of tensors, or model.parameters()"),
    (LEAF.sum(), {"w": LEAF}, TypeError, "params={.*: give a list of tensors, or model.parameters()"),
    (LEAF.sum(), MODEL, TypeError, r"params\[0\] is Linear.*; give tensors or \(name, tensor\) pairs"),
    (LEAF.sum(), ["w"], TypeError, r"params\[0\] is 'w'; give tensors or \(name, tensor\) pairs"),
    (
        LEAF.sum(),
        [{"params": [LEAF]}],
        TypeError,
        r"params\[0\] is {.*\[p for group in optimizer.param_groups for p in",
    ),
    (
        LEAF.sum(),
        iter(()),
        ValueError,
        r"params is empty; an iterator such as model.parameters\(\) can be read only once",
    ),
    (2.5, [LEAF], TypeError, r"loss=2.5: give the tensor, not its item\(\)"),
    (2 * LEAF, [LEAF], ValueError, r"loss has the shape \(2,\); give one number, its mean\(\) or sum\(\)"),
    (
        LEAF.sum().detach(),
        [LEAF],
        ValueError,
        r"the loss has no graph; compute it outside torch.no_grad\(\), and don't",
    ),
]


@pytest.mark.parametrize(("loss", "params", "kind", "says"), REFUSED, ids=[x[3][:24] for x in REFUSED])
def test_what_hutchinson_cannot_use_is_named_with_what_would_do(loss, params, kind, says):
    with pytest.raises(kind, match=f"^hutchinson: {says}"):
        hutchinson(loss, params)


def test_arguments_of_hutchinson_are_checked():
    p = leaf(2)
    with pytest.raises(ValueError, match="hutchinson: samples=0: give a whole number >= 1"):
        hutchinson(p.sum(), [p], samples=0)
    with pytest.raises(ValueError, match="distribution='normal': use one of 'rademacher', 'gaussian'"):
        hutchinson(p.sum(), [p], distribution="normal")


def regression(ignored: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weights, targets of a softmax regression, and Gauss-Newton's diagonal over the targets that count."""
    x, weight = torch.randn(6, 3), torch.randn(4, 3)
    targets = torch.randint(4, (6,))
    targets[:ignored] = -100
    p, counts = (x @ weight.T).softmax(-1), targets != -100
    exact = torch.einsum("nc,nd->cd", (p * (1 - p))[counts], x[counts].square()) / counts.sum()
    return x, weight, targets, exact


@pytest.mark.parametrize("ignored", [0, 2])
def test_squared_gradients_on_drawn_labels_average_to_gauss_newtons_diagonal(ignored):
    x, weight, targets, exact = regression(ignored)
    draws = 20_000
    logits = (x @ weight.T).expand(draws, -1, -1)
    labels = gnb_labels(logits, targets=targets.expand(draws, -1))
    count = (labels[0] != -100).sum()
    assert count == 6 - ignored

    def gradient(label: Tensor) -> Tensor:
        return torch.func.grad(lambda w: F.cross_entropy(x @ w.T, label))(weight)

    each = count * torch.func.vmap(gradient)(labels).square()
    error = each.std(0) / draws**0.5
    assert (error < 0.05 * exact).all() and ((each.mean(0) - exact).abs() < 4 * error).all()


def test_labels_are_drawn_with_their_probabilities():
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf])
    draws = 50_000
    for given in (logits, logits.bfloat16(), logits.double()):
        labels = gnb_labels(given.expand(draws, 4))
        assert labels.dtype == torch.int64 and labels.shape == (draws,)
        p = logits.softmax(-1)
        share = labels.bincount(minlength=4) / draws
        assert share[3] == 0 and ((share - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()


def test_labels_have_the_shape_of_the_targets_and_ignore_what_they_ignore():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    targets[0, 1] = targets[1, 4] = 3
    drawn = gnb_labels(logits)
    assert drawn.shape == (2, 5) and not drawn.requires_grad and ((drawn >= 0) & (drawn < 7)).all()
    masked = gnb_labels(logits, ignore_index=3, targets=targets)
    assert (masked[targets == 3] == 3).all()
    assert torch.equal(gnb_labels(logits, targets=targets) == -100, torch.zeros(2, 5, dtype=torch.bool))
    assert F.cross_entropy(logits.flatten(0, 1), gnb_labels(logits).flatten()).isfinite()


def test_labels_are_drawn_a_few_rows_at_a_time(monkeypatch):
    """The noise needs no more memory than the limit, whatever the batch; each row still has noise of its own."""
    monkeypatch.setattr(estimators, "NOISE", 100)
    sizes = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **given: sizes.append(x.numel()) or real(x, **given))
    labels = gnb_labels(torch.zeros(37, 8))
    assert sum(sizes) == 37 * 8 and max(sizes) <= 100
    assert len(labels.unique()) == 8


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets of shape \(5, 2\) for logits of \(2, 5, 7\)"):
        gnb_labels(torch.zeros(2, 5, 7), targets=torch.zeros(5, 2, dtype=torch.int64))


LOGITS = torch.zeros(2, 5, 7)
UNUSABLE = [
    (
        (LOGITS, torch.zeros(2, 5, dtype=torch.int64)),
        {},
        "ignore_index=a Tensor of shape .2, 5.* labels of the data are",
    ),
    (
        (LOGITS, torch.tensor(3)),
        {},
        r"ignore_index=tensor\(3\): give a whole number; the labels of the data are targets=",
    ),
    ((LOGITS, 2.5), {}, "ignore_index=2.5: give a whole number"),
    ((LOGITS, True), {}, "ignore_index=True: give a whole number"),
    (
        (LOGITS,),
        {"targets": torch.zeros(2, 5)},
        "targets=a Tensor .*dtype torch.float32: give a tensor of whole numbers",
    ),
    ((LOGITS,), {"targets": [[0] * 5] * 2}, r"targets=\[\[0, .*: give a tensor of whole numbers"),
    (([[0.0, 1.0]],), {}, r"logits=\[\[0.0, 1.0\]\]: give a floating tensor \[..., classes\]"),
    ((torch.tensor(1.0),), {}, r"logits=tensor\(1.\): give a floating tensor"),
    ((torch.ones(2, 3, dtype=torch.int64),), {}, "logits=.*: give a floating tensor"),
]


@pytest.mark.parametrize(("given", "named", "says"), UNUSABLE, ids=[x[2][:24] for x in UNUSABLE])
def test_what_gnb_labels_cannot_use_is_named_with_what_would_do(given, named, says):
    with pytest.raises(TypeError, match=f"^gnb_labels: {says}"):
        gnb_labels(*given, **named)


def test_an_ignored_label_may_be_a_number_of_numpy():
    targets = torch.tensor([1, 4])
    assert gnb_labels(torch.zeros(2, 3), np.int64(4), targets=targets)[1] == 4
