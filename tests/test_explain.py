"""The plan as text, pinned for four chains: an accidental pass, slot or byte shows as a diff; and trace()."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import Stage, chain, derive, measure, rule
from gradkit import transforms as tx
from gradkit.ops import absolute, lerp, minimum, sign
from tests.cases import BACKENDS
from tests.contract.rows import assert_same, everything
from tests.curvature import SquaresOfGradients

each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((10, 8), (20,))


@rule
def softened(u, limit):
    return u / (absolute(u) + limit)


def room(largest, ceiling):
    return minimum(ceiling / (largest + 1e-12), 1.0)


@measure(scope="tensor", reduce={"largest": "max"}, gives=("factor",), finish=room)
def peak(u):
    return absolute(u)


@rule
def lowered(u, factor):
    return u * factor


@rule(slots=("velocity",), stage=Stage.PRECONDITION)
def heavy_ball(u, velocity, w):
    velocity = lerp(velocity, u, w)
    return velocity, velocity


@rule(stage=Stage.UPDATE)
def pulled(u, p):
    return u + 0.01 * sign(p)


@rule
def tilted(u):
    return u + 1.0


@derive()
def ball_scalars(momentum):
    return {"w": 1 - momentum}


def own_chain() -> gradkit.Chain:
    """Five links of a user's own: three rules on the gradient's way, a measure and a rule on the update."""
    start = chain(softened, peak, lowered, name="bounded", limit=0.5, ceiling=0.25)
    return chain(start, chain(heavy_ball, derive=ball_scalars, name="heavy_ball", momentum=0.9), pulled)


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]


def clipped(params: Any, **given: Any) -> gradkit.Optimizer:
    return gradkit.AdamW(params, transforms=[tx.clip_by_global_norm(1.0, name="clip"), tx.grokfast_ema()], **given)


def cautious_lion(params: Any, **given: Any) -> gradkit.Optimizer:
    return gradkit.Lion(params, weight_decay=0.1, transforms=[tx.cautious()], **given)


def own(params: Any, **given: Any) -> gradkit.Optimizer:
    return gradkit.Optimizer(params, own_chain(), lr=0.1, weight_decay=0.1, **given)


PLANS: dict[str, tuple[Any, str]] = {
    "AdamW": (
        gradkit.AdamW,
        """\
  chain: adam -> decay -> write
  pass 1: adam -> decay -> write | apply | 28 bytes an element
  launches: 1; 28 bytes an element
  state: exp_avg float32, exp_avg_sq float32; 800 bytes; write-back nearest""",
    ),
    "clip, Grokfast and AdamW": (
        clipped,
        """\
  chain: clip.squares -> clip.scale -> grokfast_ema.ema_filter -> adam -> decay -> write
  pass 1: g | clip.squares: sum over all | 4 bytes an element
  pass 2: clip.scale -> grokfast_ema.ema_filter -> adam -> decay -> write | apply | 36 bytes an element
  launches: 2; 40 bytes an element
  state: grad_ema float32, exp_avg float32, exp_avg_sq float32; 1200 bytes; write-back nearest""",
    ),
    "cautious Lion": (
        cautious_lion,
        """\
  chain: lion -> cautious.agreement -> cautious.keep_agreeing -> decay -> write
  pass 1: lion | cautious.agreement: mean over tensor | 8 bytes an element
  pass 2: lion -> cautious.keep_agreeing -> decay -> write | apply | 20 bytes an element
  launches: 2; 28 bytes an element
  state: exp_avg float32; 400 bytes; write-back nearest""",
    ),
    "a chain of five links": (
        own,
        """\
  chain: bounded.softened -> bounded.peak -> bounded.lowered -> heavy_ball -> pulled -> decay -> write
  pass 1: bounded.softened | bounded.peak: max over tensor | 4 bytes an element
  pass 2: bounded.softened -> bounded.lowered -> heavy_ball -> pulled -> decay -> write | apply | 20 bytes an element
  launches: 2; 24 bytes an element
  state: velocity float32; 400 bytes; write-back nearest""",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is(name):
    make, wanted = PLANS[name]
    params = parameters()
    lines = make(params).explain().splitlines()
    assert lines[0] == f"{type(make(params)).__name__}: 2 parameters, 1 batches"
    assert lines[1] == "2 tensors, 100 elements: parameters float32, gradients float32 on cpu"
    assert "\n".join(lines[2:-1]) == wanted
    assert lines[-1] == "  backend: native (auto)"


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_the_same_before_and_after_steps(name):
    make, _ = PLANS[name]
    params = parameters()
    optimizer = make(params)
    before = optimizer.explain()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.explain() == before
    held = sum(s.numel() * s.element_size() for state in optimizer.state.values() for s in state.values() if s.dim())
    assert f"; {held} bytes; " in before


BF16, FP16 = torch.bfloat16, torch.float16
BYTES: list[tuple[Any, dict[str, Any], torch.dtype, int]] = [
    (gradkit.AdamW, {}, torch.float32, 28),
    (gradkit.AdamW, {}, BF16, 22),
    (gradkit.AdamW, {"amsgrad": True}, torch.float32, 36),
    (gradkit.AdamW, {}, torch.float64, 56),
    (gradkit.AdamW, {"state_dtype": BF16}, BF16, 14),
    (gradkit.AdamW, {"rounding": "kahan"}, BF16, 26),
    (gradkit.AdamW, {"rounding": "stochastic"}, FP16, 22),
    (gradkit.AdamW, {"decay": "l2"}, torch.float32, 28),
    (gradkit.Lion, {}, torch.float32, 20),
    (gradkit.Lion, {"weight_decay": 0.1}, torch.float32, 20),
    (gradkit.AdEMAMix, {}, torch.float32, 36),
    (gradkit.AdEMAMix, {"betas": (0.0, 0.9, 0.99)}, torch.float32, 28),
    (gradkit.AdEMAMix, {"state_dtype": BF16}, torch.float32, 28),  # the slow momentum stays float32
    (gradkit.DiffGrad, {}, torch.float32, 36),
    (gradkit.SPAM, {}, torch.float32, 28),
    (gradkit.Sophia, {}, torch.float32, 24),
    (gradkit.Grokfast, {}, torch.float32, 36),
    (gradkit.Grokfast, {"filter": "ma", "window": 5}, torch.float32, 52),  # of the ring, one entry
]


@pytest.mark.parametrize(("cls", "given", "dtype", "wanted"), BYTES, ids=str)
def test_bytes_an_element(cls, given, dtype, wanted):
    text = cls(parameters(dtype), **given).explain()
    assert f"  launches: 1; {wanted} bytes an element" in text.splitlines()


def test_a_ring_counts_whole_in_the_state():
    text = gradkit.Grokfast(parameters(), filter="ma", window=5).explain()
    assert f"; {100 * 4 * (5 + 2 + 2)} bytes; " in text


def test_each_backend_says_why():
    p = torch.ones(4, requires_grad=True)
    for backend, why in (("auto", "native (auto)"), ("native", "native (asked for)"), ("eager", "eager (asked for)")):
        assert f"  backend: {why}" in gradkit.Lion([p], backend=backend).explain().splitlines()
    assert "  backend: chunked (asked for)" in gradkit.Lion([p], backend="chunked").explain()


def test_auto_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    text = gradkit.Lion(parameters()).explain()
    assert "  backend: chunked (no C compiler (cc, gcc, clang) was found" in text


@pytest.mark.parametrize("backend", ["auto", "native", "chunked"])
def test_a_tensor_that_takes_a_detour_stands_apart(backend):
    gap = torch.ones(6, 6)[::2, ::2].requires_grad_()
    text = gradkit.Lion([torch.ones(4, requires_grad=True), gap], backend=backend).explain()
    assert text.splitlines()[0] == "Lion: 2 parameters, 2 batches"
    blocks = text.split(" tensors, ")[1:]
    assert blocks[0].startswith("4 elements") and "  backend: eager" not in blocks[0]
    assert blocks[1].startswith("9 elements") and "  backend: eager (not dense in memory)" in blocks[1]
    assert "  launches: 1 x 1 eager; 20 bytes an element" in blocks[1]


def test_groups_and_dtypes_that_run_apart_have_blocks_of_their_own():
    params = [*parameters(), *parameters(BF16)]
    groups = [{"params": params[:1]}, {"params": params[1:3], "weight_decay": 0.0}, {"params": params[3:]}]
    text = gradkit.AdamW(groups).explain()
    assert text.count("  chain: adam -> decay -> write") == 2 and text.count("  chain: adam -> write") == 2
    assert text.splitlines()[0] == "AdamW: 4 parameters, 4 batches"
    frozen = parameters()
    frozen[0].requires_grad_(False)
    assert "1 tensors, 20 elements" in gradkit.Lion(frozen).explain()


@pytest.mark.parametrize(
    ("given", "slots"), [({}, 8), ({"rounding": "kahan"}, 10), ({"state_dtype": BF16}, 4)], ids=str
)
def test_where_groups_have_roles_the_state_is_told_by_role(given, slots):
    """Whatever the optimizer; slots, and what a write-back keeps."""
    params = parameters(BF16)
    groups = [{"params": [p], "role": role} for p, role in zip(params, ("matrix", "vector"), strict=True)]
    more = torch.ones(1000, 3, requires_grad=True)
    optimizer = gradkit.AdamW([*groups, {"params": [more]}], **given)
    lines = optimizer.explain().splitlines()
    rest = 3000 * (4 if "state_dtype" in given else 8)
    assert lines[1] == f"state by role: matrix {80 * slots}, vector {20 * slots}, without a role {rest:,} bytes"
    optimizer.init_state()
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    assert held == 100 * slots + rest
    assert "by role" not in gradkit.AdamW(params, **given).explain()


@each_backend
def test_trace_names_each_link_and_what_flows_behind_it(backend):
    params = parameters()
    optimizer = own(params, backend=backend)
    for t in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        p, g = params[0], params[0].grad
        velocity = optimizer.state[p]["velocity"] if t else torch.zeros_like(p)
        steps = dict(optimizer.trace(p))
        soft = g / (g.abs() + 0.5)
        low = soft * min(0.25 / float(soft.abs().max()), 1.0)
        ball = velocity + (low - velocity) * 0.1
        wanted = {
            "bounded.softened": soft,
            "bounded.lowered": low,
            "heavy_ball": ball,
            "pulled": ball + 0.01 * p.detach().sign(),
            "decay": p.detach() * (1 - 0.1 * 0.1),
        }
        wanted["write"] = wanted["decay"] - 0.1 * wanted["pulled"]
        assert list(steps) == list(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(steps[name], value.detach(), rtol=1e-5, atol=1e-7, msg=f"{name} at step {t}")
        optimizer.step()
        assert torch.equal(steps["write"], p) or not torch.equal(low, soft)
        torch.testing.assert_close(steps["write"], p.detach(), rtol=1e-6, atol=1e-8)


def labels(*transforms: gradkit.Chain) -> list[str]:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    return [name for name, _ in gradkit.Lion([p], transforms=transforms).trace(p)]


def test_links_go_by_the_names_under_which_their_arguments_stand():
    """So that `dict(trace)` has them all, and a chain's own name stands once."""
    clips = tx.zclip(), tx.norm_growth_limit(), tx.clip_by_norm(1.0, name="hard"), tx.clip_by_norm(1.0)
    assert labels(*clips) == [
        "zclip.scale",
        "hard.scale",
        "clip_by_norm.scale",
        "lion",
        "norm_growth_limit.scale",
        "write",
    ]
    assert labels(chain(softened, name="softened", limit=1.0)) == ["softened", "lion", "write"]
    whole = chain(chain(tilted), tx.clip_by_value(1.0)).named("outside")
    assert labels(whole) == ["outside.tilted", "clip_by_value.clip_value", "lion", "write"]


def contents(optimizer: gradkit.Optimizer, params: list[Tensor]) -> dict[str, Any]:
    return {**everything(optimizer, params), "gradients": [None if p.grad is None else p.grad.clone() for p in params]}


MAKERS = (
    gradkit.AdamW,
    gradkit.Lion,
    gradkit.DiffGrad,
    gradkit.AdEMAMix,
    gradkit.Grokfast,
    gradkit.SPAM,
    SquaresOfGradients,
    clipped,
    cautious_lion,
    own,
)


@each_backend
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_trace_leaves_state_and_parameters_as_they_are(make, backend):
    """Also in the run that follows: it is the run without the trace."""
    runs = []
    for traced in (True, False):
        params = parameters()
        optimizer = make(params, backend=backend)
        for t in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            if traced:
                before = contents(optimizer, params)
                names = [name for name, _ in optimizer.trace(params[1])]
                assert_same(contents(optimizer, params), before)
                assert names[-1] == "write" and len(names) > 1
            optimizer.step()
        runs.append(contents(optimizer, params))
    assert_same(*runs)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_the_last_line_of_a_trace_is_what_the_step_stores(rounding):
    params = parameters(BF16)
    optimizer = gradkit.AdamW(params, lr=0.01, rounding=rounding)
    for t in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(BF16)
        name, value = optimizer.trace(params[0])[-1]
        optimizer.step()
        assert name == "write" and value.dtype == BF16 and torch.equal(value, params[0])


def test_explain_changes_nothing():
    params = parameters()
    optimizer = clipped(params)
    before = contents(optimizer, params)
    optimizer.explain()
    assert_same(contents(optimizer, params), before)
    assert not optimizer.state
