"""The generator and the rounding: an independent reference, torch and C give the same bits; rounding has no bias."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gradkit import random
from gradkit.backends import ccache
from tests.reference.selection import philox

PRELUDE = Path(ccache.__file__).with_name("prelude.h").read_text()
LOW = {torch.bfloat16: "bf16", torch.float16: "fp16"}
needs_compiler = pytest.mark.skipif(ccache.why_not() is not None, reason=f"no C compiler: {ccache.why_not()}")


def reference(element, step, index, seed, stream):
    return philox(element, step, index, seed, stream)[0]


def int64(x):
    return x - 2**64 if x >= 2**63 else x


def in_c(returned, arguments, out, *inputs):
    """Run out[i] = returned(...) in C; inputs are tensors, in C a, b, ... of the types in `arguments`."""
    names = [f"const {t} *{n} = (void *)job[{i + 2}];" for i, (n, t) in enumerate(arguments.items())]
    kind, expression = returned
    loop = f"{kind} *out = (void *)job[0]; for (long i = 0; i < job[1]; i++) out[i] = {expression};"
    source = f"typedef float T;\n{PRELUDE}\nvoid run(const int64_t *job) {{ {' '.join(names)} {loop} }}"
    job = np.array([out.data_ptr(), out.numel(), *(t.data_ptr() for t in inputs)], np.int64)
    ccache.build(source).run(job.ctypes.data)
    return out


def any_floats(n):
    """Random bit patterns: all exponents alike, denormals, inf and NaN among them; and plain normal numbers."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (n,), generator=g).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, np.inf, np.nan, 65504.0, 65519.0, 65520.0, 65536.0, 3.4e38, 2**-14, 2**-25])
    small = torch.randn(n, generator=g) * torch.exp2(torch.randint(-28, 17, (n,), generator=g).float())
    return torch.cat([patterns, special, -special, small])


def same_bits(got, want):
    word = torch.int16 if got.element_size() == 2 else torch.int32
    return bool(((got.view(word) == want.view(word)) | (got.isnan() & want.isnan())).all())


# philox4x32 with 7 rounds, from the known answers of Random123: counter, key, first word
KNOWN = [
    ((0, 0, 0, 0), 0x5F6FB709),
    ((2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), 0x5207DDC2),
    ((0x85A308D3243F6A88, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0), 0x4DFCCABA),
]


@pytest.mark.parametrize("arguments, answer", [((0, 0, 0, 0, 0), KNOWN[0][1]), *KNOWN[1:]])
def test_philox_gives_the_known_answers(arguments, answer):
    element, *rest = arguments
    assert reference(*arguments) == answer
    assert int(random.philox(torch.tensor([int64(element)]), *rest)) == answer


ARGUMENTS = [(1, 0, 0, 0x12345678), (2**32 - 1, 7, 2**32 - 1, 1), (10**6, 148, 12345, random.stream("write"))]


@pytest.mark.parametrize("rest", ARGUMENTS)
def test_philox_in_torch_is_the_reference(rest):
    elements = [0, 1, 2, 65535, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62]
    got = random.philox(torch.tensor(elements).view(3, 3), *rest)
    assert got.shape == (3, 3) and got.flatten().tolist() == [reference(e, *rest) for e in elements]


@needs_compiler
@pytest.mark.parametrize("rest", ARGUMENTS)
def test_philox_in_c_is_philox_in_torch(rest):
    element = torch.arange(2**32 - 50_000, 2**32 + 50_000)  # across the low word's end
    call = "philox((uint64_t)a[i], {}u, {}u, {}u, {}u)".format(*rest)
    bits = in_c(("int64_t", call), {"a": "int64_t"}, torch.empty_like(element), element)
    assert torch.equal(bits, random.philox(element, *rest))


def test_every_argument_of_philox_changes_half_of_the_bits():
    element = torch.arange(4096)
    first = random.philox(element, 1, 2, 3, 4)
    others = [(element + 2**32, 1, 2, 3, 4), (element, 2, 2, 3, 4), (element, 1, 3, 3, 4), (element, 1, 2, 4, 4)]
    for arguments in [*others, (element, 1, 2, 3, 5), (element + 4096, 1, 2, 3, 4)]:
        changed = first ^ random.philox(*arguments)
        ones = sum((changed >> k & 1).double().mean().item() for k in range(32))
        assert abs(ones - 16) < 0.3  # 0.3 is 7 standard deviations


def test_a_stream_is_the_crc32_of_its_name():
    assert random.stream("123456789") == 0xCBF43926  # the check value that CRC catalogues give


@needs_compiler
@pytest.mark.parametrize("dtype", LOW)
def test_loads_are_torchs_on_all_patterns(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got = in_c(("float", f"load_{LOW[dtype]}(a[i])"), {"a": LOW[dtype]}, torch.empty(2**16), x)
    assert same_bits(got, x.float())


@needs_compiler
@pytest.mark.parametrize("dtype", LOW)
def test_stores_are_torchs_at_every_value_and_every_tie(dtype):
    low = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    tie = (low + torch.nextafter(low.to(dtype), torch.tensor(np.inf, dtype=dtype)).float()) / 2
    inf = torch.tensor(np.inf)
    x = torch.cat([low, tie, torch.nextafter(tie, inf), torch.nextafter(tie, -inf), any_floats(2**16)])
    got = in_c((LOW[dtype], f"store_{LOW[dtype]}(a[i])"), {"a": "float"}, torch.empty(x.numel(), dtype=dtype), x)
    assert same_bits(got, x.to(dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_in_c_is_that_in_torch(dtype):
    x = any_floats(50_000)
    bits = random.philox(torch.arange(x.numel()), 3, 1, 0, random.stream("write"))
    call = f"stochastic_{LOW[dtype]}(a[i], (uint32_t)b[i])"
    out = torch.empty(x.numel(), dtype=dtype)
    got = in_c((LOW[dtype], call), {"a": "float", "b": "int64_t"}, out, x, bits)
    want = random.stochastic_round(x, bits, dtype)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def neighbours(x, dtype):
    """The values of dtype just below and above float32 numbers; both the number itself if dtype holds it."""
    near = x.to(dtype)
    below = torch.where(near.float() > x, torch.nextafter(near, torch.tensor(-np.inf, dtype=dtype)), near).float()
    above = torch.where(near.float() < x, torch.nextafter(near, torch.tensor(np.inf, dtype=dtype)), near).float()
    return below, above


@pytest.mark.parametrize("dtype", LOW)
def test_the_odds_of_rounding_are_the_distances(dtype):
    every = torch.arange(2**16)  # all values of the bits that are used: no chance in this test
    x = any_floats(40)[40:]
    x = x[x.isfinite() & (x.abs() < 65504) & (x.abs() > 2**-30)]
    below, above = neighbours(x, dtype)
    inside = below < above
    assert inside.sum() > 30
    for value, a, b in zip(x[inside], below[inside].double(), above[inside].double(), strict=True):
        got = random.stochastic_round(value.expand(2**16), every, dtype).double()
        assert set(got.unique().tolist()) <= {a.item(), b.item()}
        odds = (got == b).double().mean()
        assert abs(odds - (value.double() - a) / (b - a)) <= (2**-13 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("dtype", LOW)
def test_what_fits_is_kept_whatever_the_bits(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for bits in (0, 0xFFFFFFFF, 0x1234ABCD):
        got = random.stochastic_round(x.float(), torch.full(x.shape, bits), dtype)
        assert same_bits(got, x)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_treats_both_signs_alike(dtype):
    x = any_floats(10_000)
    x = x[~x.isnan()]
    bits = random.philox(torch.arange(x.numel()), 1, 0, 0, 0)
    assert same_bits(random.stochastic_round(-x, bits, dtype), -random.stochastic_round(x, bits, dtype))


@pytest.mark.parametrize("dtype", LOW)
def test_a_mean_survives_rounding(dtype):
    x, n = torch.tensor(1.0003), 100_000
    low, high = (t.item() for t in neighbours(x, dtype))
    bits = random.philox(torch.arange(n), 1, 0, 0, random.stream("write"))
    got = random.stochastic_round(x.expand(n), bits, dtype).double().mean().item()
    deviation = (high - low) / 2 / n**0.5
    assert abs(got - x.item()) < 5 * deviation


def test_rounding_to_other_types_is_refused():
    with pytest.raises(TypeError, match="stochastic rounding to torch.float32"):
        random.stochastic_round(torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.float32)
