import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion.__main__ import DEBUG_VARIABLE, error_line, main
from conversion.router.arguments import RouterArguments

COMMANDS = ["convert", "calibrate", "inspect", "export", "add-expert", "generate", "serve", "push", "train-router"]


@pytest.fixture
def routed(stored):
    """The checkpoint with a router that sends "def" to code and everything else to math."""
    tensors = load_file(stored.folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(stored.folder)
    features = []
    model.router.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    for word in (4, 8):  # "two", "def" of the vocabulary
        model.route(torch.tensor([[word]]))
    difference = features[1][0] - features[0][0]
    tensors["router.head.weight"] = 9 * torch.stack([torch.zeros_like(difference), -difference, difference])
    middle = 4.5 * (features[0][0] + features[1][0]) @ difference
    tensors["router.head.bias"] = torch.stack([torch.tensor(-99.0), middle, -middle])
    save_file(tensors, stored.folder / "model.safetensors", metadata={"format": "pt"})
    return stored


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and not err
    assert f"channel-merge {command} " in out
    assert "Example" in out


def test_train_routers_help_has_every_option(run):
    """One text says what an option does, wherever it is read."""
    code, out, _ = run("train-router", "--help")
    text = " ".join(out.split())
    assert code == 0 and "--output-dir" in text and "--config" in text and "TrainingArguments" in text
    for option in dataclasses.fields(RouterArguments):
        assert option.name == "checkpoint" or f" --{option.name.replace('_', '-')} " in text, option.name
        assert option.name == "checkpoint" or option.metadata["help"] in text, option.name


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", ["calibrate", "generate", "serve", "train-router"])
def test_help_imports_nothing_heavy(command):
    """--help must answer at once."""
    code = (
        "import sys\nfrom conversion.__main__ import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'datasets', 'matplotlib', 'safetensors'} & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines()[-1] == "set()"


# What can be told without loading a model's libraries, and how the error begins.
EARLY_ERRORS = [
    (["convert", "nowhere.yaml", "out"], "cannot read the recipe"),
    (["convert", "wrong.yaml", "out"], "wrong.yaml: preset: unknown preset"),
    (["convert", "away.yaml", "out"], "base_model: there is no folder ./away"),
    (["convert", "away.yaml", "full"], "the output folder full is not empty"),
    (["calibrate", "away.yaml", "out"], "the recipe has no calibration texts"),
    (["inspect", "./nowhere"], "checkpoint: there is no folder ./nowhere"),
    (["inspect", "plain"], "plain is not a channel-merged checkpoint"),
    (["export", "merged", "out", "--expert", "chemistry"], "unknown expert 'chemistry'"),
    (["add-expert", "merged", "./nowhere", "out", "--name", "new"], "new: there is no folder ./nowhere"),
    (["generate", "merged", "--expert", "chemistry", "hello"], "unknown expert 'chemistry'"),
    (["push", "merged", "a/b/c"], "'a/b/c' is no name of a repository"),
    (["push", "plain", "a/b"], "plain is not a channel-merged checkpoint"),
    (["train-router", "merged", "--train-data", "a.jsonl"], "the following options are required: --output-dir"),
    (
        ["train-router", "plain", "--train-data", "a", "--output-dir", "out"],
        "plain is not a channel-merged checkpoint",
    ),
    (["refine", "merged", "--output-dir", "out"], "the following options are required: --recipe"),
]


def test_errors_that_need_no_model_import_nothing_heavy(stored, tmp_path):
    """They answer as quickly as --help: what they need of a checkpoint is the text of its config."""
    assert stored.folder == tmp_path / "merged"
    experts = [{"name": name, "model": "./away"} for name in ("a", "b")]
    for name, recipe in {
        "away": {"base_model": "./away", "experts": experts},
        "wrong": {"base_model": "./away", "experts": experts, "preset": "best"},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
    for folder, text in {"plain": {"model_type": "llama"}, "full": {}}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(text))
    code = (
        "import json, sys\nfrom conversion.__main__ import main\n"
        "for arguments in json.loads(sys.argv[1]):\n    try:\n        main(arguments)\n"
        "    except SystemExit as stop:\n        print(stop.code, *sorted({'torch', 'transformers', 'datasets', "
        "'accelerate', 'safetensors', 'numpy'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, json.dumps([arguments for arguments, _ in EARLY_ERRORS])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    errors = result.stderr.splitlines()
    for (arguments, message), code, error in zip(EARLY_ERRORS, result.stdout.splitlines(), errors, strict=True):
        assert error.startswith(f"Error: {message}"), arguments
        assert code == "2", arguments


def test_module_and_console_script_are_the_same_command(stored):
    """`python -m conversion` exits with 2 and one line for an error, as the console script does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "conversion", "inspect", str(stored.folder / "nowhere")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_inspect(run, stored, tmp_path):
    code, out, _ = run("inspect", stored.folder, "--plot", tmp_path / "plot.png")
    assert code == 0 and "q_proj" in out and "instruct + math" in out
    assert (tmp_path / "plot.png").is_file()
    code, out, _ = run("inspect", stored.folder, "--json")
    assert code == 0 and json.loads(out)["expert_names"] == ["instruct", "math", "code"]


def test_export(run, stored, tmp_path):
    code, out, _ = run("export", stored.folder, "--expert", "math", tmp_path / "out")
    assert code == 0 and "math" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, stored.experts[1]["lm_head.weight"])
    assert run("export", stored.folder, "--expert", "code", tmp_path / "out")[0] == 2
    assert run("export", stored.folder, "--expert", "code", tmp_path / "out", "--overwrite")[0] == 0


def test_add_expert(run, stored, tmp_path):
    assert run("export", stored.folder, "--expert", "math", tmp_path / "math")[0] == 0
    command = ("add-expert", stored.folder, tmp_path / "math", tmp_path / "out", "--no-progress")
    code, out, err = run(*command, "--name", "twin")
    assert code == 0 and re.search(r"expert twin reads (\d+) of its \1 rows where they were", out) and not err
    code, out, err = run(*command, "--name", "math")
    assert code == 2 and not out and "is not empty" in err
    code, out, err = run(*command, "--name", "math", "--overwrite")
    assert code == 2 and "has an expert 'math'" in err and "--replace" in err and err.count("\n") == 1
    code, out, err = run(*command, "--name", "math", "--overwrite", "--replace", "--tolerance", "-1")
    assert code == 2 and "tolerance is -1.0" in err
    code, out, err = run(*command, "--name", "code", "--overwrite", "--replace")
    assert code == 0 and "expert code reads" in out
    assert run("inspect", tmp_path / "out")[0] == 0


def test_convert_then_export(run, make_experts, write_recipe, tmp_path):
    """With as many groups as experts, what comes out of the command line is what went in."""
    base, experts = make_experts("llama", 2)
    recipe = tmp_path / "recipe.yaml"
    write_recipe(base, experts, recipe, grouping={"num_groups": 2})
    code, out, err = run("convert", recipe, tmp_path / "merged", "--no-progress", "--max-shard-size", "20KB")
    assert code == 0 and str(tmp_path / "merged") in out and not err
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert run("inspect", tmp_path / "merged")[0] == 0
    for number, expert in enumerate(experts):
        assert run("export", tmp_path / "merged", "--expert", f"e{number}", tmp_path / f"out{number}")[0] == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (expert, tmp_path / f"out{number}"))
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


def test_convert_dry_run(run, make_experts, write_recipe, tmp_path):
    """The plan is printed and nothing is written; what a conversion would refuse is refused here too."""
    base, experts = make_experts("qwen2", 3)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "merged"
    write_recipe(base, experts, recipe, preset="paper-ties")
    code, text, _ = run("convert", recipe, out, "--dry-run", "--max-memory", "1GB")
    assert code == 0 and not out.exists() and not list(tmp_path.glob(".*"))
    assert "at most" in text and "tied head" in text and "of 1.00 GB" in text
    assert run("convert", recipe, out, "--dry-run", "--max-memory", "10MB")[0] == 2
    out.mkdir()
    (out / "file").touch()
    code, _, err = run("convert", recipe, out, "--dry-run")
    assert code == 2 and "is not empty" in err


def test_convert_errors(run, make_experts, write_recipe, tmp_path):
    """A misspelt key is one line with the nearest one that exists; an output folder with a model stays."""
    base, experts = make_experts("llama", 2)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "merged"
    write_recipe(base, experts, recipe, groupin={"num_groups": 2})
    code, _, err = run("convert", recipe, out)
    assert code == 2 and "grouping" in err and err.count("\n") == 1 and not out.exists()
    write_recipe(base, experts, recipe)
    assert run("convert", recipe, out, "--no-progress")[0] == 0
    code, _, err = run("convert", recipe, out, "--no-progress")
    assert code == 2 and "not empty" in err
    assert run("convert", recipe, out, "--no-progress", "--overwrite")[0] == 0
    recipe.write_text("experts: [")
    code, _, err = run("convert", recipe, tmp_path / "other")
    assert code == 2 and err.count("\n") == 1


def test_generate_routes_every_prompt(run, routed):
    """One mixed batch gives each prompt the answer that it gets alone; expert and probability stand before it."""
    options = ("--max-new-tokens", "4")
    code, mixed, _ = run("generate", routed.folder, "two two two", "def", *options)
    assert code == 0
    alone = "".join(run("generate", routed.folder, prompt, *options)[1] for prompt in ("two two two", "def"))
    assert mixed == alone
    first, answer, _, second, *_ = mixed.splitlines()
    assert first.startswith("[math 0.") or first.startswith("[math 1.")
    assert second.startswith("[code ") and second.endswith("] def")
    assert answer and "<" not in answer


def test_generate_with_a_given_expert(run, stored):
    code, out, _ = run(
        "generate", stored.folder, "two", "--expert", "code", "--max-new-tokens", "3", "--dtype", "float32"
    )
    assert code == 0 and out.startswith("[code given] two\n")


def test_generate_with_a_chat_template(run, stored, write_tokenizer):
    options = ("--expert", "code", "--max-new-tokens", "3")
    code, _, err = run("generate", stored.folder, "two", "--chat", *options)
    assert code == 2 and "no chat template" in err
    plain = run("generate", stored.folder, "user two", *options)[1].splitlines()[1]
    write_tokenizer(stored.folder, chat=True)
    assert run("generate", stored.folder, "two", *options)[1].splitlines()[1] == plain
    assert run("generate", stored.folder, "user two", "--no-chat", *options)[1].splitlines()[1] == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["two", " "], "prompt 2 of 2 is empty"),
        (["two", "--expert", "maths"], "unknown expert 'maths'"),
        (["two", "--dtype", "int8"], "dtype is 'int8', expected one of auto, float32"),
        (["two", "--device", "warp"], "device 'warp' cannot be used here"),
    ],
)
def test_generate_errors(run, stored, options, message):
    code, out, err = run("generate", stored.folder, *options)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_train_router(run, stored, tmp_path):
    rows = [{"text": "one two", "expert": "math"}, {"text": "def print", "expert": "code"}] * 4
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--train-data", data, "--output-dir", tmp_path / "out", "--max-steps", "2", "--disable-tqdm", "true")
    code, out, _ = run("train-router", stored.folder, *options, "--use-cpu")
    assert code == 0 and "picked expert" in out and "macro accuracy" in out
    assert (tmp_path / "out" / "router_eval.json").is_file()
    code, _, err = run("train-router", stored.folder, *options, "--use-cpu")
    assert code == 2 and "is not empty" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "nowhere.yaml", "out"],
        ["inspect", "nowhere/"],
        ["export", "nowhere/", "--expert", "math", "out"],
        ["generate", "nowhere/", "two"],
        ["train-router", "nowhere/", "--train-data", "x.jsonl", "--output-dir", "out"],
        ["train-router", "nowhere/"],
    ],
    ids=lambda arguments: "-".join(arguments[:1] + arguments[2:3]),
)
def test_missing_input_is_one_line(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_usage_errors_exit_with_2(run):
    for arguments in (["convert"], ["export", "merged", "out"], ["frobnicate"]):
        code, _, err = run(*arguments)
        assert code == 2 and "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="there is no folder"):
        main(["inspect", str(tmp_path / "nowhere")])


class Example(BaseModel):
    number: int


def test_error_line():
    """Any expected error is one line that says where and what."""
    with pytest.raises(ValidationError) as caught:
        Example(number="many")
    assert error_line(caught.value).startswith("number: Input should be a valid integer")
    assert error_line(ValueError("two\n  lines")) == "two lines"
    assert (
        error_line(FileNotFoundError(2, "No such file or directory", "a.yaml")) == "a.yaml: No such file or directory"
    )
    assert error_line(ValueError()) == "ValueError"


def test_a_network_error_is_one_line(monkeypatch, capsys):
    client_error = type("ConnectError", (Exception,), {"__module__": "httpx2"})

    def unreachable(arguments):
        raise client_error("name or service not known")

    monkeypatch.setattr("conversion.__main__.app", unreachable)
    with pytest.raises(SystemExit, match="2"):
        main(["push", "merged", "user/name"])
    assert capsys.readouterr().err == "Error: name or service not known\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise KeyError("ours")

    monkeypatch.setattr("conversion.__main__.app", broken)
    with pytest.raises(KeyError):
        main(["inspect", "merged"])
