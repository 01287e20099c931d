"""What the commands' options say, and numbers as a reader wants them: sizes, counts, shares, devices."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to load, and most errors need none of it
    import torch

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes of a size such as 5000000, "5GB" or "500MiB"; `name` is what an error calls it."""
    text = str(size).strip().upper()
    for unit, factor in SIZE_UNITS.items():
        if text.endswith(unit) and text[: -len(unit)].strip().replace(".", "", 1).isdigit():
            return _positive(int(float(text[: -len(unit)]) * factor), size, name)
    if text.isdigit():
        return _positive(int(text), size, name)
    raise ValueError(f"{name} is {size!r}, expected a number of bytes or a size such as '5GB'")


def _positive(count: int, size: int | str, name: str) -> int:
    if count < 1:
        raise ValueError(f"{name} is {size!r}, expected at least one byte")
    return count


def format_bytes(count: int) -> str:
    """A number of bytes with the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} bytes"


def format_count(count: int) -> str:
    """A number as it is up to four digits, then four of them with the unit that suits it."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= max(size, 10**4):
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def format_share(value: float | None) -> str:
    """A share as a percentage; "-" for None."""
    return "-" if value is None else f"{value:.1%}"


def find_device(device: str | None) -> "torch.device":
    """The named device, or the accelerator if there is one; ValueError where this machine does not have it."""
    import torch

    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def check_dtype(dtype: str) -> None:
    """ValueError where a model is not loaded as that: one of DTYPES, "auto" for what is stored."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
