"""Errors that a user can mend, and the registries whose unknown names are such errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """A flag, file, field or reward that is wrong. Commands print its message in one line."""


class NotFiniteError(UsageError, FloatingPointError):
    """A reward, energy or gradient that is not finite; the message names it."""


class DivergedError(NotFiniteError):
    """A policy whose videos or energies are not finite: no reward is at fault."""


class SharedError(UsageError):
    """An error that one of several processes has met, raised on all; the message names both."""


class SaveError(UsageError):
    """A checkpoint that cannot be saved; the message names it, the reason and the last good one."""


class MissingPackageError(UsageError, ImportError):
    """A package that an extra installs; the message names the extra."""


class MissingKeyError(UsageError, KeyError):
    """A key that a file does not have; the message names both and says what makes it."""

    __str__ = UsageError.__str__  # KeyError would print the message in quotes


def nearest(name: str, names: Iterable[str]) -> str:
    """The ending of an error message, "; did you mean 'train.iterations'?".

    It is empty if nothing resembles `name`. Of a dotted name the last word counts by itself too, so
    that the wrong section is forgiven.
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def resemblance(other: str) -> tuple[float, float]:
        whole = ratio(name, other)
        return max(whole, ratio(name.rpartition(".")[2], other.rpartition(".")[2])), whole

    best = max(names, key=resemblance, default="")
    return f"; did you mean {best!r}?" if best and resemblance(best)[0] > 0.6 else ""


def shortened(items: Sequence[object], most: int = 5) -> str:
    """The first of them, and how many more there are: "a, b and 7 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def listed(names: Sequence[str], most: int = 3) -> str:
    """Quoted names for a message, `shortened`."""
    return shortened([repr(name) for name in names], most)


class Registry(dict[str, T], Generic[T]):
    """name -> alternative, for one config field.

    The registry stands where the alternatives are implemented. The config check and every error
    message read it, so an entry that anybody adds is a valid value of the field at once.

    Args:
      field: dotted name of the config field.
      entries: the alternatives that ship.
    """

    def __init__(self, field: str, entries: dict[str, T]):
        super().__init__(entries)
        self.field = field

    def __missing__(self, name: str) -> T:
        raise UsageError(
            f"config.{self.field}={name!r} is not one of {', '.join(self)}{nearest(name, self)}"
        )
