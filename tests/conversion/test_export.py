import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.export import export_expert
from conversion.io.shard_writer import ShardWriter

ARCHITECTURES = ["llama", "qwen2-tied", "qwen3", "gpt2-tied"]


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_export_is_exact(tmp_path, write_checkpoint, architecture, num_experts):
    """Every parameter of the exported checkpoint is the expert's, bit for bit, and the base class finds them all."""
    names = tuple(f"expert{number}" for number in range(num_experts))
    stored = write_checkpoint(tmp_path / "merged", architecture, names)
    for name, expected in zip(names, stored.experts):
        export_expert(stored.folder, name, tmp_path / name)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__name__ == model.config.architectures[0]
        state = load_file(tmp_path / name / "model.safetensors")
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_export_keeps_the_dtype(tmp_path, write_checkpoint, dtype):
    stored = write_checkpoint(tmp_path / "merged", dtype=dtype)
    export_expert(stored.folder, "math", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.equal(model.lm_head.weight, stored.experts[1]["lm_head.weight"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_gives_the_logits_of_the_merged_model(tmp_path, write_checkpoint, architecture):
    """The plain class on the export agrees with `expert_index=e`, within twice the plain class's own error."""
    stored = write_checkpoint(tmp_path / "merged", architecture)
    merged = AutoModelForCausalLM.from_pretrained(stored.folder).eval()
    torch.manual_seed(0)
    input_ids = torch.randint(0, 23, (3, 7))
    for name in stored.config.expert_names:
        export_expert(stored.folder, name, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits = plain(input_ids).logits
            reference = plain.double()(input_ids).logits
            ours = merged(input_ids, expert_index=name).logits
        bound = 2 * (logits.double() - reference).abs().max() + 1e-6 * reference.abs().max()
        assert (ours.double() - reference).abs().max() <= bound


def test_export_of_a_smaller_vocabulary(tmp_path, write_checkpoint):
    """Tokens at the end that the expert does not have are left out, in the weights and in the config."""
    stored = write_checkpoint(tmp_path / "merged", vocab_sizes=(23, 20, 21))
    for name, size, expected in zip(stored.config.expert_names, (23, 20, 21), stored.experts):
        export_expert(stored.folder, name, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.vocab_size == size
        assert torch.equal(model.lm_head.weight, expected["lm_head.weight"][:size])
        assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"][:size])


def test_export_refuses_a_vocabulary_with_holes(stored, tmp_path):
    def punch(tensors):
        tensors["model.lm_head.channel_index"][1, 5] = -1

    edit_tensors(stored.folder, punch)
    with pytest.raises(ValueError, match="'math' cannot be exported: it lacks token 5"):
        export_expert(stored.folder, "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_in_and_out(stored, tmp_path):
    """Shard layout, of the source and of the export, changes nothing."""
    merged = AutoModelForCausalLM.from_pretrained(stored.folder)
    merged.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    shutil.copy(stored.folder / "tokenizer.json", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    export_expert(tmp_path / "sharded", "code", tmp_path / "out", max_shard_size="2KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, value in stored.experts[2].items():
        assert torch.equal(model.get_parameter(key), value), key


def test_export_carries_the_tokenizer_and_nothing_of_the_merge(stored, tmp_path):
    (stored.folder / "modeling_channel_merged.py").write_text("")
    export_expert(stored.folder, "math", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        ".channel-merge.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("one two")["input_ids"] == AutoTokenizer.from_pretrained(stored.folder)("one two")["input_ids"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config


def test_failed_export_leaves_nothing(stored, tmp_path, monkeypatch):
    def fail(self):
        raise OSError("disk full")

    monkeypatch.setattr(ShardWriter, "finish", fail)
    with pytest.raises(OSError, match="disk full"):
        export_expert(stored.folder, "math", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_output_folder(stored, tmp_path):
    """A folder with something in it is refused; a model is replaced only when that was asked for."""
    out = tmp_path / "out"
    out.mkdir()
    export_expert(stored.folder, "math", out)
    before = load_file(out / "model.safetensors")
    with pytest.raises(ValueError, match="not empty"):
        export_expert(stored.folder, "code", out)
    export_expert(stored.folder, "code", out, overwrite=True)
    after = load_file(out / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_an_export_has_the_experts_own_chat_template(stored, tmp_path):
    """As its one template, and not as one of several by name; an expert without one has the default."""
    (stored.folder / "chat_template.jinja").write_text("default")
    (stored.folder / "additional_chat_templates").mkdir()
    (stored.folder / "additional_chat_templates" / "math.jinja").write_text("own")
    for name, template in {"math": "own", "code": "default"}.items():
        export_expert(stored.folder, name, tmp_path / name)
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == template


@pytest.mark.parametrize("place", [".", ".."])
def test_an_export_over_its_own_checkpoint_is_refused(stored, place):
    """Also with overwrite: the other experts and the router would be gone."""
    before = {file.name: file.read_bytes() for file in stored.folder.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match="holds the checkpoint that is read: choose another|is not overwritten"):
        export_expert(stored.folder, "math", stored.folder / place, overwrite=True)
    with pytest.raises(ValueError):
        export_expert(stored.folder, "math", stored.folder)
    assert {file.name: file.read_bytes() for file in stored.folder.iterdir() if file.is_file()} == before


def test_unknown_expert_lists_the_known_ones(stored, tmp_path):
    with pytest.raises(ValueError, match=r"'maths'.*'instruct', 'math', 'code'"):
        export_expert(stored.folder, "maths", tmp_path / "out")


Q_PROJ = "model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.channel_index"), r"layers\.1\.self_attn\.q_proj has no channel_index"),
        (
            lambda t: t[f"{Q_PROJ}.channel_index"].fill_(999),
            r"q_proj.channel_index holds row 999 for .*expected 0 to \d+",
        ),
        (lambda t: t[f"{Q_PROJ}.channel_index"][0, 0].fill_(-2), r"q_proj.channel_index holds row -2"),
        (
            lambda t: t["model.model.embed_tokens.channel_index"][0, 0].fill_(-1),
            r"embed_tokens.channel_index holds row -1",
        ),
        (lambda t: t.update({f"{Q_PROJ}.channel_index": t[f"{Q_PROJ}.channel_index"].long()}), r"q_proj.* is I64"),
        (
            lambda t: t.update({f"{Q_PROJ}.channel_index": t[f"{Q_PROJ}.channel_index"][:2].clone()}),
            r"is I32 \[2, 16\], expected I32 \[3, 16\] by config\.json",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.rows.weight": t[f"{Q_PROJ}.rows.weight"][:-1].clone()}),
            r"q_proj\.rows\.weight is F32 .* by config\.json",
        ),
        (lambda t: t[f"{Q_PROJ}.channel_index"][1, 2].fill_(-1), r"holds row -1 for expert 1, channel 2"),
        (
            lambda t: t.update({f"{Q_PROJ}.rows.weight": t[f"{Q_PROJ}.rows.weight"].double()}),
            r"rows\.weight is F64 .*, expected F32 or F16 or BF16",
        ),
        (
            lambda t: t.update({"router.head.bias": torch.zeros(4)}),
            r"router\.head\.bias is F32 \[4\], expected .* \[3\]",
        ),
        (
            lambda t: t.update({"model.model.norm.experts.2.weight": torch.zeros(3)}),
            r"norm\.experts\.2\.weight is F32 \[3\], expected .* \[12\]",
        ),
        (lambda t: t.pop("router.head.bias"), r"lacks router\.head\.bias"),
        (lambda t: t.pop("model.model.norm.experts.2.weight"), r"lacks model\.model\.norm\.experts\.2\.weight"),
        (lambda t: t.update(stray=torch.zeros(1)), "does not explain: stray"),
    ],
    ids=[
        "missing-index",
        "high-index",
        "low-index",
        "token-without-embedding",
        "index-dtype",
        "index-shape",
        "rows-shape",
        "channel-that-a-linear-map-lacks",
        "rows-dtype",
        "router-shape",
        "norm-shape",
        "missing-router",
        "missing-norm",
        "unknown-tensor",
    ],
)
def test_damaged_checkpoint(stored, tmp_path, edit, message):
    """A checkpoint that cannot be right is refused by the name of the module or tensor."""
    edit_tensors(stored.folder, edit)
    with pytest.raises(ValueError, match=message):
        export_expert(stored.folder, "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "not a channel-merged checkpoint: its model_type is 'llama'"),
        ({"format_version": 99}, "format_version is 99, expected 1 to 2"),
        ({"format_version": None}, "format_version is None"),
    ],
)
def test_foreign_config(stored, tmp_path, values, message):
    edit_config(stored.folder, **values)
    with pytest.raises(ValueError, match=message):
        export_expert(stored.folder, "math", tmp_path / "out")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        export_expert(tmp_path / "nowhere", "math", tmp_path / "out")


def test_config_that_is_not_json(stored):
    (stored.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        MergedCheckpoint(stored.folder)
