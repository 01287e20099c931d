"""Errors and lists of names in a line for a reader."""

from collections.abc import Callable, Iterable

MAX_ERROR = 300  # characters: a library may repeat a whole file


def one_line(error: Exception, limit: int = MAX_ERROR) -> str:
    return " ".join(str(error).split())[:limit]


def first_names(names: Iterable[str], limit: int, shown: Callable[[str], str] = str) -> str:
    """The first names, each as `shown` makes it, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + more
