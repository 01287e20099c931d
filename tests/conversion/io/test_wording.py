from conversion.io.wording import first_names, one_line


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 1000), limit=7) == "x" * 7
    assert len(one_line(ValueError("x" * 1000))) < 1000


def test_many_names_are_the_first_and_a_count():
    assert first_names(iter("abc"), 3) == "a, b, c"
    assert first_names("abc", 1) == "a and 2 more"
    assert first_names(map(str, range(1234)), 2, repr) == "'0', '1' and 1,232 more"
    assert first_names([], 2) == ""
