"""Memory that moves, is handed on or is given out again under the same address."""

import pytest
import torch

import gradkit
from gradkit import chain, rule
from tests.cases import BACKENDS

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@rule(slots=("one_ago", "two_ago"))
def history(u, one_ago, two_ago):
    return u + two_ago, u, one_ago


def stepped(optimizer, p, gradients):
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
    return p.tolist()


@each_backend
def test_a_slot_may_become_another_slot(backend):
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = gradkit.Optimizer([p], chain(history), lr=1.0, backend=backend)
    assert stepped(optimizer, p, (1.0, 10.0, 100.0, 1000.0)) == [-1122.0] * 3
    assert optimizer.state[p]["one_ago"].tolist() == [1000.0] * 3
    assert optimizer.state[p]["two_ago"].tolist() == [100.0] * 3


@each_backend
def test_a_slots_storage_may_move_within_the_same_tensor(backend):
    ends = []
    for moves in (False, True):
        p = torch.nn.Parameter(torch.zeros(5))
        optimizer = gradkit.AdamW([p], backend=backend)
        for g in (1.0, -2.0, 3.0):
            stepped(optimizer, p, [g])
            if moves:
                for slot in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[p][slot].data = optimizer.state[p][slot].data.clone()
        ends.append([p.tolist(), optimizer.state[p]["exp_avg"].tolist()])
    assert ends[0] == ends[1]


@each_backend
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_an_address_that_is_given_out_again_may_hold_another_dtype(backend):
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad_dtype = None
    memory = torch.ones(4)
    optimizer = gradkit.Optimizer([p], chain(history), lr=1.0, backend=backend)
    p.grad = memory
    optimizer.step()
    p.grad = memory.view(torch.bfloat16)[:4]
    p.grad.fill_(2.0)
    optimizer.step()
    assert optimizer.state[p]["one_ago"].tolist() == [2.0] * 4


@each_backend
def test_a_decay_of_zero_may_be_raised_later_whatever_its_type(backend):
    for nothing in (0, 0.0):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = gradkit.AdamW([p], lr=0.1, weight_decay=nothing, backend=backend)
        stepped(optimizer, p, [0.0])
        optimizer.param_groups[0]["weight_decay"] = 0.5
        assert stepped(optimizer, p, [0.0]) == pytest.approx([0.95] * 2)


def test_another_backend_is_taken_at_the_next_step():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = gradkit.AdamW([p], backend="eager")
    stepped(optimizer, p, [1.0])
    optimizer.backend = "chunked"
    stepped(optimizer, p, [1.0])
    assert optimizer._plans["step"].batches[0].backend.name == "chunked"


def test_a_compiler_that_fails_on_the_text_itself_leaves_auto_running(tmp_path, monkeypatch):
    """One that passes the probe, and then has, say, no space left."""
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\ncase "$*" in *--version*) echo one; exit 0;; esac\ncat > "$0.c"\n'
                      'grep -q "void span(" "$0.c" && { echo "error: disk full" >&2; exit 1; }\n'
                      'args=$(echo "$@" | sed "s| - | $0.c |")\nexec gcc $args\n')  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = gradkit.AdamW([p])
    stepped(optimizer, p, [1.0])
    assert "backend: chunked" in optimizer.explain() and "disk full" in optimizer.explain()
    with pytest.raises(RuntimeError, match="disk full.*use backend='auto'"):
        stepped(gradkit.AdamW([p], backend="native"), p, [1.0])


@pytest.mark.parametrize("group", [{"parms": []}, [torch.zeros(1)]])
def test_a_group_is_a_dict_with_params(group):
    optimizer = gradkit.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="AdamW: a group is a dict such as"):
        optimizer.add_param_group(group)


def test_a_switch_is_true_or_false():
    with pytest.raises(TypeError, match="AdamW: maximize='False': use True or False"):
        gradkit.AdamW([torch.nn.Parameter(torch.ones(2))], maximize="False")
    with pytest.raises(TypeError, match="AdamW: amsgrad='no': use True or False"):
        gradkit.AdamW([torch.nn.Parameter(torch.ones(2))], amsgrad="no")


def test_a_file_whose_values_cannot_be_used_is_refused_before_anything_changed():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = gradkit.AdamW([p])
    stepped(optimizer, p, [1.0])
    for key, value in (("lr", -1.0), ("decay", "bogus"), ("betas", (0.9,))):
        file = optimizer.state_dict()
        file["param_groups"][0][key] = value
        before = optimizer.param_groups[0][key]
        with pytest.raises(ValueError, match=f"AdamW: {key}="):
            optimizer.load_state_dict(file)
        assert optimizer.param_groups[0][key] == before


def test_a_filter_behind_moments_of_another_optimizer_is_new():
    """Its average starts at the first gradient it sees, its window is empty, whatever Adam has counted."""
    p = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([p])
    stepped(adam, p, [1.0] * 9)
    for kind, name in (("ema", "grad_ema"), ("ma", "grad_head")):
        optimizer = gradkit.Grokfast([p], filter=kind, window=4)
        optimizer.load_state_dict(adam.state_dict())
        p.grad = torch.full_like(p, 3.0)
        assert dict(optimizer.trace(p))[f"{kind}_filter"].tolist() == ([9.0] * 2 if kind == "ema" else [3.0] * 2)
        optimizer.step()
        assert optimizer.state[p][name].tolist() == [3.0] * 2 and float(optimizer.state[p]["step"]) == 10
