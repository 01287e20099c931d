"""Mutated inputs: whatever stands in a file, a command ends by itself, with exit code 0, or with 2 and one line.

One worker runs the command line's own `main` in its process, hundreds of times, under limits of time and memory that
end it; the next one then goes on behind the case that did it. A failure names the case; run it alone with

    FUZZ_SEED=0 FUZZ_CASES=17,18 python -m pytest tests/conversion/test_foreign_inputs.py
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NUM_CASES = 500
CPU_SECONDS, WALL_SECONDS = 10, 60  # a pipe that is waited for takes no time of the processor
LOGGED = ("INFO: ", "WARNING: ", "[transformers] ")  # beside the error
MEMORY = 2 << 30  # beside the interpreter's own

CONFIGS = ["base/config.json", "e0/config.json", "adapter/adapter_config.json", "merged/config.json"]
INDEX = "sharded/model.safetensors.index.json"
HEADERS = ["base/model.safetensors", "e1/model.safetensors", "adapter/adapter_model.safetensors"]
MERGED_HEADER = "merged/model.safetensors"
SMALL = ["e0/generation_config.json", "merged/generation_config.json", "merged/conversion_report.json"]
RECIPE, DATA, MESSAGES = "recipe.yaml", "data.jsonl", "messages.jsonl"

COMMANDS = {
    "dry-run": ["convert", "recipe.yaml", "out", "--dry-run"],
    "convert": ["convert", "recipe.yaml", "out", "--no-progress"],
    "inspect": ["inspect", "merged"],
    "export": ["export", "merged", "--expert", "e1", "out"],
    "add-expert": ["add-expert", "merged", "e1", "out", "--name", "more", "--no-progress"],
    "add-adapter": ["add-expert", "merged", "adapter", "out", "--name", "more", "--base", "base", "--no-progress"],
    "generate": ["generate", "merged", "two", "--expert", "e0", "--max-new-tokens", "2", "--device", "cpu"],
    "messages": ["generate", "merged", "--messages", "messages.jsonl", "--max-new-tokens", "2", "--device", "cpu"],
    "push": ["push", "merged", "user/name"],
    "train-router": (
        "train-router merged --train-data data.jsonl --output-dir out --max-steps 1 --use-cpu --disable-tqdm true"
    ).split(),
}
# Which commands read a file, the more often named the more often run.
READERS = {
    "base/": ["dry-run"] * 4 + ["convert", "add-adapter"],
    "e0/": ["dry-run"] * 4 + ["convert"],
    "e1/": ["dry-run"] * 3 + ["add-expert"],
    "sharded/": ["dry-run"],
    "adapter/": ["dry-run", "add-adapter"],
    "merged/": ["inspect"] * 3 + ["export"] * 3 + ["push"] * 3 + ["add-expert", "generate", "train-router"],
    RECIPE: ["dry-run"],
    DATA: ["train-router"],
    MESSAGES: ["messages"],
}

NESTED: Any = []
for _ in range(100):
    NESTED = [NESTED]
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    62,
    63,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "1e9",
    "\ud800",
    "\u2028",
]
VALUES += [
    10**9,
    10**12,
    2**63,
    10**30,
    -(10**9),
    10**400,
    [],
    {},
    [[]],
    [None],
    ["x"],
    {"x": 1},
    {"x": {}},
    [0, 1],
    [-1, 2],
]
VALUES += [
    "../x",
    "/etc/hostname",
    "a" * 5000,
    NESTED,
    [0] * 1000,
    [[0, 1]] * 100_000,
    "I8",
    "BOOL",
    "F64",
    "F32",
    "x\0y",
]
TEXTS = [b"", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100 + b"1" + b"}" * 100]
TEXTS += [b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"\0" * 100, b"- x\n- y: &a [*a]\n", b"!!python/object:os.system {}"]


def set_value(*keys: str | int, value: Any) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return edit


FIRST = "model.layers.0.self_attn.q_proj.weight"
MERGED_FIRST = "model.model.layers.0.self_attn.q_proj.channel_index"
WHOLE = "nothing mutated"
# What once ended in a traceback, a wrong model or never: (file, mutation, command).
KNOWN: list[tuple[str, Any, str]] = [
    *((WHOLE, None, command) for command in COMMANDS),
    *(
        (file, text, command)
        for file, command in zip(CONFIGS, ["dry-run", "dry-run", "add-adapter", "inspect"])
        for text in (b"[]", b"null", TEXTS[8], b"[" * 100_000)
    ),
    *(
        (file, "pipe", command)
        for file, command in ((CONFIGS[0], "dry-run"), (CONFIGS[3], "export"), (INDEX, "dry-run"))
    ),
    *(
        (CONFIGS[0], set_value(key, value=value), "dry-run")
        for key, value in (
            ("dtype", "x"),
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 10**12),
            ("num_experts", 10**9),
            ("vocab_size", 10**12),
            ("hidden_size", "x"),
            ("hidden_size", -1),
            ("num_attention_heads", 0),
            ("auto_map", {}),
            ("quantization_config", None),
            ("quantization_config", []),
            ("rope_parameters", "x"),
            ("pad_token_id", 10**9),
            ("vocab_size", 10**9),
            ("model_type", None),
            ("model_type", []),
            ("num_labels", 10**9),
        )
    ),
    *(
        (CONFIGS[3], set_value(key, value=value), command)
        for command in ("inspect", "generate")
        for key, value in (
            ("num_experts", 10**9),
            ("expert_names", 3),
            ("expert_names", None),
            ("rows", []),
            ("router", {"layers": "x"}),
            ("router", {"threshold": None}),
            ("expert_vocabularies", {"e0": {"size": 10**9, "runs": [[0, 250]] * 100_000}}),
            ("expert_vocabularies", {"e0": {"size": 25_000_000, "runs": [[0, 250]] * 100_000}}),
            ("expert_vocabularies", {"e0": {}}),
            ("text_config", None),
            ("text_config", {"model_type": "llama", "num_hidden_layers": 10**9}),
            ("expert_names", ["e\ud800", "x"]),
            ("format_version", True),
            ("dtype", "x"),
            ("merge", 3),
        )
    ),
    *(
        (INDEX, set_value("weight_map", value=value), "dry-run")
        for value in ([], 3, {"x": 1}, {"x": ["y"]}, {"x": "../y"})
    ),
    *(
        (HEADERS[0], set_value(FIRST, key, value=value), "dry-run")
        for key, value in (
            ("shape", ["x", "y"]),
            ("shape", "x"),
            ("shape", [24.0, 24]),
            ("shape", [-24, -24]),
            ("dtype", "I8"),
            ("dtype", "BOOL"),
            ("dtype", "F64"),
            ("dtype", []),
            ("data_offsets", [0, 10**30]),
            ("data_offsets", ["0", "1"]),
            ("data_offsets", [8]),
        )
    ),
    *(
        (MERGED_HEADER, set_value(MERGED_FIRST, "dtype", value=value), command)
        for value in ("BOOL", "U8", "F32", "x")
        for command in ("inspect", "export", "generate", "train-router", "push", "add-expert")
    ),
    *(
        (file, size, command)
        for size in (200 * 10**9, 2**63, 2**64 - 1, 0, 1)
        for file, command in ((HEADERS[0], "dry-run"), (MERGED_HEADER, "inspect"))
    ),
    (CONFIGS[2], set_value("base_model_name_or_path", value=3), "dry-run"),
    (CONFIGS[2], set_value("base_model_name_or_path", value=["x"]), "add-adapter"),
    (CONFIGS[2], set_value("peft_type", value={}), "dry-run"),
    (CONFIGS[2], set_value("merged_expert", value=[3]), "add-adapter"),
    (CONFIGS[2], set_value("modules_to_save", value=3), "add-adapter"),
    (RECIPE, b"base_model: base\nbase_model: e0\nexperts: []\n", "dry-run"),
    (RECIPE, b"? [a, b]\n: c\n", "dry-run"),
    (RECIPE, b"seed: " + b"9" * 5000, "dry-run"),
    (RECIPE, b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nexperts: *c\n", "dry-run"),
    *(
        (DATA, text, "train-router")
        for text in (
            b"",
            b"junk",
            b"[]",
            b"null",
            b"{}\n{}",
            b'{"text": 3, "expert": 4}',
            b'{"text": "a", "expert": ["e0"]}',
            b'{"text": "\\ud800", "expert": "e0"}\n' * 3,
            b'{"messages": "x", "expert": "e0"}',
            b'{"messages": [{"role": 3, "content": 4}], "expert": "e0"}',
            b'{"messages": [["user", "x"]], "expert": "e0"}',
            b'{"text": "a", "expert": "e0"}\n{"text": {"x": 1}, "expert": "e1"}',
            b"\xff\xfe\0",
            b'{"expert": "e0"}',
        )
    ),
    *(
        (MESSAGES, text, "messages")
        for text in (
            b"",
            b"junk",
            b"[]",
            b"null",
            b'{"messages": 3}',
            b'{"messages": [3]}',
            b"[" * 100_000,
            b"\xff",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        )
    ),
    ("merged/config.json", "leftover adapter", "inspect"),
    ("base/config.json", "leftover adapter", "dry-run"),
    ("out", "loop", "dry-run"),
    ("out", "loop", "export"),
    ("out", "loop", "convert"),
    ("out", "loop", "train-router"),
]


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    found, containers = [], [values]
    while containers:
        container = containers.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in list(keys):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                containers.append(container[key])
    return found


def mutate(values: Any, rng: random.Random) -> None:
    """Change one to three places of a JSON document."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (found := places(values)):
            return
        container, key = rng.choice(found)
        action = rng.random()
        if action < 0.15:
            del container[key]
        elif action < 0.25 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        elif action < 0.35 and isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 4, -4, 1000))
        elif action < 0.45:
            other, name = rng.choice(found)
            with contextlib.suppress(LookupError):  # it may lie in what went
                container[key] = json.loads(json.dumps(other[name]))
        else:
            container[key] = rng.choice(VALUES)


def write_mutated(file: Path, how: Any, rng: random.Random) -> None:
    """Replace a file by a mutation: bytes, a size of the header, an edit of its JSON, a word, or None: at random."""
    if how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "leftover adapter":
        (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    elif isinstance(how, bytes):
        file.write_bytes(how)
    elif how is None and rng.random() < 0.15:
        file.write_bytes(rng.choice(TEXTS))
    elif file.suffix == ".safetensors":
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header, size = json.loads(data[8:end]), None
        if isinstance(how, int):
            size = how
        elif how is None and rng.random() < 0.1:
            size = rng.choice((0, 1, 7, end, end + 8, 10**8, 10**12))
        else:
            (how or (lambda values: mutate(values, rng)))(header)
        text = json.dumps(header).encode()
        file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data[end:])
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        mutate(rows, rng)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        values = json.loads(file.read_bytes())
        (how or (lambda values: mutate(values, rng)))(values)
        file.write_text(json.dumps(values))


def prepare(case: int, seed: int, inputs: Path, work: Path) -> tuple[str, str]:
    """Lay out the inputs of one case in `work`; what was mutated, and the name of the command to run."""
    rng = random.Random(f"{seed} {case}")
    if case < len(KNOWN):
        name, how, command = KNOWN[case]
    else:
        name = rng.choice(
            [*CONFIGS * 3, INDEX, *HEADERS, MERGED_HEADER, MERGED_HEADER, *SMALL, RECIPE, RECIPE, DATA, MESSAGES]
        )
        how = None
        command = rng.choice(next(readers for start, readers in READERS.items() if name.startswith(start)))
    for entry in inputs.iterdir():
        if entry.name != name.partition("/")[0]:
            (work / entry.name).symlink_to(entry)
        elif entry.is_dir():
            shutil.copytree(entry, work / entry.name)
        else:
            shutil.copyfile(entry, work / entry.name)
    recipe = json.loads((inputs / RECIPE).read_text())
    if name.startswith(("sharded", "adapter")) and command == "dry-run":
        recipe["experts"][1]["model"] = name.partition("/")[0]
        (work / RECIPE).unlink()
        (work / RECIPE).write_text(json.dumps(recipe))
    if name != WHOLE:
        write_mutated(work / name, how, rng)
    return name, command


def run_cases(inputs: Path, seed: int, cases: list[int], results: Path) -> None:
    """The worker: one line of JSON as each case begins, and one as it ends."""
    import torch  # noqa: F401  the memory of what every command imports is the interpreter's own
    import transformers  # noqa: F401

    import conversion.convert
    import conversion.train_router  # noqa: F401
    from conversion.__main__ import main

    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    with results.open("a", buffering=1) as log:
        for case in cases:
            with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile() as error:
                name, command = prepare(case, seed, inputs, Path(work))
                log.write(json.dumps({"case": case, "name": name, "command": command}) + "\n")
                os.chdir(work)
                os.dup2(error.fileno(), 2)
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                signal.alarm(WALL_SECONDS)
                try:
                    main(list(COMMANDS[command]))
                    code: Any = 0
                except SystemExit as stop:
                    code = stop.code
                except BaseException as mistake:
                    import traceback

                    code = "traceback: " + "".join(traceback.format_exception(mistake)[-4:])[-1500:]
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                sys.stderr.flush()
                error.seek(0)
                text = error.read().decode(errors="replace")
                log.write(json.dumps({"case": case, "code": code, "error": text}) + "\n")
                os.chdir("/")


def complaint(code: Any, error: str) -> str | None:
    """What is wrong with how a command ended."""
    if code not in (0, 2):
        return f"it ended with {code}"
    lines = [line for line in error.split("\n") if line.strip() and not line.startswith(LOGGED)]
    if "Traceback" in error:
        return f"it shows a traceback: {error[-1500:]}"
    if code == 2 and not (len(lines) == 1 and lines[0].startswith("Error: ") and len(lines[0]) < 1100):
        return f"expected one line, got {error[:1500]}"
    if "allocate" in error or "MemoryError" in error:
        return f"it ran out of memory: {error[-500:]}"
    return None


@pytest.fixture
def inputs(make_experts, write_recipe, write_checkpoint, tmp_path) -> Path:
    """Whole inputs of every command."""
    import torch
    from safetensors.torch import save_file

    from conversion.convert import convert

    folder = tmp_path / "inputs"
    base, experts = make_experts("llama", 2, folder=tmp_path / "made")
    _, (sharded, _) = make_experts("llama", 2, shards=3, folder=tmp_path / "sharded")
    folder.mkdir()
    for source, name in ((base, "base"), (experts[0], "e0"), (experts[1], "e1"), (sharded, "sharded")):
        source.rename(folder / name)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(template)
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    factors = {"A": torch.ones(2, 24), "B": torch.ones(24, 2)}
    save_file(
        {
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": value
            for part, value in factors.items()
        },
        folder / "adapter" / "adapter_model.safetensors",
    )
    write_recipe(Path("base"), [Path("e0"), Path("e1")], folder / RECIPE)
    convert(folder / RECIPE, folder / "merged", progress=False)
    rows = [{"text": f"{number} words", "expert": f"e{number % 2}"} for number in range(8)]
    (folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / MESSAGES).write_text(json.dumps({"messages": [{"role": "user", "content": "one\u2028two"}]}) + "\n")
    return folder


@pytest.mark.slow
def test_commands_end_with_one_line(inputs, tmp_path):
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    chosen = os.environ.get("FUZZ_CASES")
    cases = [int(case) for case in chosen.split(",")] if chosen else list(range(NUM_CASES))
    results, wrong = tmp_path / "results.jsonl", []
    results.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "120",
    }
    environment.pop("CHANNEL_MERGE_DEBUG", None)
    while cases:
        arguments = [str(inputs), str(seed), ",".join(map(str, cases)), str(results)]
        worker = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        assert lines, worker.stderr.decode()[-2000:]
        began = {line["case"]: line for line in lines if "command" in line}
        ended = {line["case"]: line for line in lines if "code" in line}
        cases = [case for case in cases if case not in began]
        results.write_text("")
        for case, line in began.items():
            end = ended.get(case, {"code": f"signal {-worker.returncode} (time, memory or a crash)", "error": ""})
            message = complaint(end["code"], end["error"])
            if line["name"] == WHOLE and end["code"] != (2 if line["command"] == "push" else 0):
                message = f"it ended with {end['code']}: {end['error']}"
            if message:
                wrong.append(f"case {case} of seed {seed}: {line['command']} with {line['name']}: {message}")
    assert not wrong, f"{len(wrong)} of them went wrong:\n" + "\n".join(wrong)


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), int(sys.argv[2]), [int(case) for case in sys.argv[3].split(",")], Path(sys.argv[4]))
