"""State of a Llama, by role and to the byte: a closed form, what explain() says before the first step, what is held."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import gradkit
from tests.llama import Llama, by_role, small, train

WIDTH, HIDDEN, LAYERS, WORDS = 512, 1376, 8, 32_000
Matrices = Callable[[int, int], int]  # outputs and inputs -> entries with state
MADE: Mapping[str, tuple[Any, dict[str, Any], Matrices, tuple[int, int, int]]] = {
    # class, arguments; a matrix's entries with state; slots of an embedding, the last layer, vectors
    "SCALE": (gradkit.SCALE, {}, lambda n, m: 0, (0, 1, 2)),
    "SCALE, no momentum": (gradkit.SCALE, {"momentum": 0.0}, lambda n, m: 0, (0, 0, 2)),
    "columns": (gradkit.FRUGAL, {"split": "columns"}, lambda n, m: 2 * n * int(m * 0.25), (2, 2, 2)),
    "rows": (gradkit.FRUGAL, {"split": "rows", "density": 0.3}, lambda n, m: 2 * m * int(n * 0.3), (2, 2, 2)),
    "randk": (gradkit.FRUGAL, {"split": "randk", "base": "lion"}, lambda n, m: int(n * m * 0.25), (1, 1, 1)),
    "none of them": (gradkit.FRUGAL, {"density": 0.0}, lambda n, m: 0, (2, 2, 2)),
    "SPAM": (gradkit.SPAM, {"density": 0.25}, lambda n, m: 2 * int(n * m * 0.25), (-1, -1, 2)),
}


def closed(width: int, hidden: int, layers: int, words: int, entries: Matrices, slots: tuple[int, int, int]) -> str:
    """4 bytes an entry; a table with -1 slots is split as a matrix is."""
    shapes = layers * [*[(width, width)] * 4, *[(hidden, width)] * 2, (width, hidden)]
    tables = [n * words * width if n >= 0 else entries(words, width) for n in slots[:2]]
    numbers = [sum(entries(*s) for s in shapes), *tables, slots[2] * (2 * layers + 1) * width]
    names = ("matrix", "embedding", "last", "vector")
    return ", ".join(f"{name} {4 * n:,}" for name, n in zip(names, numbers, strict=True)) + " bytes"


@pytest.mark.parametrize("name", MADE)
def test_the_state_of_a_llama_of_60m_is_known_before_the_first_step(name):
    cls, given, entries, slots = MADE[name]
    with torch.device("meta"):
        model = Llama(WIDTH, HIDDEN, LAYERS, WORDS)
    assert sum(p.numel() for p in model.parameters()) == 2 * WORDS * WIDTH + WIDTH + LAYERS * (
        4 * WIDTH**2 + 3 * WIDTH * HIDDEN + 2 * WIDTH
    )
    optimizer = cls(gradkit.param_groups(model), **given)
    assert by_role(optimizer) == closed(WIDTH, HIDDEN, LAYERS, WORDS, entries, slots)
    assert not optimizer.state
    if name == "SCALE":
        assert by_role(optimizer) == "matrix 0, embedding 0, last 65,536,000, vector 69,632 bytes"
    if name == "columns":
        of_matrices = 2 * (4 * 512 * 128 + 2 * 1376 * 128 + 512 * 344)
        assert by_role(optimizer).startswith(f"matrix {4 * LAYERS * of_matrices:,}, ")


def test_whole_matrices_are_a_fourth_of_them():
    with torch.device("meta"):
        model = Llama(WIDTH, HIDDEN, LAYERS, WORDS)
    optimizer = gradkit.FRUGAL(gradkit.param_groups(model))
    groups = {g["role"]: g["params"] for g in optimizer.param_groups}
    turn = gradkit.selection.Turn("blocks", "random", 0.25, 0, 0)
    chosen = gradkit.Choices().tensors(turn, 0, len(groups["matrix"]))
    size = 8 * sum(groups["matrix"][i].numel() for i in chosen)
    assert len(chosen) == 14 and by_role(optimizer).startswith(f"matrix {size:,}, embedding {8 * WORDS * WIDTH:,}, ")


@pytest.mark.parametrize("name", [*MADE, "blocks"])
def test_explain_says_the_bytes_that_a_step_then_takes(name):
    cls, given, *_ = MADE.get(name, (gradkit.FRUGAL, {}))
    model = small()
    optimizer = cls(gradkit.param_groups(model), **given)
    before = by_role(optimizer)
    train(optimizer, model, range(1))
    held = {
        g["role"]: sum(x.nbytes for p in g["params"] for x in optimizer.state[p].values() if x.dim())
        for g in optimizer.param_groups
    }
    assert before == by_role(optimizer) == ", ".join(f"{role} {size:,}" for role, size in held.items()) + " bytes"
    if name == "SCALE":
        assert held == {"matrix": 0, "embedding": 0, "last": 4 * 20 * 8, "vector": 8 * 5 * 8}


README = re.findall(
    r"^\| \[`(\w+)`\].*? \| (\d+)[^|]*\| \[\d", Path(__file__).parents[1].joinpath("README.md").read_text(), re.M
)


@pytest.mark.parametrize(("name", "bytes_"), README, ids=[name for name, _ in README])
def test_the_readme_says_how_many_bytes_a_parameter_takes(name, bytes_):
    matrices = [torch.ones(10, 10, requires_grad=True) for _ in range(4)]
    optimizer = getattr(gradkit, name)([{"params": matrices, "role": "matrix"}])
    optimizer.init_state()
    held = sum(x.nbytes for slots in optimizer.state.values() for x in slots.values() if x.dim())
    assert held == int(bytes_) * sum(p.numel() for p in matrices)


def test_the_readme_lists_every_optimizer():
    classes = [
        n
        for n in gradkit.__all__
        if isinstance(x := getattr(gradkit, n), type) and issubclass(x, torch.optim.Optimizer)
    ]
    assert {name for name, _ in README} == {*classes} - {"Optimizer"}
