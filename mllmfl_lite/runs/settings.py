"""Checks that the settings of every stage share: an error names the rule and the value."""

from __future__ import annotations

from collections.abc import Iterable


def is_of(value: object, kind: type) -> bool:
    """Whether a value from a file is of a parameter's type: whole numbers may be floats, booleans are no numbers."""
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def check_whole(settings: object, *names: str, least: int = 1) -> None:
    """Raise `ValueError` unless these attributes are whole numbers of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")


def check_choice(settings: object, **choices: Iterable[str]) -> None:
    """Raise `ValueError` unless each of these attributes is one of its choices."""
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(settings, name)!r}")
