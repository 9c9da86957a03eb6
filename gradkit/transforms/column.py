"""Gradients of one size for each output: SCALE's normalisation.

Glentis et al. 2025, https://arxiv.org/abs/2506.16659
"""

from typing import Any

from ..chain import Chain, chain
from ..ops import maximum, sqrt
from ..options import check_choice
from ..transform import measure, rule

NORMS = ("rms", "l2")


def inverse(square):
    return 1.0 / maximum(sqrt(square), 1e-8)


@measure(scope="row", reduce={"square": "mean"}, gives=("shrink",), finish=inverse)
def mean_square_of_rows(u):
    return u * u


@measure(scope="column", reduce={"square": "mean"}, gives=("shrink",), finish=inverse)
def mean_square_of_columns(u):
    return u * u


@measure(scope="row", reduce={"square": "sum"}, gives=("shrink",), finish=inverse)
def square_of_rows(u):
    return u * u


@measure(scope="column", reduce={"square": "sum"}, gives=("shrink",), finish=inverse)
def square_of_columns(u):
    return u * u


@rule
def to_one_size(u, shrink):
    return u * shrink


def one_size(norm: str, fan_in: int) -> tuple[Any, Any]:
    """The links that bring what gives one output to one size: rows, whose inputs lie along axis 1, or columns."""
    rows, columns = {
        "rms": (mean_square_of_rows, mean_square_of_columns),
        "l2": (square_of_rows, square_of_columns),
    }[norm]
    return rows if fan_in else columns, to_one_size


def column_normalize(norm: str = "rms", name: str | None = None) -> Chain:
    """Bring the gradient of each output to one size: a row of a weight in torch's layout, a column in the paper's.

    g <- g / max(rms(g), 1e-8)        each row; a vector as a whole

    norm: "rms", entries of mean square 1, or "l2", rows of length 1.
    """
    check_choice("column_normalize", "norm", norm, NORMS)
    return chain(*one_size(norm, 1), name="column_normalize").named(name)
