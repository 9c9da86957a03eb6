"""What acts on a tensor's gradient in backward."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

import gradkit
from gradkit.transforms import pixelwise_clip
from tests.reference.pixelwise_clip import clipped
from tests.tolerance import assert_equal, tolerance

NORMS = ("inf", 2)
LIMIT = 0.25
each_norm = pytest.mark.parametrize("ord", NORMS)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A gradient of which some pixels are beyond the limit and some are not."""
    return (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def through(clip, grad: torch.Tensor) -> torch.Tensor:
    """What is left of a gradient that comes to the clip's output."""
    image = torch.zeros_like(grad, requires_grad=True)
    clip(image).backward(grad)
    assert image.grad is not None and image.grad.dtype == grad.dtype
    return image.grad


@each_norm
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3, 4, 5), 1), ((2, 4, 5, 3), -1), ((6, 3), 1), ((7,), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_pixel_keeps_its_direction_and_at_most_the_norm(dtype, shape, channel_dim, ord):
    grad = draw(*shape, dtype=dtype)
    ours = through(pixelwise_clip(LIMIT, channel_dim, ord), grad)
    expected = clipped(grad.double().numpy(), LIMIT, channel_dim, ord)
    close = tolerance("reference", dtype)
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=close, atol=0)
    norms = torch.linalg.vector_norm(grad, ord=float(ord), dim=channel_dim, keepdim=True)
    kept = (norms <= LIMIT).expand_as(grad)
    assert not kept.all()
    assert_equal(ours[kept], grad[kept], "a pixel within the limit")


def test_the_forward_changes_nothing_and_other_uses_of_the_tensor_are_not_clipped():
    image = draw(2, 3, 4).requires_grad_()
    shown = pixelwise_clip(LIMIT, 1)(image)
    assert_equal(shown, image)
    ((100 * shown).sum() + (100 * image).sum()).backward()
    assert_equal(image.grad, torch.full_like(image, LIMIT + 100))


def test_a_write_into_the_result_raises_in_place_of_losing_the_clip():
    shown = pixelwise_clip(LIMIT, 1)(2 * draw(2, 3, 4).requires_grad_())
    with pytest.raises(RuntimeError, match="modified inplace"):
        shown.clamp_(0, 1)


def test_a_tensor_without_gradient_stays_one():
    for image in (draw(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.uint8)):
        shown = pixelwise_clip(LIMIT, 1)(image)
        assert not shown.requires_grad and torch.equal(shown, image)


@each_norm
def test_zeros_stay_and_what_is_not_finite_stays_so_in_its_own_pixel(ord):
    grad = draw(5, 3)
    grad[0], grad[1, 0], grad[2, 1] = 0.0, math.nan, math.inf
    ours = through(pixelwise_clip(LIMIT, 1, ord), grad)
    assert_equal(ours[0], torch.zeros(3))
    assert ours[1].isnan().all() and not ours[2, 1].isfinite()
    assert_equal(ours[3:], through(pixelwise_clip(LIMIT, 1, ord), grad[3:]))


@each_norm
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)])
def test_squares_do_not_overflow(dtype, value, ord):
    ours = through(pixelwise_clip(LIMIT, 0, ord), torch.full((4,), value, dtype=dtype))
    assert_equal(ours, torch.full((4,), LIMIT / (2 if ord == 2 else 1), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    grad = draw(5, 3, dtype=dtype)
    clip = pixelwise_clip(LIMIT, 1, 2)
    assert_equal(through(clip, grad), through(clip, grad.float()).to(dtype))


@each_norm
def test_with_a_scaler_the_unscaled_gradient_is_clipped(ord, monkeypatch):
    """Powers of two: the same bits. The factor moves between steps, and is read without waiting for the device."""
    grad = draw(5, 3)
    expected = through(pixelwise_clip(LIMIT, 1, ord), grad)
    scaler = GradScaler("cpu", init_scale=1024.0)
    clip = pixelwise_clip(LIMIT, 1, ord, scaler=scaler)  # before the scaler has made its factor
    weight = torch.zeros_like(grad, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    factors = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(GradScaler, "get_scale", lambda self: pytest.fail("a synchronisation"))
            optimizer.zero_grad()
            scaler.scale((clip(weight) * grad).sum()).backward()
            scaler.unscale_(optimizer)
            assert_equal(weight.grad, expected)
        scaler.step(optimizer)
        factors.append(scaler.get_scale())
        scaler.update(8.0)
    assert factors == [1024.0, 8.0]


def test_a_disabled_scaler_is_a_factor_of_one():
    grad = draw(5, 3)
    disabled = pixelwise_clip(LIMIT, 1, scaler=GradScaler("cpu", enabled=False))
    assert_equal(through(disabled, grad), through(pixelwise_clip(LIMIT, 1), grad))


def test_an_overflow_behind_the_clip_is_still_found():
    scaler = GradScaler("cpu", init_scale=2.0**16)
    weight = torch.zeros(2, 3, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    image = pixelwise_clip(LIMIT, 1, scaler=scaler)(weight.half())
    scaler.scale((image.float() * 100).sum()).backward()  # 6,553,600 is an infinity in float16
    scaler.step(optimizer)
    scaler.update()
    assert_equal(weight.detach(), torch.zeros(2, 3), "the step is left out")
    assert scaler.get_scale() == 2.0**15


def scene(weight: torch.Tensor, grad: torch.Tensor, clip) -> torch.Tensor:
    """A loss whose gradient at the image is `grad`; the image is twice the weight."""
    return (clip(weight * 2.0) * grad).sum()


@each_norm
@pytest.mark.parametrize("way", ["checkpoint", "reentrant checkpoint", "compiled", "func"])
def test_it_acts_in_the_other_ways_to_a_gradient(way, ord):
    grad, clip = draw(5, 3), pixelwise_clip(LIMIT, 1, ord)
    expected = 2 * through(clip, grad)
    weight = torch.zeros_like(grad, requires_grad=True)
    if way == "func":
        assert_equal(torch.func.grad(scene)(weight, grad, clip), expected)
        return
    if way == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(scene, backend="aot_eager", fullgraph=True)(weight, grad, clip)
    else:
        loss = checkpoint(scene, weight, grad, clip, use_reentrant=way.startswith("re"))
    loss.backward()
    assert_equal(weight.grad, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own look at the tensor where the graph breaks
def test_compiled_with_a_scaler_it_follows_the_factor():
    grad = draw(5, 3)
    expected = 2 * through(pixelwise_clip(LIMIT, 1), grad)
    scaler = GradScaler("cpu", init_scale=1024.0)
    torch._dynamo.reset()
    compiled = torch.compile(partial(scene, clip=pixelwise_clip(LIMIT, 1, scaler=scaler)), backend="aot_eager")
    for factor in (1024.0, 8.0):
        weight = torch.zeros_like(grad, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler.scale(compiled(weight, grad)).backward()
        assert_equal(weight.grad, factor * expected)
        scaler.step(optimizer)
        scaler.update(8.0)


@each_norm
def test_second_derivatives_are_those_of_the_clipped_gradient(ord):
    grad = draw(5, 3, dtype=torch.float64).requires_grad_()
    image = torch.zeros_like(grad, requires_grad=True)
    assert torch.autograd.gradgradcheck(pixelwise_clip(LIMIT, 1, ord), image, grad)


BAD = [
    ({"max_norm": 0.0}, ValueError, "max_norm=0.0: give a number > 0"),
    ({"max_norm": math.nan}, ValueError, "max_norm=nan: give a number > 0"),
    ({"max_norm": "1"}, TypeError, "max_norm='1': give a number > 0"),
    ({"channel_dim": 1.0}, TypeError, "channel_dim=1.0: give a whole number"),
    ({"channel_dim": True}, TypeError, "channel_dim=True: give a whole number"),
    ({"ord": 1}, ValueError, "ord=1: use 'inf' or 2"),
    ({"ord": math.inf}, ValueError, "ord=inf: use 'inf' or 2"),
    ({"scaler": 1024.0}, TypeError, "scaler=1024.0: give the torch.amp.GradScaler of the loss, or None"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_a_bad_argument_is_named_with_what_would_do(given, kind, message):
    with pytest.raises(kind) as raised:
        pixelwise_clip(**{"max_norm": 1.0, "channel_dim": 1, **given})
    assert str(raised.value).startswith(f"pixelwise_clip: {message}")


@pytest.mark.parametrize("channel_dim", [2, -3])
def test_a_channel_dim_that_the_tensor_lacks_is_named_at_its_use(channel_dim):
    clip = pixelwise_clip(1.0, channel_dim)
    with pytest.raises(ValueError, match=rf"channel_dim={channel_dim} is no dimension of a tensor of shape \(4, 5\)"):
        clip(torch.zeros(4, 5))


def test_what_is_no_tensor_is_named_at_its_use():
    with pytest.raises(
        TypeError, match=r"^pixelwise_clip: called on \[1, 2\]: give the tensor whose gradient it clips"
    ):
        pixelwise_clip(1.0, 0)([1, 2])  # type: ignore[arg-type]


def test_an_optimizer_refuses_it_and_says_where_it_belongs():
    with pytest.raises(TypeError, match=r"AdamW: pixelwise_clip works on a tensor in the forward.*\(\.\.\.\)\(image\)"):
        gradkit.AdamW([torch.ones(1, requires_grad=True)], transforms=[pixelwise_clip(1.0, 0)])
