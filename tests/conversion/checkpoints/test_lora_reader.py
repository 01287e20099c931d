"""A LoRA adapter reads as the model that PEFT's merge_and_unload makes of it, row by row, or is refused by name."""

import copy
import json
import logging
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.channels.low_rank import BLOCK_ROWS
from conversion.checkpoints.lora_reader import LoraReader
from conversion.convert import convert
from conversion.export import export_expert
from conversion.io.row_reader import CheckpointReader
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

WEIGHTS = "adapter_model.safetensors"
BOTH_EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}

KINDS = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*\.(q_proj|up_proj|down_proj)",
            "rank_pattern": {"up_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"up_proj": 5, "1.mlp.down_proj": 24},
        },
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "norms": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["norm"]}),
    "saved-embeddings": ("llama", {"target_modules": ["o_proj"], **BOTH_EMBEDDINGS}),
    "adapted-embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [200, 7, 31]}),
    "tokens-of-both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [5]}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-fan-in-fan-out": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d-saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}),
    "positions": ("gpt2", {"target_modules": ["c_attn", "wpe"]}),
    "lora-bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "tied-tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [2, 258]}),
    "tied-adapted": (
        "qwen2",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied-saved": ("qwen2", {"target_modules": ["q_proj"], **BOTH_EMBEDDINGS, "ensure_weight_tying": True}),
}


@pytest.fixture(autouse=True)
def quiet_peft():
    """PEFT warns of what it does with tied or saved embeddings, and asks Transformers for a deprecated attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def save_adapter(base, folder, seed=0, rank=4, alpha=6, config=None, **settings):
    """An adapter of the model in folder `base` whose every trained value is random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = copy.deepcopy(settings)  # PEFT changes lists that it is given
    config = config or LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(peft_model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    peft_model.save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter):
    """Parameters after merge_and_unload, which adds what ties to a weight that has it already: that is taken back."""
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = hasattr(head, "lora_A") and head.weight is embedding.weight
        once = embedding.weight + embedding.get_delta_weight("default") if tied else None
        model = model.merge_and_unload()
        if tied:
            model.get_input_embeddings().weight.copy_(once)
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture
def planned(make_experts, write_recipe, tmp_path):
    """Factory: `planned(kind, dtype) -> (plan of adapter e0 and full model e1, base folder, adapter folder)`"""
    plans = []

    def plan(kind, dtype=torch.float32, **changes):
        family, settings = KINDS[kind]
        base, experts = make_experts(family, 1, dtype=dtype)
        adapter = save_adapter(base, tmp_path / "adapter", **settings | changes)
        plans.append(make_plan(parse_recipe(write_recipe(base, [adapter, experts[0]]))))
        return plans[-1], base, adapter

    yield plan
    for plan in plans:
        for reader in (plan.base_reader, *plan.readers):
            reader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_reads_as_the_model_that_peft_merges(planned, kind, dtype):
    """Sums of r + 1 float32 products differ in their order alone; of bf16 then at most the last bit."""
    plan, base, adapter = planned(kind, dtype)
    merged, plain = merged_by_peft(base, adapter), dict(plan.base_reader.tensors)
    reader = plan.readers[0]
    changed = set()
    for name in plain:
        rows, stored, expected = reader.read(name), plan.base_reader.read(name), merged[name]
        assert rows.dtype == expected.dtype == dtype and rows.shape == expected.shape
        scale = expected.abs().max().item()
        error = (rows.float() - expected.float()).abs()
        if dtype == torch.float32:
            assert error.max() <= 8 * torch.finfo(torch.float32).eps * scale, name
        else:
            assert (error <= 2**-7 * expected.float().abs() + 2**-16 * scale).all(), name
        if not torch.equal(rows, stored):
            changed.add(name)
        else:
            assert torch.equal(expected, stored), name
    assert changed == reader.patches.keys() & plain.keys() and changed


@pytest.mark.parametrize("kind", ["all-linear", "dora", "conv1d-dora", "adapted-embeddings", "tokens", "lora-bias"])
def test_chunks_change_no_bit(planned, kind):
    plan, _, _ = planned(kind)
    reader = plan.readers[0]
    for name in reader.patches:
        rows = reader.tensors[name].shape[-1 if name in reader.transposed else 0]
        whole = reader.read_rows(name, 0, rows)
        for chunk in (1, 5, BLOCK_ROWS, BLOCK_ROWS + 1):
            edges = [*range(0, rows, chunk), rows]
            parts = [reader.read_rows(name, start, stop) for start, stop in zip(edges[:-1], edges[1:])]
            assert torch.equal(torch.cat(parts), whole), (name, chunk)


def test_a_chunk_reads_its_rows_and_not_the_matrix(planned, monkeypatch):
    plan, _, _ = planned("adapted-embeddings")
    reader, sizes = plan.readers[0], []
    read_into = CheckpointReader._read_into
    monkeypatch.setattr(
        CheckpointReader,
        "_read_into",
        lambda self, tensor, buffer, offset: (sizes.append(buffer.nbytes), read_into(self, tensor, buffer, offset))[1],
    )
    reader.read_rows("model.embed_tokens.weight", 32, 48)
    row, factors = 24 * 4, (24 * 4 + BLOCK_ROWS * 4) * 4
    assert sum(sizes) == BLOCK_ROWS * row + factors
    sizes.clear()
    reader.read_rows("lm_head.weight", 33, 34)
    assert sum(sizes) == BLOCK_ROWS * row + factors


def test_an_adapter_converts_as_its_merged_model_and_exports_it(make_experts, write_recipe, tmp_path):
    """Adapters of several kinds, a whole model and a pickled one in one recipe; as many groups as experts."""
    base, (full, pickled) = make_experts("llama", 2)
    state = load_file(pickled / "model.safetensors")
    torch.save(state, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    plain = save_adapter(base, tmp_path / "plain", seed=1, target_modules="all-linear")
    saved = save_adapter(base, tmp_path / "saved", seed=2, use_dora=True, **KINDS["saved-embeddings"][1])
    pickled_adapter = save_adapter(base, tmp_path / "old", seed=3, target_modules=["q_proj"], bias="all")
    torch.save(load_file(pickled_adapter / WEIGHTS), pickled_adapter / "adapter_model.bin")
    (pickled_adapter / WEIGHTS).unlink()
    recipe = write_recipe(base, [full, plain, pickled, saved, pickled_adapter], grouping={"num_groups": 5})
    report = convert(parse_recipe(recipe), tmp_path / "merged", progress=False).report
    assert [record.get("adapter") for record in report["experts"]] == [None, "LoRA", None, "LoRA", "LoRA"]
    expected = {"e0": load_file(full / "model.safetensors"), "e2": state}
    expected |= {f"e{number}": merged_by_peft(base, folder) for number, folder in ((1, plain), (3, saved))}
    for name, tensors in expected.items():
        export_expert(tmp_path / "merged", name, tmp_path / name)
        exported = load_file(tmp_path / name / "model.safetensors")
        assert exported.keys() == tensors.keys()
        for key, value in exported.items():
            if name in ("e0", "e2"):
                assert torch.equal(value, tensors[key]), key
            else:
                torch.testing.assert_close(value, tensors[key], rtol=0, atol=1e-6 * float(tensors[key].abs().max()))


def test_a_pickled_adapter_gives_the_same_checkpoint(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("gpt2", 1, dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "wpe"], bias="all")
    recipe = parse_recipe(write_recipe(base, [adapter, *experts], grouping={"num_groups": 1}))
    convert(recipe, tmp_path / "a", progress=False)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    convert(recipe, tmp_path / "b", progress=False, chunk_bytes=1)
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["tied-adapted", "tied-saved", "tied-tokens"])
def test_an_adapter_of_a_tied_pair_computes_as_it_did(make_experts, write_recipe, tmp_path, kind):
    """Logits of the exported expert against PEFT's, not merged."""
    family, settings = KINDS[kind]
    base, experts = make_experts(family, 1)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    recipe = parse_recipe(write_recipe(base, [adapter, *experts]))
    convert(recipe, tmp_path / "merged", progress=False)
    export_expert(tmp_path / "merged", "e0", tmp_path / "e0")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "e0").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    input_ids = torch.tensor([[1, 2, 3, 258, 77]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids).logits, adapted(input_ids).logits, rtol=1e-5, atol=1e-5)


def test_tied_pairs_that_an_adapter_makes_differ_are_refused(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("qwen2", 1)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **BOTH_EMBEDDINGS)
    recipe = parse_recipe(write_recipe(base, [adapter, *experts]))
    with pytest.raises(ValueError, match="e0: lm_head.weight differs from model.embed_tokens.weight.*ties them"):
        convert(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "changed", "other"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens.weight", "lm_head.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight", "model.embed_tokens.weight"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "model.embed_tokens.weight",
            "lm_head.weight",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight", "model.embed_tokens"),
    ],
    ids=["adapted-embedding", "adapted-head", "saved-embedding", "saved-head"],
)
def test_an_adapter_of_one_of_a_tied_pair_is_refused(make_experts, write_recipe, tmp_path, settings, changed, other):
    base, experts = make_experts("qwen2", 1)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    # What PEFT saves of the pair because the embedding is targeted, although it is the base's.
    change_tensors(
        adapter,
        lambda t: [t.pop(key) for key in list(t) if other.removesuffix(".weight") in key],
    )
    with pytest.raises(ValueError, match=f"e0: the adapter changes {changed} but not {other}.*ties them"):
        make_plan(parse_recipe(write_recipe(base, [adapter, *experts])))


@pytest.fixture
def adapted(make_experts, write_recipe, tmp_path):
    """A Llama, an adapter of it and their recipe."""
    base, experts = make_experts("llama", 1)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    return base, adapter, parse_recipe(write_recipe(base, [adapter, *experts]))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.lora_B.weight"), "incomplete, it has only .*q_proj.lora_A.weight"),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.zeros(25, 4)}),
            r"q_proj.lora_B.weight has shape \[25, 4\], expected \[24, 4\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(3, 24)}),
            r"q_proj.lora_A.weight has shape \[3, 24\], expected \[4, 24\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 24, dtype=torch.int8)}),
            "q_proj.lora_A.weight is stored as I8, expected F32",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": torch.zeros(24)}),
            "q_proj has a lora_magnitude_vector, but its config says use_dora False",
        ),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 24)}),
            "a tensor that fits nothing in LlamaForCausalLM: base_model.model.score.weight",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": torch.zeros(4, 24)}),
            "fits nothing in LlamaForCausalLM: .*layers.2.mlp.up_proj.lora_A.weight",
        ),
        (lambda t: t.update({f"{Q_PROJ}.lora_B.bias": torch.zeros(24)}), "fits nothing in .*q_proj.lora_B.bias"),
        (
            lambda t: t.update({f"{Q_PROJ}.token_adapter.trainable_tokens_delta": torch.zeros(1, 24)}),
            "cannot be combined with what else the adapter has for",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(25)}),
            r"model.norm.weight has shape \[25\] with the adapter, expected \[24\]",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(261, 24)}),
            r"lm_head.weight has shape \[261, 24\] with the adapter, expected \[259, 24\]",
        ),
        (lambda t: t.clear(), "has no tensors"),
    ],
    ids=[
        "no-B",
        "shape",
        "rank",
        "integer",
        "magnitude",
        "module",
        "layer",
        "bias",
        "mixture",
        "norm-shape",
        "head-size",
        "empty",
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused(adapted, change, message):
    _, adapter, recipe = adapted
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=f"e0: .*{message}"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "a PEFT adapter of type LOHA, only LORA"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes the base's weights",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"sets layer_replication to \[\[0, 2\], \[1, 2\]\]"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"use_qalora": True}, "sets use_qalora to True"),
        ({"some_new_variant": {"a": 1}}, "sets some_new_variant to {'a': 1}, which is not supported"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector, but its config says use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "lm_head among modules_to_save.*no tensor for lm_head.weight"),
        ({"r": None}, r"must have numbers r \(at least 1\) and lora_alpha, .*, got r None, lora_alpha 6"),
        ({"r": 0}, "must have numbers r .*got r 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "patterns with numbers, got .* alpha_pattern {'q_proj': 'x'}"),
        ({"rank_pattern": {"(": 4}}, r"patterns with numbers, got .* rank_pattern {'\(': 4}"),
        ({"rank_pattern": {"q_proj": 5}}, r"lora_B.weight has shape \[24, 4\], expected \[24, 5\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapter_settings_that_mean_something_else_are_refused(adapted, settings, message):
    _, adapter, recipe = adapted
    change_config(adapter, **settings)
    with pytest.raises(ValueError, match=f"e0: .*{message}"):
        make_plan(recipe)


def test_other_peft_methods_are_refused_by_name(adapted):
    base, adapter, recipe = adapted
    save_adapter(base, adapter, config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="e0: .* is a PEFT adapter of type IA3, only LORA can be merged"):
        make_plan(recipe)


def test_dora_of_an_embedding_is_refused(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 1)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], use_dora=True)
    with pytest.raises(ValueError, match="e0: DoRA of the embedding model.embed_tokens is not supported"):
        make_plan(parse_recipe(write_recipe(base, [adapter, *experts])))


def test_trained_tokens_outside_of_the_vocabulary_are_refused(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 1)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    change_config(adapter, trainable_token_indices=[1, 259])
    with pytest.raises(
        ValueError, match=r"trainable_token_indices of model.embed_tokens must be from 0 to 258, got \["
    ):
        make_plan(parse_recipe(write_recipe(base, [adapter, *experts])))


def test_a_broken_adapter_config_is_named(adapted):
    _, adapter, recipe = adapted
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="e0: adapter_config.json of .* cannot be read"):
        make_plan(recipe)


def test_an_adapter_without_weights_is_named(adapted):
    _, adapter, recipe = adapted
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="e0: .* has no adapter_model.safetensors or adapter_model.bin"):
        make_plan(recipe)


def test_an_adapter_is_no_base(adapted, write_recipe):
    base, adapter, _ = adapted
    with pytest.raises(ValueError, match="base_model: .* is a PEFT adapter, expected a whole model"):
        make_plan(parse_recipe(write_recipe(adapter, [base, base])))


@pytest.mark.parametrize(
    ("name", "warned"),
    [("some/Other-7B", True), ("/elsewhere/BASE/", False), ("org/base", False), (None, False)],
)
def test_an_adapter_of_a_model_of_another_name_is_warned_of(adapted, caplog, name, warned):
    _, adapter, recipe = adapted
    change_config(adapter, base_model_name_or_path=name)
    with caplog.at_level(logging.WARNING):
        make_plan(recipe)
    assert ("'e0' is an adapter of some/Other-7B, here it is put on" in caplog.text) == warned
    assert caplog.records == [] or warned


def test_a_model_beside_an_adapter_is_not_read(adapted, caplog):
    base, adapter, recipe = adapted
    (adapter / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with caplog.at_level(logging.WARNING):
        plan = make_plan(recipe)
    assert "holds a model and a PEFT adapter, the adapter is read" in caplog.text
    assert isinstance(plan.readers[0], LoraReader)


def test_an_adapter_is_no_merged_checkpoint(adapted, tmp_path):
    with pytest.raises(ValueError, match="is a PEFT adapter, expected a channel-merged checkpoint"):
        export_expert(adapted[1], "e0", tmp_path / "out")


def test_an_adapter_with_added_tokens_brings_its_vocabulary(make_experts, write_recipe, tmp_path):
    """Of a resized model PEFT saves embedding and head whole; an adapter without tokenizer has the base's."""
    base, experts = make_experts("llama", 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(262, mean_resizing=False)
    settings = copy.deepcopy(BOTH_EMBEDDINGS)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **settings))
    model.save_pretrained(tmp_path / "large")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(tmp_path / "large")
    plain = save_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    recipe = write_recipe(base, [tmp_path / "large", plain, *experts], tokenizer_source="union")
    convert(parse_recipe(recipe | {"grouping": {"num_groups": 3}}), tmp_path / "merged", progress=False)
    saved = load_file(tmp_path / "large" / WEIGHTS)
    stored = load_file(base / "model.safetensors")
    for expert, expected in (
        ("e0", {name.removeprefix("base_model.model."): saved[name] for name in saved}),
        ("e1", stored),
    ):
        export_expert(tmp_path / "merged", expert, tmp_path / expert)
        exported = load_file(tmp_path / expert / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(exported[name], expected[name]), (expert, name)
