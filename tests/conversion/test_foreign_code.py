"""No code of a base, an expert or an adapter runs, and none gets into what is written; the tokenizer needs none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_channel_merged
from conversion.add_expert import add_expert
from conversion.convert import convert
from conversion.export import export_expert
from conversion.generate import answer_prompts
from conversion.io.model_files import MAX_NAME_BYTES, check_file_name
from conversion.merging.recipe import parse_recipe
from conversion.train_router import main as train_router

OWN_CODE = {file.name for file in Path(modeling_channel_merged.__file__).parent.glob("*.py")} - {"__init__.py"}
HOSTILE_MAP = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
HOSTILE_CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({marker!r}).write_text("ran")
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
HOSTILE_NAMES = ["tokenization_evil.py", "tokenizer.py", "tokenizer_evil.py", "vocab.py", "chat_template.py"]

# PEFT 0.21 still asks Transformers by the deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def poison(folder: Path, marker: Path) -> None:
    """Put code wherever a tokenizer's files may be, and name it wherever Transformers looks for code."""
    for name in [*HOSTILE_NAMES, "additional_chat_templates/evil.py", "custom_generate/generate.py"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(HOSTILE_CODE.format(marker=str(marker)), encoding="utf-8")
    for name, code in (
        ("tokenizer_config.json", {"auto_map": HOSTILE_MAP, "tokenizer_class": "EvilTokenizer"}),
        ("generation_config.json", {"auto_map": HOSTILE_MAP}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}, "custom_pipelines": {"evil": {"impl": "evil.P"}}}),
    ):
        if (folder / name).exists():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps({**values, **code}), encoding="utf-8")


def save_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of the base with a tokenizer of its own."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def assert_clean(folder: Path) -> None:
    """Only our own code is there, and only our own is named."""
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.py*")} in (OWN_CODE, set())
    for file in folder.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "evil." not in text, file
        values = json.loads(text)
        assert "auto_map" not in values or file == folder / "config.json", file
        assert "auto_map" not in values.get("text_config", {}) and "custom_pipelines" not in text, file


LOAD = r"""
import sys
from transformers import AutoTokenizer
for keys in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    for folder in sys.argv[1:]:
        print(f"\n{AutoTokenizer.from_pretrained(folder, **keys)('two + two')['input_ids']}")
"""


@pytest.fixture
def hostile(make_experts, write_recipe, tmp_path):
    """Base, three experts and an adapter with hostile tokenizers; a recipe of two of the experts and the adapter."""
    marker = tmp_path / "ran"
    base, experts = make_experts("llama", 3)
    adapter = save_adapter(base, tmp_path / "adapter")
    for folder in (base, *experts, adapter):
        poison(folder, marker)
    yield base, experts, adapter, write_recipe(base, [*experts[:2], adapter])
    assert not marker.exists()


@pytest.mark.parametrize("source", ["base", "union"])
def test_no_command_runs_or_copies_foreign_code(
    hostile, tmp_path, source, write_jsonl, without_package, monkeypatch, caplog
):
    """Nor does a fresh offline process without this package, which loads every tokenizer without trusting any code."""
    base, experts, _, recipe = hostile
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # who is asked says yes
    merged, routed, larger, plain = (tmp_path / name for name in ("merged", "routed", "larger", "plain"))
    convert(parse_recipe({**recipe, "tokenizer_source": source}), merged, progress=False)
    assert "code of its own (auto_map), which is never run here" in caplog.text
    rows = [{"text": f"{name} {number}", "expert": name} for name in ("e0", "e1", "e2") for number in range(4)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    options = ("--max-steps", "1", "--disable-tqdm", "true", "--use-cpu")
    train_router(["--checkpoint", str(merged), "--train-data", data, "--output-dir", str(routed), *options])
    add_expert(routed, experts[2], larger, "new", progress=False)
    export_expert(larger, "new", plain)
    assert answer_prompts(larger, ["two"], expert="new", max_new_tokens=1)
    folders = [merged, routed, larger, plain, *(larger / "experts" / name for name in ("e0", "e2", "new"))]
    for folder in folders[:4]:
        assert_clean(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", without_package + LOAD, *folders]
    process = subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    (tmp_path / "clean").mkdir()
    shutil.copyfile(base / "tokenizer.json", tmp_path / "clean" / "tokenizer.json")
    expected = AutoTokenizer.from_pretrained(tmp_path / "clean")("two + two")["input_ids"]
    # Without an argument Transformers first asks about the model's code; nobody answers.
    ids = [line for line in process.stdout.splitlines() if line.startswith("[")]
    assert ids == [str(expected)] * 3 * len(folders)


def test_a_merged_checkpoints_foreign_code_stays_behind(hostile, tmp_path, write_jsonl, monkeypatch):
    """A checkpoint of somebody else, with code beside its weights and in its experts' folders."""
    base, experts, _, recipe = hostile
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    merged = tmp_path / "merged"
    convert(parse_recipe(recipe), merged, progress=False)
    for folder in (merged, merged / "experts" / "e0"):
        poison(folder, tmp_path / "ran")
    config = json.loads((merged / "config.json").read_text())
    config["text_config"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (merged / "config.json").write_text(json.dumps(config))
    rows = [{"text": f"{name} {number}", "expert": name} for name in ("e0", "e1", "e2") for number in range(4)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    options = ("--max-steps", "1", "--disable-tqdm", "true", "--use-cpu")
    train_router(
        ["--checkpoint", str(merged), "--train-data", data, "--output-dir", str(tmp_path / "routed"), *options]
    )
    add_expert(merged, experts[2], tmp_path / "larger", "new", progress=False)
    export_expert(merged, "e0", tmp_path / "plain")
    assert answer_prompts(merged, ["two"], expert="e0", max_new_tokens=1)
    for name in ("routed", "larger", "plain"):
        assert_clean(tmp_path / name)


@pytest.mark.parametrize("place", ["base", "expert", "adapter", "checkpoint"])
def test_a_chat_templates_name_is_no_path(make_experts, write_recipe, tmp_path, place):
    """`../../escaped` is refused before anything is read or written; nothing lies outside the output."""
    base, experts = make_experts("llama", 2)
    adapter = save_adapter(base, tmp_path / "adapter")
    recipe = parse_recipe(write_recipe(base, [experts[0], adapter], tokenizer_source="union"))
    convert(recipe, tmp_path / "merged", progress=False)
    poisoned = {"base": base, "expert": experts[0], "adapter": adapter, "checkpoint": tmp_path / "merged"}[place]
    file = poisoned / "tokenizer_config.json"
    templates = [{"name": name, "template": "x"} for name in ("default", "../../escaped")]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="the chat template '../../escaped' cannot name a file"):
        if place == "checkpoint":
            add_expert(poisoned, experts[1], tmp_path / "out", "new", progress=False)
        else:
            convert(recipe, tmp_path / "out", progress=False)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b", "con"])
def test_an_experts_name_in_a_checkpoint_is_no_path(stored, tmp_path, name):
    file = stored.folder / "config.json"
    file.write_text(file.read_text().replace('"math"', json.dumps(name)))
    for run in (
        lambda: export_expert(stored.folder, name, tmp_path / "plain"),
        lambda: answer_prompts(stored.folder, ["one"], expert=name),
    ):
        with pytest.raises(ValueError, match=f"config.json: expert name '{name}' cannot name a file"):
            run()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "/a", "C:a", "a\n", "a\0b", "a\u2028b", "a\u202eb", "\ud800", "nul"]
    + ["COM1.txt", "end.", "end ", "a*", "é" * (MAX_NAME_BYTES // 2 + 1), None, 5, ["a"]],
)
def test_names_that_no_file_can_have(name):
    with pytest.raises(ValueError, match="the template .* cannot name a file") as error:
        check_file_name(name, "the template")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["default", "math-pro", "rag v2", "数学", "console", "a.b", "x" * MAX_NAME_BYTES])
def test_names_that_files_can_have(name):
    check_file_name(name, "the template")


@pytest.mark.parametrize("name", ["CON", "nul", "x" * (MAX_NAME_BYTES + 1)])
def test_an_experts_name_in_a_recipe_names_files(name):
    experts = [{"name": name, "model": "a"}, {"name": "b", "model": "b"}]
    with pytest.raises(ValueError, match="cannot name a file"):
        parse_recipe({"base_model": "base", "experts": experts})


@pytest.mark.parametrize("text", ["[]", "{", "5"])
def test_a_tokenizer_config_that_is_no_object_is_named(make_experts, write_recipe, tmp_path, text):
    base, experts = make_experts("llama", 2)
    (base / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="base/tokenizer_config.json (is not JSON|is .*expected a JSON object)"):
        convert(parse_recipe(write_recipe(base, experts)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
