"""The one table of tolerances: by what is compared, dtype and backend; relative to a value and to its largest step."""

from collections.abc import Sequence

import numpy as np
import torch

ANY = "any backend"
TABLE = {
    # the authors' own float32 runs, and independent float64 code: the rule of tests/golden
    ("golden", torch.float32, ANY): 2e-5,
    ("reference", torch.float32, ANY): 2e-5,
    ("reference", torch.float64, ANY): 1e-12,
    # where sums are formed in another order, or a polynomial stands for exp; elsewhere backends agree in every bit
    # float32 lanes of 1,024 elements are off by up to 1e-6 in a sum; StableSPAM has one measure behind another
    ("backends", torch.float32, "native"): 3e-6,
    ("backends", torch.float32, "chunked"): 2e-6,
    ("backends", torch.float32, "triton"): 2e-6,
    ("backends", torch.float64, "native"): 1e-14,
    ("backends", torch.float64, "chunked"): 1e-14,
    # a last bit in float32 may fall on the other side of a rounding to these: one unit in the last place
    ("backends", torch.bfloat16, "native"): 2**-7,
    ("backends", torch.bfloat16, "chunked"): 2**-7,
    ("backends", torch.bfloat16, "triton"): 2**-7,
    ("backends", torch.float16, "native"): 2**-10,
    ("backends", torch.float16, "chunked"): 2**-10,
    ("backends", torch.float16, "triton"): 2**-10,
    # what a parameter's own dtype costs in one step beside float64: half a unit, a whole one, half a unit of the rest
    ("nearest", torch.bfloat16, ANY): 2**-8,
    ("stochastic", torch.bfloat16, ANY): 2**-7,
    ("kahan", torch.bfloat16, ANY): 2**-14,  # 2^-16, and as much again for float32's 2e-5
}


def tolerance(compared: str, dtype: torch.dtype, backend: str = ANY) -> float:
    """The table's entry, of this backend or of all."""
    return TABLE.get((compared, dtype, backend)) or TABLE[compared, dtype, ANY]


def assert_follows(
    actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], relative: float, largest_step: float | None = None
) -> None:
    """One parameter's values, the start first: |difference| <= relative (|p| + largest step sqrt(t)).

    The largest step is the element's own so far, where none is given. What isn't finite must be the same.
    """
    assert len(actual) == len(expected) > 1
    largest = np.zeros_like(expected[0], dtype=np.float64)
    with np.errstate(all="ignore"):
        for t, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
            if t:
                largest = np.fmax(largest, np.abs(theirs - expected[t - 1].astype(np.float64)))
            step = largest if largest_step is None else largest_step
            allowed = relative * (np.abs(theirs) + step * np.sqrt(t))
            close = np.where(np.isfinite(theirs), np.abs(ours - theirs) <= allowed, same(ours, theirs))
            assert close.all(), (
                f"step {t}: {np.sum(~close)} of {close.size} differ, {ours[~close][0]!r} for {theirs[~close][0]!r}, "
                f"allowed {np.broadcast_to(allowed, close.shape)[~close][0]:.3g}"
            )


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal, or both NaN."""
    return (a == b) | (np.isnan(a) & np.isnan(b))


def bits(x: torch.Tensor) -> torch.Tensor:
    """What `torch.equal` should see: the bits, with one NaN for all (its sign and payload mean nothing)."""
    if not x.is_floating_point():
        return x
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(kind)


def assert_equal(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """The same shape, dtype and bits."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), what
    differs = (bits(a) != bits(b)).flatten()
    count = int(differs.sum())
    if count:
        at = int(differs.nonzero()[0])
        pair = f"{a.flatten()[at].item()!r} and {b.flatten()[at].item()!r}"
        raise AssertionError(f"{what}: {count} of {a.numel()} differ, e.g. [{at}]: {pair}")
