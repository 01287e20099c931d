"""A merged checkpoint for the tools that people bring; `make test-tools` installs those."""

import pytest

from conversion.convert import convert
from conversion.merging.recipe import parse_recipe

NAMES = ["math", "code", "law"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture
def merged(make_experts, write_recipe, tmp_path):
    """The folder of three experts of a tiny Llama, every row exact, with one chat template of all."""
    base, experts = make_experts("llama", 3)
    for folder in (base, *experts):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    recipe = write_recipe(base, experts, grouping={"num_groups": 3})
    for expert, name in zip(recipe["experts"], NAMES, strict=True):
        expert["name"] = name
    convert(parse_recipe(recipe), tmp_path / "merged", progress=False)
    return tmp_path / "merged"
