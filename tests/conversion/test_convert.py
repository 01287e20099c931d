"""A converted checkpoint is what a slow and plain implementation of the method says, however it was computed.

The reference holds whole tensors, tries every partition of every channel in float64 and merges with loops.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.channels.keep_masks import keep_mask
from conversion.channels.row_layout import layout_rows
from conversion.convert import convert
from conversion.merging.plan import make_plan
from conversion.merging.recipe import Recipe, parse_recipe
from modeling_channel_merged.channel_merged_layers import find_modules


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def load_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a plain checkpoint as Transformers loads them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def partitions(items: list[int]) -> list[list[list[int]]]:
    """All ways to split a list into groups."""
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for groups in partitions(rest):
        found.append([[first], *groups])
        found += [[*groups[:k], [first, *groups[k]], *groups[k + 1 :]] for k in range(len(groups))]
    return found


def reference_groups(deltas: np.ndarray, stored: list[bytes], num_groups: int, similarity: str) -> list[list[int]]:
    """The best groups of one channel: deltas (N, I) float64, and what each expert would store."""
    num_experts = len(stored)
    classes = [[e for e in range(num_experts) if stored[e] == row] for row in dict.fromkeys(stored)]
    if len(classes) <= num_groups:
        return classes
    if similarity == "cosine":
        norms = np.linalg.norm(deltas, axis=1, keepdims=True)
        deltas = np.divide(deltas, norms, out=np.zeros_like(deltas), where=norms > 0)

    def cost(groups: list[list[int]]) -> float:
        return sum(((deltas[group] - deltas[group].mean(0)) ** 2).sum() for group in groups)

    def labels(groups: list[list[int]]) -> dict[int, int]:
        return {e: number for number, group in enumerate(sorted(groups)) for e in group}

    choices = [
        [sorted(e for part in group for e in classes[part]) for group in groups]
        for groups in partitions(list(range(len(classes))))
        if len(groups) <= num_groups
    ]
    choices.sort(key=lambda groups: (-len(groups), [labels(groups)[e] for e in range(num_experts)]))
    costs = [cost(groups) for groups in choices]
    # A delta of zero is equally far from all others under cosine: of equally good groups the first counts.
    return next(groups for groups, c in zip(choices, costs) if c <= min(costs) + 1e-9 * (deltas**2).sum())


def reference_merge(base: np.ndarray, rows: np.ndarray, kept: np.ndarray, weights: np.ndarray, method) -> np.ndarray:
    """One group of one channel in float64: base (I,), rows (M, I), kept (M, I) bool, weights (M,)."""
    if method.name == "linear":
        merged = (weights[:, None] * rows).sum(0)
        return merged / weights.sum() if method.normalize else merged
    deltas = (rows - base) * kept * weights[:, None]
    if method.name.startswith("dare"):
        deltas = deltas / method.density
    divisor = np.full(base.shape, weights.sum())
    if method.name.endswith("ties"):
        agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
        deltas = deltas * agree
        divisor = (weights[:, None] * agree).sum(0)
    merged = deltas.sum(0)
    if method.normalize:
        merged = merged / np.where(np.abs(divisor) < 1e-8, 1, divisor)
    return base + method.lambda_ * merged


def kept_elements(name: str, delta: torch.Tensor, expert: str, recipe: Recipe) -> np.ndarray:
    """What the method keeps of one expert's whole delta (O, I)."""
    method = recipe.method()
    if method.name == "ties" and method.density < 1:
        magnitudes = delta.abs().flatten().sort(descending=True).values
        return (delta.abs() >= magnitudes[max(1, int(method.density * len(magnitudes))) - 1]).numpy()
    if method.name.startswith("dare"):
        return keep_mask(recipe.seed, expert, name, 0, delta.numel(), method.density).view_as(delta).numpy()
    return np.ones(delta.shape, dtype=bool)


class Reference:
    """What the stored form of a recipe must say, module by module."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype):
        self.recipe = recipe.resolved()
        self.dtype = dtype
        self.base = load_parameters(Path(recipe.base_model))
        self.experts = [load_parameters(Path(expert.model)) for expert in recipe.experts]
        self.names = [expert.name for expert in recipe.experts]
        self.modules = find_modules(AutoModelForCausalLM.from_pretrained(recipe.base_model))

    def rows(self, parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """One parameter as float32 rows (O, I), (O, 1) of a bias."""
        path, _, kind = name.rpartition(".")
        value = parameters[name].float()
        if kind == "bias":
            return value[:, None]
        return value.T if self.modules.channel[path].kind == "conv1d" else value

    def module(self, path: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Groups (N, O) of one module; by parameter its rows (N, O, I) in float64, and which of them are copies."""
        names = [f"{path}.weight"] + ([f"{path}.bias"] if self.modules.channel[path].bias else [])
        base = {name: self.rows(self.base, name) for name in names}
        rows = {name: torch.stack([self.rows(expert, name) for expert in self.experts]) for name in names}
        deltas = {name: rows[name] - base[name] for name in names}
        kept = {
            name: np.stack([kept_elements(name, d, e, self.recipe) for d, e in zip(deltas[name], self.names)])
            for name in names
        }
        stored = torch.cat([rows[name].to(self.dtype) for name in names], dim=2)
        all_deltas = torch.cat([deltas[name] for name in names], dim=2).double().numpy()
        weights = np.array([expert.weight for expert in self.recipe.experts])
        grouping = self.recipe.grouping
        labels = torch.empty(stored.shape[:2], dtype=torch.int64)
        merged = {name: rows[name].double() for name in names}
        copied = torch.ones(stored.shape[:2], dtype=torch.bool)
        for channel in range(stored.shape[1]):
            bits = [stored[e, channel].view(torch.uint8).numpy().tobytes() for e in range(len(self.experts))]
            for group in reference_groups(all_deltas[:, channel], bits, grouping.num_groups, grouping.similarity):
                labels[group, channel] = group[0]
                if len({bits[e] for e in group}) == 1:
                    continue
                copied[group, channel] = False
                for name in names:
                    row = reference_merge(
                        base[name][channel].double().numpy(),
                        rows[name][group, channel].double().numpy(),
                        kept[name][group, channel],
                        weights[group],
                        self.recipe.method(),
                    )
                    merged[name][group, channel] = torch.from_numpy(row)
        return labels, merged, copied


def assert_is_reference(folder: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """Every tensor of a merged checkpoint against the reference: copies bit for bit, merged rows to the last place."""
    tensors = load_tensors(folder)
    reference = Reference(recipe, dtype)
    indices = {}
    for path, module in reference.modules.channel.items():
        indices[path] = index = tensors.pop(f"model.{path}.channel_index")
        if module.tied_to:
            assert torch.equal(index, indices[module.tied_to])
            continue
        labels, merged, copied = reference.module(path)
        assert torch.equal(index, layout_rows(labels).channel_index), path
        for name, expected in merged.items():
            kind = name.rpartition(".")[2]
            rows = tensors.pop(f"model.{path}.rows.{kind}")
            assert rows.dtype == dtype
            assert len(rows) == int(index.max()) + 1
            actual = rows.view(len(rows), -1)[index.long()]
            assert torch.equal(actual[copied], expected.to(dtype)[copied]), name
            # Float32 arithmetic on a handful of terms, then one rounding to the output dtype.
            scale = expected.abs().max().item()
            tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 8 * torch.finfo(torch.float32).eps * scale}
            torch.testing.assert_close(actual.double(), expected, **tolerance)
    for path, names in reference.modules.per_expert.items():
        for number, parameters in enumerate(reference.experts):
            for name in names:
                actual = tensors.pop(f"model.{path}.experts.{number}.{name}")
                assert torch.equal(actual, parameters[f"{path}.{name}"].to(dtype))
    num_experts, hidden_size = tensors["router.head.weight"].shape
    assert num_experts == len(reference.experts)
    assert torch.equal(tensors.pop("router.head.weight"), torch.zeros(num_experts, hidden_size))
    assert torch.equal(tensors.pop("router.head.bias"), torch.zeros(num_experts))
    assert not tensors


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize(
    "keys",
    [
        {"preset": "paper-ties"},
        {"preset": "paper-dare"},
        {},
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.6}},
        {"merge_method": "dare_ties", "parameters": {"density": 0.4, "normalize": True}},
    ],
    ids=["paper-ties", "paper-dare", "linear", "task_arithmetic", "dare_ties"],
)
def test_llama_is_the_reference(make_experts, write_recipe, tmp_path, keys, num_groups):
    base, experts = make_experts("llama", 3, num_hidden_layers=1)
    data = write_recipe(base, experts, **keys)
    data["grouping"] = {"num_groups": num_groups}
    for number, expert in enumerate(data["experts"]):
        expert["weight"] = 1 + number / 4
    recipe = parse_recipe(data)
    convert(recipe, tmp_path / "out", progress=False)
    assert_is_reference(tmp_path / "out", recipe, torch.float32)


@pytest.mark.parametrize(
    ("family", "num_experts", "num_groups", "dtype"),
    [
        ("qwen2", 4, 2, torch.bfloat16),
        ("qwen3", 5, 2, torch.float16),
        ("gpt2", 4, 3, torch.float32),
        ("qwen2", 2, 1, torch.float32),
        ("llama", 5, 4, torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_families_and_dtypes_are_the_reference(
    make_experts, write_recipe, tmp_path, family, num_experts, num_groups, dtype
):
    base, experts = make_experts(family, num_experts, dtype=dtype, shared=0.4)
    recipe = parse_recipe(write_recipe(base, experts, preset="paper-ties", grouping={"num_groups": num_groups}))
    convert(recipe, tmp_path / "out", progress=False, chunk_bytes=20_000)
    assert_is_reference(tmp_path / "out", recipe, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["exact", "narrowed"])
def test_experts_of_different_dtypes(make_experts, write_recipe, tmp_path, dtype):
    """What is stored decides which rows are equal: rows that differ only below the output dtype collapse."""
    base, experts = make_experts("qwen2", 2, dtype=torch.float32, folder=tmp_path / "wide", shared=0.5)
    _, narrow = make_experts("qwen2", 2, dtype=torch.bfloat16, folder=tmp_path / "narrow", shared=0.5)
    keys = {} if dtype == torch.float32 else {"dtype": "bfloat16"}
    recipe = parse_recipe(write_recipe(base, [*experts, *narrow], preset="paper-ties", **keys))
    result = convert(recipe, tmp_path / "out", progress=False)
    assert_is_reference(tmp_path / "out", recipe, dtype)
    if dtype == torch.bfloat16:
        # Each wide expert is its narrow twin here: two rows at most, and nothing is merged.
        assert all(module["merged_rows"] == 0 for module in result.report["modules"].values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("num_experts", [2, 3, 4, 5])
def test_as_many_groups_as_experts_keep_every_parameter(make_experts, write_recipe, tmp_path, family, num_experts):
    base, experts = make_experts(family, num_experts, dtype=torch.bfloat16, num_hidden_layers=1)
    convert(
        parse_recipe(write_recipe(base, experts, preset="paper-ties", grouping={"num_groups": num_experts})),
        tmp_path / "out",
        progress=False,
    )
    tensors = load_tensors(tmp_path / "out")
    modules = find_modules(AutoModelForCausalLM.from_pretrained(base))
    for number, folder in enumerate(experts):
        parameters = load_parameters(folder)
        for path, module in modules.channel.items():
            index = tensors[f"model.{path}.channel_index"][number].long()
            rows = tensors[f"model.{module.tied_to or path}.rows.weight"][index]
            assert torch.equal(rows.T if module.kind == "conv1d" else rows, parameters[f"{path}.weight"])
            if module.bias:
                assert torch.equal(tensors[f"model.{path}.rows.bias"][index], parameters[f"{path}.bias"])


@pytest.fixture
def threads():
    """Sets the number of threads, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("preset", ["paper-ties", "paper-dare"])
def test_chunks_threads_and_shards_change_nothing(make_experts, write_recipe, tmp_path, threads, preset):
    results = []
    for number, (shards, num_threads, keys) in enumerate(
        [
            (1, 1, {}),
            (3, 2, {"chunk_bytes": 1}),
            (2, 3, {"chunk_bytes": 5000, "max_shard_size": "20KB"}),
        ]
    ):
        base, experts = make_experts("qwen2", 4, shards=shards, folder=tmp_path / f"in{number}")
        threads(num_threads)
        convert(
            parse_recipe(write_recipe(base, experts, preset=preset)), tmp_path / f"out{number}", progress=False, **keys
        )
        results.append(load_tensors(tmp_path / f"out{number}"))
    assert (tmp_path / "out2" / "model.safetensors.index.json").exists()
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_a_device_that_is_not_there_is_refused(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 2)
    with pytest.raises(ValueError, match="device 'warp' cannot be used here"):
        convert(parse_recipe(write_recipe(base, experts)), tmp_path / "out", device="warp", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["paper-ties", "paper-dare", None])
def test_a_gpu_makes_the_same_groups_and_rows(make_experts, write_recipe, tmp_path, preset):
    """Indices are equal; merged rows are within rounding, for a GPU may join a product and a sum."""
    base, experts = make_experts("qwen2", 4)
    recipe = parse_recipe(write_recipe(base, experts, **({"preset": preset} if preset else {})))
    for device in ("cpu", "cuda"):
        convert(recipe, tmp_path / device, device=device, progress=False)
    ours, theirs = load_tensors(tmp_path / "cpu"), load_tensors(tmp_path / "cuda")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.endswith("channel_index"):
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)


def test_the_seed_decides_what_is_dropped(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 3)
    outputs = []
    for number, seed in enumerate((1, 1, 2)):
        recipe = parse_recipe(write_recipe(base, experts, preset="paper-dare", seed=seed))
        convert(recipe, tmp_path / f"out{number}", progress=False)
        outputs.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("linear", {"normalize": False}),
        ("task_arithmetic", {"lambda": 0.7}),
        ("ties", {"density": 0.6, "lambda": 0.5, "normalize": False}),
        ("ties", {"density": 0.6}),
    ],
    ids=["linear", "linear-sum", "task_arithmetic", "ties-sum", "ties"],
)
def test_one_group_is_mergekits_merge(make_experts, write_recipe, tmp_path, family, method, parameters):
    """K = 1: every matrix and bias of the whole checkpoint is what mergekit makes of the same recipe."""
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options")
    base, experts = make_experts(family, 3, shared=0.0)
    weights = [0.5, 1.0, 0.75]
    data = write_recipe(base, experts, merge_method=method, parameters=parameters, grouping={"num_groups": 1})
    for expert, weight in zip(data["experts"], weights):
        expert["weight"] = weight
    convert(parse_recipe(data), tmp_path / "ours", progress=False)
    theirs = config.MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "models": [
                {
                    "model": str(folder),
                    "parameters": {"weight": weight, **{k: v for k, v in parameters.items() if k == "density"}},
                }
                for folder, weight in zip(experts, weights)
            ],
            "parameters": {key: value for key, value in parameters.items() if key != "density"},
            "dtype": "float32",
            **({} if method == "linear" else {"base_model": str(base)}),
        }
    )
    merge.run_merge(theirs, str(tmp_path / "theirs"), options.MergeOptions(copy_tokenizer=False, quiet=True))
    expected, tensors = load_tensors(tmp_path / "theirs"), load_tensors(tmp_path / "ours")
    modules = find_modules(AutoModelForCausalLM.from_pretrained(base))
    for path, module in modules.channel.items():
        index = tensors[f"model.{path}.channel_index"]
        assert torch.equal(index, torch.arange(module.out_features, dtype=torch.int32).expand(3, -1))
        if not module.tied_to:
            assert torch.equal(tensors[f"model.{path}.rows.weight"], expected[f"{path}.weight"]), path
        if module.bias:
            assert torch.equal(tensors[f"model.{path}.rows.bias"], expected[f"{path}.bias"]), path


def test_the_folder_is_a_complete_model(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 4)
    data = write_recipe(base, experts, preset="paper-ties", seed=3)
    result = convert(parse_recipe(data), tmp_path / "out", progress=False)
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "channel_merged"
    assert config["expert_names"] == ["e0", "e1", "e2", "e3"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["merge"]["method"] == "ties"
    assert config["merge"]["recipe"]["parameters"] == {"density": 0.7, "lambda": 0.5, "normalize": False}
    tensors = load_tensors(folder)
    assert config["rows"] == {path: len(tensors[f"model.{path}.rows.weight"]) for path in config["rows"]}
    stored = sum(value.numel() for name, value in tensors.items() if ".rows." in name or ".experts." in name)
    assert result.report["parameters"]["stored"] == stored
    assert json.loads((folder / "conversion_report.json").read_text()) == result.report
    for module in result.report["modules"].values():
        assert sum(module["owners"].values()) == module["rows"]
    code = {file.name for file in folder.glob("*.py")}
    assert "modeling_channel_merged.py" in code
    assert "__init__.py" not in code
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 257
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("two + 二")["input_ids"]) == "two + 二"
    _, front, card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["merge", "channel-merging"]
    assert "2412.15283" in card


@pytest.mark.filterwarnings("ignore")
def test_the_cards_example_runs(make_experts, write_recipe, tmp_path, capsys):
    base, experts = make_experts("llama", 2)
    convert(parse_recipe(write_recipe(base, experts)), tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    example = card.split("```python\n")[1].split("```")[0]
    assert "path/or/repository" in example
    exec(example.replace("path/or/repository", str(tmp_path / "out")), {})
    assert "What is 17 + 25?" in capsys.readouterr().out


@pytest.mark.parametrize("relative", [True, False])
def test_no_local_paths_are_written(make_experts, write_recipe, tmp_path, relative):
    """Folders are shown by their names, in the recipe too."""
    folder = tmp_path / "private" / "models"
    make_experts("llama", 2, folder=folder)
    place = Path("models/../models") if relative else folder
    write_recipe(place / "base", [place / "expert0", place / "expert1"], path=tmp_path / "private" / "recipe.yaml")
    convert(tmp_path / "private" / "recipe.yaml", tmp_path / "out", progress=False)
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content and b"private" not in content, file
    merge = json.loads((tmp_path / "out" / "config.json").read_text())["merge"]
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    for record in (merge, report):
        assert record["base_model"]["model"] == record["recipe"]["base_model"] == "base"
        for experts in (record["experts"], record["recipe"]["experts"]):
            assert [expert["model"] for expert in experts] == ["expert0", "expert1"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'fine-tunes ("experts") of `base`' in card and "| `e0` | `expert0` |" in card


def test_a_base_without_tokenizer_converts_with_a_warning(make_experts, write_recipe, tmp_path, caplog):
    base, experts = make_experts("llama", 2)
    for file in base.glob("tokenizer*"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        convert(parse_recipe(write_recipe(base, experts)), tmp_path / "out", progress=False)
    assert "no tokenizer files" in caplog.text
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_a_tied_expert_may_hold_its_head_if_it_is_its_embedding(make_experts, write_recipe, tmp_path, equal):
    base, experts = make_experts("qwen2", 2)
    tensors = load_file(experts[1] / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[5, 3] += 0 if equal else 1
    save_file({**tensors, "lm_head.weight": head}, experts[1] / "model.safetensors")
    recipe = parse_recipe(write_recipe(base, experts))
    if equal:
        convert(recipe, tmp_path / "out", progress=False)
        assert_is_reference(tmp_path / "out", recipe, torch.float32)
        return
    with pytest.raises(ValueError, match="e1: lm_head.weight differs from model.embed_tokens.weight"):
        convert(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("owner", "tensor"),
    [
        ("e1", "model.layers.1.mlp.up_proj.weight"),
        ("e0", "model.layers.0.self_attn.q_proj.bias"),
        ("e1", "model.norm.weight"),
        ("base_model", "model.embed_tokens.weight"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_conversion(make_experts, write_recipe, tmp_path, owner, tensor, value):
    base, experts = make_experts("qwen2", 2)
    file = {"base_model": base, "e0": experts[0], "e1": experts[1]}[owner] / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{owner}: {tensor} holds NaN or infinity"):
        convert(parse_recipe(write_recipe(base, experts)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*/config.json"))  # nothing that loads


def test_numbers_that_the_output_dtype_cannot_hold_stop_the_conversion(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 2)
    tensors = load_file(experts[1] / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, experts[1] / "model.safetensors")
    with pytest.raises(ValueError, match="e1: lm_head.weight holds 100000, which torch.float16 cannot hold"):
        convert(parse_recipe(write_recipe(base, experts, dtype="float16")), tmp_path / "out", progress=False)


def test_an_old_model_is_replaced_only_when_asked(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 3)
    two = parse_recipe(write_recipe(base, experts[:2]))
    three = parse_recipe(write_recipe(base, experts))
    convert(two, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="is not empty"):
        convert(three, tmp_path / "out", progress=False)
    convert(three, tmp_path / "out", progress=False, overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 3


def test_the_size_is_known_before(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("qwen3", 4, shared=0.0)
    recipe = parse_recipe(write_recipe(base, experts))
    plan = make_plan(recipe)
    convert(recipe, tmp_path / "out", progress=False)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size * 0.8 < plan.max_bytes + plan.num_experts * 4 * 25 < size


KILLED_CONVERSIONS = """
import os, signal, sys, time
from pathlib import Path
from conversion.convert import convert

recipe, folder = sys.argv[1], Path(sys.argv[2])

def run():
    child = os.fork()
    if child == 0:
        convert(recipe, folder / "out", progress=False, chunk_bytes=1)
        os._exit(0)
    return child

started = time.perf_counter()
assert os.waitpid(run(), 0)[1] == 0
seconds = time.perf_counter() - started
os.rename(folder / "out", folder.parent / "whole")
for part in (0.02, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
    child = run()
    time.sleep(part * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if (folder / "out").exists():  # this one was faster than the first
        os.rename(folder / "out", folder.parent / f"done{part}")
    print("killed", sorted(file.name for file in folder.rglob("config.json")))
assert os.waitpid(run(), 0)[1] == 0
print("left", sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="uses fork and SIGKILL")
def test_a_killed_conversion_leaves_nothing_that_loads(make_experts, write_recipe, tmp_path):
    """At whatever moment it is killed: no config.json is left, and running it again succeeds with the same bytes."""
    base, experts = make_experts("llama", 3)
    write_recipe(base, experts, path=tmp_path / "recipe.yaml", preset="paper-ties")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_CONVERSIONS, tmp_path / "recipe.yaml", tmp_path / "work"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *killed, left = done.stdout.splitlines()
    assert killed == ["killed []"] * 9
    assert left == "left ['out']"
    first, last = (folder / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "work" / "out"))
    assert first.read_bytes() == last.read_bytes()
