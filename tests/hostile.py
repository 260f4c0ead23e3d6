"""Files made to be refused: how many of each kind are tried, and the values they are made of."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from wemoe_plugin.errors import WemoeError

CASES = {
    "headers": 600,
    "indexes": 300,
    "configurations": 200,
    "recipes": 700,
    "recipes of any text": 300,
    "torch files": 400,
    "pickles": 700,
    "adapters": 200,
}
"""Generated cases, 3,400 in all; the same ones in every run."""

ODD_JSON = [
    *("null", "true", "0", "-1", "1.5", "1e400", "NaN", "[]", "{}", '""', '"x"', '["F32"]', "[[1], {}]", '{"a": null}'),
    *('"\\ud800"', '"a\\u0000b"', '"../x"', '".."', f'"{"x" * 300}"', f'"{"7" * 5000}"', "18446744073709551616"),
    *("9" * 4000, "9" * 5000, "[" * 50_000, "[" * 500 + "]" * 500, '"(a+)+$"', '"("', '{"(a+)+$": 1}', "[1e999]"),
]
"""Values that are not what a reader expects; some are not even JSON."""

odd_json = st.sampled_from(ODD_JSON)


def cases(kind: str) -> settings:
    """The settings of a test of that kind. Its folder serves all its cases: each writes the file anew."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=CASES[kind], deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )


def refusal(read: Callable[[], object], kind: type[WemoeError]) -> str | None:
    """Why something is not read; None if it is. Any other exception is the test's failure."""
    try:
        read()
    except kind as error:
        return str(error)
    return None


def json_object(pairs: list[tuple[str, str]]) -> str:
    """A JSON object of texts that are JSON, or are not; names may stand twice."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"
