"""What is measured where: the rows, the shapes, and how long it may take."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from . import protocol
from .rows import GPU_ROWS, ROWS, Row
from .shapes import FULL, ON_GPU, Shape


class Suite(NamedTuple):
    """One command's measurements."""

    key: str
    title: str
    rows: Mapping[str, Row]
    shapes: tuple[Shape, ...]
    protocol: str
    limit: float  # seconds that one row may take; heavyball compiles anew for each shape
    whole: float = math.inf  # seconds for all of them: what is left then is a row that says so


SUITES = {
    suite.key: suite
    for suite in (
        Suite("cpu", "Step times on the CPU", ROWS, FULL, protocol.PROTOCOL, 150),
        Suite("gpu", "Step times on the GPU", GPU_ROWS, ON_GPU, protocol.ON_GPU, 90, 540),
    )
}
