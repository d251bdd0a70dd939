"""Fields of other programs' configurations, checked: whoever names a field that feste does not compute is refused."""

from __future__ import annotations

from collections.abc import Mapping

from feste.errors import FesteError


class ModelError(FesteError):
    """A directory that is no model feste can read or write: names it and the reason."""


def require_computed(values: Mapping, computed: Mapping[str, tuple], source: str) -> None:
    """ModelError unless each field has one of the values that feste computes; None stands for one that is missing."""
    for name, allowed in computed.items():
        if values.get(name) not in allowed:
            known = " or ".join(repr(value) for value in allowed if value is not None)
            raise ModelError(f"{source}: {name} is {values.get(name)!r}; feste computes {known}")


def integer(values: Mapping, name: str, source: str) -> int:
    """A positive whole number."""
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise ModelError(f"{source}: {name} is {value!r}, and should be a positive whole number")
    return value
