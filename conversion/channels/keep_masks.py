"""Which elements of a delta a random drop keeps: a hash of each element's place decides, by itself."""

import hashlib
import json

import torch

# Elements that are hashed at once: the counters, their hash and a scratch copy, int32, fit the cache.
BLOCK_ELEMENTS = 1 << 16


def keep_mask(
    seed: int,
    expert: str,
    tensor_name: str,
    start: int,
    count: int,
    density: float,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which elements of a tensor a random drop keeps: elements `start` to `start + count` of it, flattened.

    Element i is kept where a 32-bit hash of (seed, expert, tensor, i) is below density * 2^32: every element by
    itself, so that chunks, order and device do not matter. All arithmetic is on integers.

    Returns:
        (count,) bool.
    """
    if start < 0 or count < 0:
        raise ValueError(f"elements {start} to {start + count} are not a range of a tensor")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}, expected 0 to 1")
    kept = torch.empty(count, dtype=torch.bool, device=device)
    if density == 1:
        return kept.fill_(True)
    limit = int(density * 2**32) - 2**31  # the hash is compared as a signed number, 2^31 lower
    ramp = torch.arange(min(count, BLOCK_ELEMENTS), dtype=torch.int32, device=device)
    hashed, shifted = torch.empty_like(ramp), torch.empty_like(ramp)
    done = 0
    while done < count:
        page, offset = divmod(start + done, 2**32)  # 32-bit counters within a page of 2^32 elements
        size = min(count - done, BLOCK_ELEMENTS, 2**32 - offset)
        keys = _mask_keys(seed, expert, tensor_name, page)
        _hash_counters(ramp[:size], offset, keys, hashed[:size], shifted[:size])
        torch.lt(hashed[:size], limit, out=kept[done : done + size])
        done += size
    return kept


def _mask_keys(seed: int, expert: str, tensor_name: str, page: int) -> tuple[int, int]:
    """Two 32-bit keys for one page of one expert's tensor."""
    text = json.dumps([seed, expert, tensor_name, page])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _hash_counters(
    ramp: torch.Tensor, offset: int, keys: tuple[int, int], out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Hash the counters `ramp + offset` into `out`, all int32 with arithmetic modulo 2^32.

    Three xorshift-multiply rounds ("triple32" without its last shift, which reaches the lowest bits only), the first
    key added to the counter and the second mixed in between, so that no two streams are shifts of one another.
    """
    torch.add(ramp, _signed(offset + keys[0]), out=out)
    _xor_shift(out, 17, scratch)
    out.mul_(_signed(0xED5AD4BB)).bitwise_xor_(_signed(keys[1]))
    _xor_shift(out, 11, scratch)
    out.mul_(_signed(0xAC4C1B51))
    _xor_shift(out, 15, scratch)
    out.mul_(_signed(0x31848BAB))


def _xor_shift(values: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """values ^= values >> shift, without the sign bits that int32 would shift in."""
    torch.bitwise_right_shift(values, shift, out=scratch)
    values.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int) -> int:
    """The int32 with the lowest 32 bits of `word`."""
    return ((word + 2**31) & (2**32 - 1)) - 2**31
