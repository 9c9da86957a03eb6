"""What a step did, counted on some steps: the figures, and that the steps are the same."""

import copy

import pytest
import torch

import gradkit
from gradkit import transforms as tx
from tests.cases import BACKENDS
from tests.runs import ran_on
from tests.tolerance import assert_equal

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))


def give(net: torch.nn.Module, t: int) -> None:
    for i, p in enumerate(net.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))


MAKERS = {
    "AdamW": lambda p, **o: gradkit.AdamW(p, transforms=[tx.clip_by_global_norm(1.0)], **o),
    "zclip": lambda p, **o: gradkit.AdamW(p, transforms=[tx.zclip(warmup_steps=2)], **o),
    "adaptive": lambda p, **o: gradkit.Lion(p, transforms=[tx.adaptive_clip(0.1), tx.cautious()], **o),
    "SPAM": lambda p, **o: gradkit.SPAM(p, threshold=2.0, clip_free_steps=0, reset_every=3, **o),
    "StableSPAM": lambda p, **o: gradkit.StableSPAM(p, reset_every=2, **o),
    "Sophia": lambda p, **o: gradkit.Sophia(p, hessian_every=100, **o),
    "window": lambda p, **o: gradkit.Grokfast(p, filter="ma", window=2, **o),
}


@each_backend
@pytest.mark.parametrize("name", MAKERS)
def test_counting_changes_no_bit_and_plans_twice(name, backend):
    nets = [model(), model()]
    plain, counting = (MAKERS[name](net.named_parameters(), lr=0.01, backend=backend) for net in nets)
    assert counting.stats(every=3) == {}
    plans = []
    for t in range(1, 8):
        for net, optimizer in zip(nets, (plain, counting), strict=True):
            give(net, t)
            optimizer.step()
        plans.append(dict(counting._plans))
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert_equal(p.detach(), q.detach())
        for n, slot in plain.state[p].items():
            assert_equal(slot, counting.state[q][n], n)
    assert plans[1].keys() == {"step"} and plans[2].keys() == {"step", "stats"}
    assert plans[6] == plans[2], "the plans were made anew"
    assert ran_on(counting) == {backend}
    assert counting.stats().keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


@each_backend
def test_norms_and_shares_are_those_of_the_step(backend):
    net = model()
    optimizer = gradkit.Optimizer(
        net.named_parameters(),
        gradkit.chain(tx.clip_by_value(1.0), tx.clip_by_global_norm(2.0)),
        lr=0.5, weight_decay=0.1, backend=backend,
    )  # fmt: skip
    optimizer.stats(every=2)
    for t in (1, 2):
        give(net, t)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.step()
    seen = optimizer.stats()
    cut = {n: p.grad.clamp(-1.0, 1.0) for n, p in net.named_parameters()}
    coef = 2.0 / torch.stack([g.norm() for g in cut.values()]).norm()
    assert coef < 1
    for n, p in net.named_parameters():
        assert seen[n] == {
            "clip_by_value.clipped": pytest.approx(float((p.grad.abs() > 1.0).float().mean())),
            "clip_by_value.norm_before": pytest.approx(float(p.grad.norm())),
            "clip_by_value.norm_after": pytest.approx(float(cut[n].norm())),
            "clip_by_global_norm.clipped": 1.0,
            "clip_by_global_norm.norm_before": pytest.approx(float(cut[n].norm())),
            "clip_by_global_norm.norm_after": pytest.approx(float((cut[n] * coef).norm()), rel=1e-5),
            "grad_norm": pytest.approx(float(p.grad.norm())),
            "update_norm": pytest.approx(float((cut[n] * coef).norm()) / 2, rel=1e-5),
            "weight_norm": pytest.approx(float(before[n].norm())),
        }
        moved = before[n] * (1 - 0.5 * 0.1) - p.detach()
        assert seen[n]["update_norm"] == pytest.approx(float(moved.norm()), rel=1e-4)


@each_backend
def test_spikes_and_resets_are_counted(backend):
    p = torch.zeros(6, requires_grad=True)
    optimizer = gradkit.SPAM([p], clip_free_steps=0, reset_every=4, backend=backend)
    optimizer.stats(every=1)
    found = []
    for t in range(1, 7):
        p.grad = torch.ones(6)
        p.grad[:2] *= 1e3 if t == 3 else 1.0
        optimizer.step()
        (one,) = optimizer.stats().values()
        found.append((one["clip_spikes.spikes"], one["resets"]))
    assert [r for _, r in found] == [0, 0, 0, 1, 1, 1]
    assert found[2][0] == 2 and found[3][0] == 0


def test_parameters_without_names_are_numbered_and_counts_outlive_no_pickle():
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = gradkit.AdamW(params)
    with pytest.raises(RuntimeError, match="nothing is counted; call stats"):
        optimizer.stats()
    with pytest.raises(ValueError, match="every=-1: give a whole number >= 0"):
        optimizer.stats(every=-1)
    optimizer.stats(every=1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.stats()["1"] == {"grad_norm": pytest.approx(3**0.5), "update_norm": pytest.approx(1e-3 * 3**0.5),
                                      "weight_norm": pytest.approx(3**0.5)}  # fmt: skip
    copy.deepcopy(optimizer).step()
    optimizer.stats(every=0)
    with pytest.raises(RuntimeError, match="nothing is counted"):
        optimizer.stats()


def test_explain_shows_the_plan_with_and_without():
    optimizer = gradkit.AdamW(model().named_parameters(), transforms=[tx.clip_by_norm(1.0)])
    without = optimizer.explain()
    optimizer.stats(every=50)
    both = optimizer.explain()
    assert both.startswith(without + "\nevery 50 steps, counting:\n") and "launches: 2;" in without
    extra = both.removeprefix(without)
    assert (
        "clip_by_norm.scale -> clip_by_norm.shrunk -> adam -> norms -> decay -> write" in extra
        and "launches: 4;" in extra
    )


def test_a_rule_names_what_it_counts():
    with pytest.raises(ValueError, match="counts='clips'; use one of 'clipped', 'spikes', 'win_rate'"):
        gradkit.rule(tx.clip.scale.fn, counts="clips")


@each_backend
def test_sophias_limit_gives_its_win_rate(backend):
    p = torch.zeros(8, requires_grad=True)
    optimizer = gradkit.Sophia([p], gamma=1.0, weight_decay=0.0, backend=backend)
    optimizer.update_hessian(estimates=[torch.tensor([1e6] * 6 + [0.0] * 2)])
    optimizer.stats(every=1)
    p.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.stats()["0"]["limit_move.win_rate"] == 6 / 8 == optimizer.win_rate()


def test_no_figure_hides_another():
    """Two groups with the same names, and one chain with two rules that count."""
    nets = [model(), model(1)]
    both = gradkit.chain(tx.clip.clip_value, tx.clip.clip_value, name="twice", limit=0.5)
    optimizer = gradkit.Lion([{"params": net.named_parameters()} for net in nets], transforms=[both])
    optimizer.stats(every=1)
    for net in nets:
        give(net, 1)
    optimizer.step()
    seen = optimizer.stats()
    assert len(seen) == 8 and "0.weight" in seen and "0.weight (parameter 4)" in seen
    assert {"twice.clipped", "twice_2.clipped"} <= seen["0.weight"].keys()


def test_nothing_counted_outlives_what_it_was_counted_of():
    net = model()
    optimizer = gradkit.AdamW(net.parameters())
    optimizer.stats(every=1)
    give(net, 1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats() == {}
    optimizer.step()
    optimizer.stats(every=0)
    assert "stats" not in optimizer._plans
