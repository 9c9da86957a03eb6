"""Every named term of every optimizer, transform, decay and write, and the tests that see it turned off."""

from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """One term, where it stands (exactly once in its file), what stands there instead, and which tests see it."""

    term: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


def hostile(case: str, scenario: str = "smooth", backend: str = "eager") -> str:
    return f"test_reference.py::test_hostile_gradients_do_what_the_paper_says[{case}-{scenario}-{backend}]"


def limit(name: str, *parameters: str) -> str:
    return f"test_limits.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def law(name: str, *parameters: str) -> str:
    return f"test_laws.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def golden(case: str, file: str) -> str:
    return f"test_golden.py::test_a_golden_run_is_followed[{case}-{file}-eager]"


def rows(file: str, *given: tuple[str, str, str, tuple[str, ...] | str]) -> Iterator[Mutant]:
    for term, text, instead, tests in given:
        yield Mutant(term, f"gradkit/{file}", text, instead, (tests,) if isinstance(tests, str) else tests)
