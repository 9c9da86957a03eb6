"""What a file of checks is made of: functions called test_*, one run for each row, each given the place it runs on."""

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

Body = Callable[..., None]


class NotRun(Exception):
    """A check that can't be made here, and why; reported, and never counted as passed."""


class Check(NamedTuple):
    name: str
    run: Callable[[Any], None]  # given the place


def rows(table: Mapping[str, tuple[Any, ...]]) -> Callable[[Body], Body]:
    """Run the function once for each row, with its values behind the place."""

    def mark(body: Body) -> Body:
        body.rows = table  # type: ignore[attr-defined]
        return body

    return mark


def checks(module: ModuleType) -> Iterator[Check]:
    """In the file's order."""
    file = module.__name__.rpartition(".")[2]
    for name, body in vars(module).items():
        if name.startswith("test_"):
            for row, values in getattr(body, "rows", {"": ()}).items():
                label = f"{file}::{name.removeprefix('test_')}" + (f"[{row}]" if row else "")
                yield Check(label, lambda place, body=body, values=values: body(place, *values))
