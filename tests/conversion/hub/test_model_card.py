from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from conversion.convert import convert
from conversion.io.sources import Source, input_files
from conversion.merging import plan as plan_module
from conversion.merging.recipe import parse_recipe

REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_readme(folder, **metadata):
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n", encoding="utf-8")


@pytest.fixture
def card_of(make_experts, write_recipe, tmp_path, monkeypatch):
    """Convert two experts whose model cards say what is given, and parse the card of the result.

    With `from_hub` the folders stand for Hub repositories user/base, user/e0 and user/e1 at one revision.
    """

    def make(*metadata, from_hub=False, **keys) -> ModelCard:
        base, experts = make_experts("llama", 2, num_hidden_layers=1)
        for folder, values in zip((base, *experts), metadata, strict=True):
            if values is not None:
                write_readme(folder, **values)
        recipe = write_recipe(base, experts, grouping={"num_groups": 1}, **keys)
        if from_hub:
            folders = {"user/base": base, "user/e0": experts[0], "user/e1": experts[1]}
            recipe["base_model"] = "user/base"
            for expert in recipe["experts"]:
                expert["model"] = f"user/{expert['name']}@main"
            monkeypatch.setattr(
                plan_module,
                "find_source",
                lambda name, model, _: Source(name, model, REVISION, folders[model.partition("@")[0]]),
            )
            monkeypatch.setattr(
                plan_module, "with_weights", lambda source: replace(source, files=input_files(source.folder))
            )
        convert(parse_recipe(recipe), tmp_path / "out", progress=False)
        return ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)

    return make


def test_metadata_for_the_hub(card_of):
    """What the Hub reads: sources, kind of relation, licence, languages, library and task."""
    card = card_of(
        {"license": "apache-2.0", "language": "en"},
        {"license": "apache-2.0", "language": ["en", "zh"]},
        {"license": "apache-2.0"},
        from_hub=True,
    )
    assert card.data.to_dict() == {
        "base_model": ["user/base", "user/e0", "user/e1"],
        "base_model_relation": "merge",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "channel-merging"],
    }
    assert (
        f"| `e0` | [user/e0](https://huggingface.co/user/e0/tree/{REVISION}) | {REVISION} | apache-2.0 |" in card.text
    )
    assert "same licence" in card.text


@pytest.mark.parametrize(
    ("metadata", "license", "name", "texts"),
    [
        (
            ({"license": "mit"}, {"license": "apache-2.0"}, {"license": "mit"}),
            *("other", "several", ["| mit |", "| apache-2.0 |", "apply together"]),
        ),
        (({"license": "mit"}, {"license": "mit"}, None), "other", "several", ["| mit |", "| not stated |"]),
        ((None, None, {"language": "en"}), None, None, ["states a licence"]),
        (
            ({"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"},) * 3,
            *("other", "gemma", ["[gemma](https://ai.google.dev/gemma/terms)", "same licence"]),
        ),
    ],
    ids=["different", "one-unknown", "all-unknown", "same-name"],
)
def test_licenses(card_of, metadata, license, name, texts):
    """A licence is the merged model's only if the base and all experts state it; each is listed."""
    card = card_of(*metadata)
    assert (card.data.license, card.data.to_dict().get("license_name")) == (license, name)
    for text in texts:
        assert text in card.text


def test_local_experts_are_no_repositories(card_of):
    """Folders of this machine are no Hub ids: there is no base_model then, and nothing is left to be filled in."""
    card = card_of(None, None, None)
    assert "base_model" not in card.data.to_dict() and "base_model_relation" not in card.data.to_dict()
    for text in ("More Information Needed", "None", "nan"):
        assert text not in card.text, text


def test_the_body_comes_from_the_run(card_of, tmp_path):
    card = card_of(None, None, None, seed=7)
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 7 and recipe["grouping"]["num_groups"] == 1
    for heading in ("## Use", "## How it was made", "## Limits", "## Citation"):
        assert heading in card.text
    loading = {line.split()[0]: line for line in card.text.splitlines() if ".from_pretrained(checkpoint" in line}
    assert "revision=revision" in loading["tokenizer"] and "trust_remote_code=False" in loading["tokenizer"]
    assert "revision=revision" in loading["model"] and "trust_remote_code=True" in loading["model"]
    (line,) = [line for line in card.text.splitlines() if line.startswith("| `e1` | `")]
    share = float(line.split("|")[-2].strip().removesuffix("%"))
    assert 50 < share < 100  # two experts with independent deltas averaged: about 71 %


def test_a_licence_does_not_break_the_table(card_of):
    """What others wrote stays in its cell."""
    card = card_of(None, {"license": "other", "license_name": "mine | yours\nand theirs"}, None)
    (line,) = [line for line in card.text.splitlines() if line.startswith("| `e0` | `")]
    assert line.split(" | ")[3] == "mine &#124; yours and theirs" and line.count("|") == 8
