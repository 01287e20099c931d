"""Generated router queries are reproducible and different."""

import pytest

from conversion.router.style_queries import STYLES, style_queries


@pytest.mark.parametrize("expert", STYLES)
def test_reproducible_and_different(expert):
    texts = style_queries(expert, 200, seed=1)
    assert texts == style_queries(expert, 200, seed=1)
    assert len(set(texts)) == 200 and all(text.strip() for text in texts)
    assert texts != style_queries(expert, 200, seed=2)


def test_chinese_queries_are_chinese():
    texts = style_queries("chinese", 100, seed=0)
    assert all(any("\u4e00" <= character <= "\u9fff" for character in text) for text in texts)
