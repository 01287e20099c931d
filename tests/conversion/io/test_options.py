import pytest

from conversion.io.options import format_bytes, format_count, parse_size


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(size) for size in (7, "7", "5GB", "1.5 MB", "2KiB")] == [7, 7, 5 * 10**9, 1500000, 2048]
    for wrong in ("5 apples", "", "-1", "0"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1500, "1.50 kB"), (2_500_000, "2.50 MB"), (3_000_000_000, "3.00 GB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (9999, "9,999"), (13_312, "13.31 k"), (1_970_688, "1.971 M"), (7 * 10**9, "7 G")]
)
def test_format_count(count, text):
    assert format_count(count) == text
