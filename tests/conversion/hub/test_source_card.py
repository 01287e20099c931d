import logging

import pytest

from conversion.hub.source_card import read_card


@pytest.mark.parametrize(
    "text", ["---\nlicense: [mit\n---\n", "---\n- mit\n---\n", "# no metadata\n"], ids=["broken", "list", "none"]
)
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, caplog, text):
    (tmp_path / "README.md").write_text(text)
    with caplog.at_level(logging.WARNING):
        card = read_card("math", tmp_path)
    assert card.license is None and card.languages == () and card.license_text == "not stated"
    assert ("math: the metadata of" in caplog.text) == text.startswith("---")


def test_norwegian_is_a_language(tmp_path):
    (tmp_path / "README.md").write_text("---\nlanguage:\n- no\n- en\nlicense:\n- mit\n- bsd\n---\n")
    card = read_card("math", tmp_path)
    assert card.languages == ("no", "en") and card.license_text == "mit and bsd"
