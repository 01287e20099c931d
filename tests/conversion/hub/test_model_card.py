import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from conversion.convert import convert
from conversion.export import export_expert
from conversion.io.sources import Source, input_files
from conversion.merging import places
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

    def make(*metadata, from_hub=False, template=None, **keys) -> ModelCard:
        base, experts = make_experts("llama", 2, num_hidden_layers=1)
        if template is not None:
            for folder in (base, *experts):
                (folder / "chat_template.jinja").write_text(template)
        for folder, values in zip((base, *experts), metadata, strict=True):
            if values is not None:
                write_readme(folder, **values)
        recipe = write_recipe(base, experts, **{"grouping": {"num_groups": 1}, **keys})
        if from_hub:
            folders = {"user/base": base, "user/e0": experts[0], "user/e1": experts[1]}
            recipe["base_model"] = "user/base"
            for expert in recipe["experts"]:
                expert["model"] = f"user/{expert['name']}@main"
            for find in ("find_source", "find_place"):
                monkeypatch.setattr(
                    places,
                    find,
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
        "widget": [{"text": "What is 17 + 25?"}, {"text": "Write a haiku about rain."}],
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


def test_no_place_of_this_machine_is_written_down(card_of, tmp_path):
    """Neither in the cards nor in what they are made from."""
    card_of(None, None, None)
    export_expert(tmp_path / "out", "e1", tmp_path / "e1")
    files = [file for folder in ("out", "e1") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    assert {"README.md", "conversion_report.json", "config.json"} <= {file.name for file in files}
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes(), file


def snippet(card: ModelCard, folder) -> str:
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    assert '"path/or/repository", "main"' in code
    return code.replace('"path/or/repository"', repr(str(folder)))


@pytest.mark.parametrize("chat", [True, False])
def test_the_snippets_run(card_of, tmp_path, capsys, chat):
    """As they stand, in the chat template where there is one, for the merged model and for an expert of it."""
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}" if chat else None
    card = card_of(None, None, None, template=template)
    assert ("conversational" in card.data.tags) == chat
    question = "What is 17 + 25?"
    widget = {"messages": [{"role": "user", "content": question}]} if chat else {"text": question}
    assert card.data.to_dict()["widget"][0] == widget
    values = {}
    exec(snippet(card, tmp_path / "out"), values)
    assert type(values["model"]).__name__ == "ChannelMergedForCausalLM" and len(values["chosen"])
    export_expert(tmp_path / "out", "e1", tmp_path / "e1")
    export = ModelCard.load(tmp_path / "e1" / "README.md", ignore_metadata_errors=False)
    values = {}
    exec(snippet(export, tmp_path / "e1"), values)
    assert type(values["model"]).__name__ == "LlamaForCausalLM"
    expected = f"[{question}]" if chat else question
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line[2:].startswith(expected) for line in printed), printed


def test_the_card_of_an_exported_expert(card_of, tmp_path):
    """It comes of all models whose rows may be in it, or of its own alone where it is that one bit for bit."""
    licences = [{"license": "mit", "language": "en"}, {"license": "mit"}, {"license": "apache-2.0"}]
    card_of(*licences, from_hub=True)
    export_expert(tmp_path / "out", "e1", tmp_path / "e1")
    card = ModelCard.load(tmp_path / "e1" / "README.md", ignore_metadata_errors=False)
    values = card.data.to_dict()
    assert values["base_model"] == ["user/base", "user/e0", "user/e1"] and values["base_model_relation"] == "merge"
    assert (values["license"], values["license_name"]) == ("other", "several")
    error = re.search(r"relative error of that, .* is ([\d.]+)%", card.text, re.DOTALL)
    assert 50 < float(error[1]) < 100
    shutil.rmtree(tmp_path / "out")
    card_of(*licences, from_hub=True, grouping={"num_groups": 2})
    export_expert(tmp_path / "out", "e1", tmp_path / "e1", overwrite=True)
    card = ModelCard.load(tmp_path / "e1" / "README.md", ignore_metadata_errors=False)
    values = card.data.to_dict()
    assert values["base_model"] == ["user/e1"] and "base_model_relation" not in values
    assert values["license"] == "apache-2.0" and "bit for bit" in card.text


def test_an_export_without_a_report_has_no_card(card_of, tmp_path, caplog):
    card_of(None, None, None)
    (tmp_path / "out" / "conversion_report.json").unlink()
    export_expert(tmp_path / "out", "e1", tmp_path / "e1")
    assert not (tmp_path / "e1" / "README.md").exists() and (tmp_path / "e1" / "config.json").exists()
    assert "is no report of a conversion" in caplog.text


def test_the_body_comes_from_the_run(card_of, tmp_path):
    card = card_of(None, None, None, seed=7)
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 7 and recipe["grouping"]["num_groups"] == 1
    for heading in ("## Use", "## How it was made", "## Limits", "## Citation"):
        assert heading in card.text
    loading = {line.split()[0]: line for line in card.text.splitlines() if ".from_pretrained(checkpoint" in line}
    assert "revision=revision" in loading["tokenizer"] and "trust_remote_code=True" in loading["tokenizer"]
    assert "revision=revision" in loading["model"] and "trust_remote_code=True" in loading["model"]
    (line,) = [line for line in card.text.splitlines() if line.startswith("| `e1` | `")]
    share = float(line.split("|")[-2].strip().removesuffix("%"))
    assert 50 < share < 100  # two experts with independent deltas averaged: about 71 %


def test_a_licence_does_not_break_the_table(card_of):
    """What others wrote stays in its cell."""
    card = card_of(None, {"license": "other", "license_name": "mine | yours\nand theirs"}, None)
    (line,) = [line for line in card.text.splitlines() if line.startswith("| `e0` | `")]
    assert line.split(" | ")[3] == "mine &#124; yours and theirs" and line.count("|") == 8
