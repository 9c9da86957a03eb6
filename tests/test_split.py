"""A split: what is selected, on every backend and in every storage; turns, resets, resuming; its own counters."""

import copy
import gc
import io
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import gradkit
from gradkit import sharding
from gradkit import transforms as tx
from gradkit.backends import ccache, csource
from gradkit.optim.adamw import adam
from gradkit.selection import KINDS, ORDERS, Choices, Turn, split
from tests.cases import BACKENDS, frugal_of
from tests.reference import frugal, selection
from tests.reference.trajectory import Run
from tests.runs import replay
from tests.scenarios import LR, SCENARIOS, start
from tests.tolerance import assert_follows, tolerance

each_kind = pytest.mark.parametrize("kind", KINDS)
BF16 = torch.bfloat16


@gradkit.rule
def halved(u):
    return 0.5 * u


@gradkit.derive("step")
def numbers(step):
    return {"w1": 0.2, "k2": 0.95, "w2": 0.05, "a": 1 / (1 - 0.8**step), "b": (1 - 0.95**step) ** -0.5, "e": 1e-3}


def made(kind: str, params: Any, **given: Any) -> gradkit.Optimizer:
    """Adam on a part, half of the gradient on the rest."""
    own = {k: given.pop(k) for k in ("density", "update_gap", "reset_state") if k in given}
    inside = gradkit.chain(adam, derive=numbers)
    two = split(kind, inside, halved, **{"density": 0.4, "update_gap": 3, **own})
    return gradkit.Optimizer(params, two, lr=0.1, weight_decay=0.1, **given)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def run(optimizer: gradkit.Optimizer, params: Any, steps: range, dtype: torch.dtype | None = None) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype or p.dtype)
        optimizer.step()


# ---- what is selected


@pytest.mark.parametrize("density", [0.0, 0.1, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["columns", "rows", "randk"])
def test_the_smallest_random_numbers_are_selected(kind, density):
    for refresh, index, seed, count in ((0, 0, 0, 100), (3, 2, 7, 41), (70000, 5, 2**32 - 1, 1)):
        picks = Choices().within(Turn(kind, "random", density, refresh, seed), index, count).tolist()
        assert picks == selection.smallest(kind, refresh, index, count, int(count * density), seed)


def test_another_turn_selects_others():
    def picks(**other: Any) -> list[int]:
        given = {"kind": "randk", "order": "random", "density": 0.5, "refresh": 1, "seed": 0, **other}
        index = given.pop("index", 0)
        return Choices().within(Turn(**given), index, 1000).tolist()

    different = [picks(), picks(refresh=2), picks(seed=1), picks(index=1), picks(kind="rows")]
    assert len({*map(tuple, different)}) == 5
    for one in different[1:]:
        assert 180 < len({*one} & {*different[0]}) < 320  # half of the 500, by chance


def test_random_numbers_that_are_made_in_pieces_are_the_same():
    turn = Turn("randk", "random", 0.5, 1, 0)
    whole = Choices().within(turn, 0, 3 << 16)
    words = np.stack([x.numpy() for x in torch.stack(gradkit.random.words(torch.arange(3 << 14), 1, 0, 0, 0x0))], 1)
    assert len(whole) == 3 << 15 and words.shape == (3 << 14, 4)
    numbers = gradkit.random.words(torch.arange(3 << 14), 1, 0, 0, gradkit.random.stream("randk"))
    keys = torch.stack(numbers, 1).flatten()
    assert whole.tolist() == keys.argsort()[: len(whole)].sort().values.tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_follow_each_other(order):
    turns = [Turn("blocks", order, 0.4, r, 5) for r in range(6)]
    chosen = [Choices().tensors(turn, 1, 10) for turn in turns]
    assert chosen == [sorted(selection.blocks(order, r, 1, 10, 0.4, 5)) for r in range(6)]
    if order == "mirror":
        assert chosen[:3] == [[0, 1, 8, 9], [2, 3, 6, 7], [0, 4, 5, 9]]
    if order == "descending":
        assert chosen[:3] == [[6, 7, 8, 9], [2, 3, 4, 5], [0, 1, 8, 9]]


def test_all_are_selected_in_any_order():
    assert all(Choices().tensors(Turn("blocks", order, 1.0, 1, 0), 0, 5) == [*range(5)] for order in ORDERS)


def test_a_density_as_in_the_authors_code():
    """Tensors are rounded, columns, rows and entries cut off."""
    assert len(Choices().tensors(Turn("blocks", "random", 0.4, 0, 0), 0, 4)) == 2
    assert len(Choices().within(Turn("rows", "random", 0.4, 0, 0), 0, 4)) == 1


def test_the_authors_draw_each_entry_by_itself():
    """SPAM's official_quirks: after the first reset as many as chance gives."""
    counts = [len(Choices().within(Turn("randk", "bernoulli", 0.3, r, 0), 0, 1000)) for r in range(20)]
    assert counts[0] == 300 and len({*counts}) > 10 and abs(sum(counts) / 20 - 300) < 10


def test_the_authors_density_has_no_decay():
    ends = []
    for decay in (0.0, 0.5):
        params = drawn((6, 10))
        optimizer = gradkit.SPAM(params, density=0.5, weight_decay=decay, official_quirks=True)
        run(optimizer, params, range(2))
        ends.append(params[0])
    assert torch.equal(*ends) and optimizer.param_groups[0]["decay"] == "none"
    assert gradkit.SPAM(params, density=0.5).param_groups[0]["decay"] == "decoupled"


# ---- on every backend, in every storage


SHAPES = ((31, 257), (7,), (5, 3, 3, 2), (1, 40), (70, 1))
LARGE = ((300, 257),)  # several blocks of the C loop
STORAGES = (
    *((kind, torch.float32, {}) for kind in KINDS),
    ("columns", torch.float32, {"maximize": True, "transforms": [tx.grokfast_ema()], "decay": "cautious"}),
    ("rows", torch.float32, {"state_dtype": BF16, "reset_state": False}),
    ("randk", torch.float64, {}),
    ("randk", BF16, {"rounding": "kahan"}),
    ("blocks", BF16, {"rounding": "kahan"}),
    ("columns", BF16, {"rounding": "stochastic", "seed": 3}),
    ("rows", torch.float16, {"state_dtype": BF16}),
)


@pytest.mark.parametrize(
    ("kind", "dtype", "given"),
    STORAGES,
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x).removeprefix("torch."),
)
def test_backends_agree_in_every_bit(kind, dtype, given):
    runs = []
    for backend in BACKENDS:
        params = drawn(*SHAPES, *LARGE * (not given), dtype=dtype)
        optimizer = made(kind, params, backend=backend, **given)
        run(optimizer, params, range(5))
        assert f"backend: {backend}" in optimizer.explain()
        runs.append([*params, *(x for p in params for _, x in sorted(optimizer.state[p].items()))])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(runs[0][0], drawn(*SHAPES, dtype=dtype)[0])


@each_kind
@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_measures_before_and_behind(kind, backend):
    """A clip sees the whole gradient, a limit of growth the whole update."""
    ends = []
    for transforms in ([], [tx.clip_by_global_norm(0.5)], [tx.norm_growth_limit(1.01)]):
        for chosen in (backend, "eager"):
            params = drawn(*SHAPES)
            optimizer = made(kind, params, backend=chosen, transforms=transforms)
            run(optimizer, params, range(4))
            ends.append(torch.cat([p.detach().flatten() for p in params]))
    for a, b in zip(ends[::2], ends[1::2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all((ends[0] - other).abs().max() > 1e-3 for other in ends[2::2])


def test_where_memory_is_in_another_order_eager_selects_the_same():
    plain, permuted = drawn((4, 5, 3, 2), (6, 7)), drawn((4, 5, 3, 2), (6, 7))
    permuted[0].data = permuted[0].data.contiguous(memory_format=torch.channels_last)
    permuted[1].data = permuted[1].data.t().contiguous().t()
    for params in (plain, permuted):
        optimizer = made("randk", params, backend="native")
        run(optimizer, params, range(4))
    assert "a selection follows the logical index, and memory does not" in optimizer.explain()
    for a, b in zip(plain, permuted, strict=True):
        assert torch.equal(a, b)


PACK = """
typedef float T;
{prelude}{split}
void run(const int64_t *job) {{
  const float *p = (void *)job[0]; const uint64_t *bits = (void *)job[1]; const long n = job[2];
  float *to = (void *)job[3], *back = (void *)job[4]; uint8_t *marks = (void *)job[5]; uint16_t places[1 << 10];
  const long m = count(bits, n);
  list(bits, n, places);
  pack_f32(p, bits, places, m, n, to);
  spread(to, bits, places, m, n, back, marks);
}}
"""


@pytest.mark.skipif(ccache.why_not() is not None, reason=f"no C compiler: {ccache.why_not()}")
@pytest.mark.parametrize("by_bits", [True, False])
def test_packing_in_c_with_and_without_avx512(by_bits):
    text = csource.SPLIT if by_bits else csource.SPLIT.replace("defined(__AVX512F__)", "0")
    assert by_bits or text != csource.SPLIT
    library = ccache.build(PACK.format(prelude=csource.PRELUDE, split=text))
    for n in (1, 15, 16, 17, 64, 100, 512):
        rng = np.random.default_rng(n)
        marks = rng.random(n) < 0.4
        p = rng.standard_normal(n).astype(np.float32)
        bits = np.packbits(np.pad(marks, (0, -n % 64)), bitorder="little")
        to, back, seen = np.zeros(n + 32, np.float32), np.zeros(n + 32, np.float32), np.zeros(n + 32, np.uint8)
        job = [x.ctypes.data for x in (p, bits)] + [n] + [x.ctypes.data for x in (to, back, seen)]
        library.run(np.array(job, np.int64).ctypes.data)
        assert (to[: marks.sum()] == p[marks]).all() and (seen[:n] == marks).all()
        assert (back[:n][marks] == p[marks]).all()


# ---- FRUGAL's other ways, against the reference


WAYS = {
    "randk": {"split": "randk"},
    "none": {"split": "columns", "state_free": "none", "base": "lion"},
    "kept": {"split": "columns", "reset_state": False},
    "kept blocks": {"reset_state": False, "block_order": "ascending"},
    "quirks": {"split": "columns", "base": "sgdm", "official_quirks": True},
    "seed": {"split": "rows", "seed": 11},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", ["smooth", "late"])
@pytest.mark.parametrize("way", WAYS)
def test_frugals_other_ways_are_the_references(way, scenario, backend):
    given = {"betas": (0.8, 0.95), "eps": 1e-3, "update_gap": 3, "density": 0.5, **WAYS[way]}
    rows = SCENARIOS[scenario]().gradients
    params = [torch.tensor(x, requires_grad=True) for x in start()]
    ours = replay(frugal_of(params, lr=LR, weight_decay=0.3, backend=backend, **given), params, rows, backend=backend)
    theirs = Run(start(), **frugal.links(**given), weight_decay=0.3, mode="decoupled")
    expected = [start(), *(theirs.step(row, LR, LR) for row in rows)]
    for a, b in zip(ours, zip(*expected, strict=True), strict=True):
        assert_follows([x.numpy() for x in a], list(b), tolerance("reference", torch.float32))


# ---- turns, and state


def held(optimizer: gradkit.Optimizer, p: torch.Tensor) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in optimizer.state[p].items()}


def test_state_is_that_of_what_is_selected():
    for kind, shapes in (("columns", (6, 4)), ("rows", (2, 10)), ("randk", (24,))):
        (p,) = params = drawn((6, 10))
        optimizer = made(kind, params)
        run(optimizer, params, range(1))
        assert held(optimizer, p) == {"low_exp_avg": shapes, "low_exp_avg_sq": shapes, "low_step": ()}
    params = drawn((6, 10), (3,), (2, 2), (4, 1), (5,))
    optimizer = made("blocks", params)
    run(optimizer, params, range(1))
    whole = [bool(held(optimizer, p)) for p in params]
    assert sum(whole) == 2
    for p, has in zip(params, whole, strict=True):
        assert not has or held(optimizer, p)["low_exp_avg"] == tuple(p.shape)


@each_kind
def test_a_new_selection_starts_fresh_or_keeps_its_place(kind):
    counts: dict[bool, list[float]] = {}
    for fresh in (True, False):
        params = drawn((6, 10), (4, 4), (5, 5), (7, 3), (2, 8))
        optimizer = made(kind, params, reset_state=fresh)
        counts[fresh] = []
        for t in range(8):
            run(optimizer, params, range(t, t + 1))
            states = [optimizer.state[p] for p in params]
            counts[fresh].append(max(float(s["low_step"]) for s in states if "low_step" in s))
    assert counts[True] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert counts[False][:3] == [1, 2, 3] and (kind == "blocks" or counts[False] == [*range(1, 9)])


def test_a_parameter_without_gradient_at_a_refresh_takes_its_turn():
    """Its state belongs to columns that are no longer selected."""
    ours, alone = drawn((6, 10), (4, 4)), drawn((6, 10), (4, 4))
    first, second = made("columns", ours), made("columns", alone)
    run(first, ours, range(2))
    for t in range(2, 5):  # a refresh at t = 3, which the second parameter sleeps through
        generator = torch.Generator().manual_seed(t)
        ours[0].grad, ours[1].grad = torch.randn(6, 10, generator=generator), None
        first.step()
        assert float(first.state[ours[1]]["low_step"]) == (2 if t < 3 else 0)
    assert not first.state[ours[1]]["low_exp_avg"].any()
    assert second.param_groups[0]["split.update_gap"] == 3


def test_the_splits_count_is_its_own():
    """A ring of a filter in front is not turned back by a new selection."""
    params = drawn((6, 10))
    optimizer = made("columns", params, transforms=[tx.grokfast_ma(window=4, warmup=False)])
    run(optimizer, params, range(5))
    state = optimizer.state[params[0]]
    assert float(state["filter_step"]) == 5 and float(state["low_step"]) == 2


def test_another_seed_is_another_selection():
    params = drawn((6, 10))
    optimizer = made("columns", params)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["seed"] = 9
    run(optimizer, params, range(2, 3))
    assert float(optimizer.state[params[0]]["low_step"]) == 1


def test_numbers_of_a_split_stand_in_the_group():
    params = drawn((6, 10))
    optimizer = made("columns", params)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["split.density"] = 0.8
    run(optimizer, params, range(2, 3))
    assert optimizer.state[params[0]]["low_exp_avg"].shape == (6, 8)
    assert float(optimizer.state[params[0]]["low_step"]) == 1  # another selection, and so another start
    optimizer.param_groups[0]["split.density"] = 1.5
    with pytest.raises(ValueError, match=r"split.density=1.5: give a number in \[0, 1\]"):
        run(optimizer, params, range(3, 4))


class Corner(Choices):
    """The first ones, whatever the turn."""

    def tensors(self, turn: Turn, group: int, count: int) -> list[int]:
        return [0]

    def within(self, turn: Turn, index: int, count: int) -> np.ndarray:
        return np.arange(count // 2)


@each_kind
def test_a_users_choices(kind):
    params, before = drawn((6, 10), (4, 4)), drawn((6, 10), (4, 4))
    optimizer = gradkit.Optimizer(params, split(kind, gradkit.chain(halved)), lr=0.1)
    optimizer.choices = Corner()
    run(optimizer, params, range(2))
    moved = [(a != b).detach() for a, b in zip(params, before, strict=True)]
    expected = [np.zeros((6, 10), bool), np.zeros((4, 4), bool)]
    for x in expected:
        if kind == "columns":
            x[:, : x.shape[1] // 2] = True
        elif kind == "rows":
            x[: len(x) // 2] = True
        else:
            x.flat[: x.size // 2] = True
    if kind == "blocks":
        expected = [np.ones((6, 10), bool), np.zeros((4, 4), bool)]
    assert all((m.numpy() == x).all() for m, x in zip(moved, expected, strict=True))


@pytest.fixture
def slots_made(monkeypatch):
    """Of each slot made since: a reference, and how many there were then."""
    made_: list[weakref.ref] = []
    peaks: list[int] = []
    plain = sharding.slot

    def slot(*given: Any) -> torch.Tensor:
        made_.append(weakref.ref(new := plain(*given)))
        peaks.append(alive(made_))
        return new

    monkeypatch.setattr(sharding, "slot", slot)
    gc.disable()  # what lives until it runs is held
    yield made_, peaks
    gc.enable()


def alive(references: list[weakref.ref]) -> int:
    return sum(x() is not None for x in references)


@pytest.mark.parametrize("counting", [0, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_the_old_selections_state_goes_before_the_new_is_made(counting, kept, slots_made):
    """Plans hold state, and what counted a step holds its plan: a second one would outlive a few refreshes."""
    ever, peaks = slots_made
    params = drawn((6, 10), (4, 4), (8, 8))
    optimizer = made("columns", params, reset_state=not kept)
    if counting:
        optimizer.stats(every=counting)
    run(optimizer, params, range(6))
    optimizer.param_groups[0]["split.density"] = 0.6
    run(optimizer, params, range(6, 12))
    assert max(peaks) == 6 and len(ever) == 12
    for p in params:
        optimizer.trace(p)  # of a step that selects anew
    assert alive(ever) == 6


def test_old_blocks_go_before_new_ones_come(slots_made):
    params = drawn(*[(4, 4)] * 6)
    optimizer = gradkit.FRUGAL(
        [{"params": params, "role": "matrix"}], density=0.5, update_gap=2, block_order="descending"
    )
    run(optimizer, params, range(6))
    assert len(slots_made[0]) == 18 and max(slots_made[1]) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_were_replaced_are_let_go(backend):
    params = drawn((6, 10), (4, 4))
    optimizer = made("columns", params, backend=backend)
    optimizer.explain()
    old = weakref.ref(params[0])
    optimizer.param_groups[0]["params"][0] = params[0] = drawn((6, 10))[0]
    run(optimizer, params, range(1))
    assert old() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_spams_moments_belong_to_their_entries(backend):
    """Also where a parameter has no gradient at the reset, and where the seed changes between two."""
    params = drawn((6, 10), (4, 4))
    optimizer = gradkit.SPAM(params, density=0.5, reset_every=3, backend=backend)
    run(optimizer, params, range(2))
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad = None
    optimizer.step()
    state = optimizer.state[params[1]]
    assert not state["low_exp_avg"].any() and float(state["low_step"]) == 2
    optimizer.param_groups[0]["seed"] = 5
    params[0].grad.zero_()
    optimizer.step()
    state = optimizer.state[params[0]]
    assert not state["low_exp_avg"].any() and float(state["low_step"]) == 4


def test_a_count_without_its_moments_starts_again():
    """It would switch the bias corrections off: three times the steps."""
    params = drawn((6, 10))
    optimizer = made("columns", params, reset_state=False)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["split.density"] = 0.6
    run(optimizer, params, range(2, 3))
    assert float(optimizer.state[params[0]]["low_step"]) == 1


# ---- saving, looking, counting


def copied(optimizer: gradkit.Optimizer, params: list[torch.Tensor], how: str, kind: str) -> tuple[Any, list[Any]]:
    if how == "deepcopy":
        return copy.deepcopy((optimizer, params))
    again = [p.detach().clone().requires_grad_() for p in params]
    fresh, file = made(kind, again), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh, again


@each_kind
@pytest.mark.parametrize("how", ["deepcopy", "file"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_going_on_is_not_stopping(kind, how, at):
    params = drawn((6, 10), (4, 4), (5,), (3, 7))
    optimizer = made(kind, params)
    run(optimizer, params, range(at))
    other, others = copied(optimizer, params, how, kind)
    for o, ps in ((optimizer, params), (other, others)):
        run(o, ps, range(at, 8))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q) and optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(x, other.state[q][n]) for n, x in optimizer.state[p].items())


@each_kind
@pytest.mark.parametrize("how", ["deepcopy", "file"])
@pytest.mark.parametrize("key", ["seed", "split.density", "split.update_gap"])
@pytest.mark.parametrize("changed", ["before", "after"])
def test_values_changed_around_a_save_select_anew_as_without_it(kind, how, key, changed):
    """Else moments would go on in other places, or not load."""
    shapes = ((6, 10), (4, 4), (5,), (3, 7), (10, 10))
    value, runs = {"seed": 7, "split.density": 0.8, "split.update_gap": 1}[key], []
    for stopping in (True, False):
        params = drawn(*shapes)
        optimizer = made(kind, params)
        run(optimizer, params, range(2))
        if changed == "before":
            optimizer.param_groups[0][key] = value
        if stopping:
            optimizer, params = copied(optimizer, params, how, kind)
        if changed == "after":
            optimizer.param_groups[0][key] = value
        run(optimizer, params, range(2, 5))
        runs.append([*params, *(x for p in params for _, x in sorted(optimizer.state[p].items()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_slots_made_in_the_middle_are_those_that_are_there():
    params = drawn((6, 10))
    optimizer = made("columns", params)
    run(optimizer, params, range(5))
    before = {n: x.clone() for n, x in optimizer.state[params[0]].items()}
    optimizer.init_state()
    assert all(torch.equal(x, before[n]) for n, x in optimizer.state[params[0]].items())


def test_a_file_of_slots_made_for_a_step_has_them():
    """As a distributed checkpoint asks for them before it loads; also after other steps."""
    params = drawn((6, 10))
    for steps in (0, 2):
        optimizer = made("columns", params)
        run(optimizer, params, range(steps))
        optimizer.init_state(step=7)
        assert optimizer.state_dict()["state"][0].keys() == {"low_exp_avg", "low_exp_avg_sq", "low_step"}


@each_kind
def test_state_can_be_made_as_at_any_step(kind):
    params = drawn((6, 10), (4, 4), (5,), (3, 7))
    optimizer, fresh = made(kind, params), made(kind, drawn((6, 10), (4, 4), (5,), (3, 7)))
    layouts = []
    for t in range(9):
        run(optimizer, params, range(t, t + 1))
        fresh.init_state(step=t + 1)
        layouts.append([held(optimizer, p) for p in params])
        assert layouts[-1] == [held(fresh, p) for p in fresh.param_groups[0]["params"]]
    assert kind != "blocks" or len({str(x) for x in layouts}) > 1


@each_kind
def test_looking_at_a_step_leaves_state_as_it_was(kind):
    """Also where that step would select anew."""
    params = drawn((6, 10), (4, 4), (5, 2), (3, 7))
    optimizer = made(kind, params)
    run(optimizer, params, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    steps = [optimizer.trace(p) for p in params]
    optimizer.explain()
    after = optimizer.state_dict()
    assert str(before) == str(after)
    run(optimizer, params, range(2, 3))  # the gradients that are there
    for p, links in zip(params, steps, strict=True):
        assert links[-1][0] == "write" and torch.equal(links[-1][1], p)
        assert {name for name, _ in links} <= {"adam", "halved", "decay", "write"}


def test_statistics_count_around_a_split():
    params = drawn((6, 10), (5,))
    optimizer = gradkit.SPAM(params, density=0.5, threshold=0.1, clip_free_steps=0, reset_every=2)
    optimizer.stats(every=1)
    run(optimizer, params, range(3))
    for one in optimizer.stats().values():
        assert one.keys() == {"grad_norm", "update_norm", "weight_norm", "resets"} and one["resets"] == 1


def test_explain_tells_a_split():
    params = drawn((6, 10), (5,))
    optimizer = made("columns", params, backend="eager")
    lines = optimizer.explain().splitlines()
    assert lines[2:6] == [
        "  chain: (adam | halved) -> decay -> write",
        "  split: columns, 24 elements selected",
        "  pass 1: (adam | halved) -> decay -> write | apply | 18.4 bytes an element",
        "  launches: 1 x 1 eager; 18.4 bytes an element",
    ]
    assert lines[6] == "  state: low_exp_avg float32, low_exp_avg_sq float32; 192 bytes; write-back nearest"
