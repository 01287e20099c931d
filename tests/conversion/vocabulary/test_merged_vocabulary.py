"""The merged vocabulary: whose tokens it has, what it drops, and how its ids map to each expert's own."""

import json
import logging

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.export import export_expert
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer
from conversion.vocabulary.merged_vocabulary import channel_runs, inverse

from .conftest import BASE_SIZE, NUM_BASE_TOKENS, Experts, byte_tokenizer, extended, model_of_size, save


def test_base_names_what_it_drops(llama, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        llama.convert(tmp_path / "out", "math", "chat", "code", tokenizer_source="base")
    # chat's tokens are in the place of padding: their rows stay, their names do not.
    assert "'chat' has 2 tokens that the base's tokenizer calls otherwise" in caplog.text
    assert "'<|im_start|>', '<|im_end|>'" in caplog.text and "'[PAD]', '<fim>'" in caplog.text
    config = read_merged_config(tmp_path / "out")
    assert config.vocab_size == BASE_SIZE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = model(torch.tensor([[1, 2, 3]]), expert_index="code").logits
    assert (logits[..., 261:] == float("-inf")).all() and logits[..., :261].isfinite().all()
    for name in ("math", "chat", "code"):
        export_expert(tmp_path / "out", name, tmp_path / name)
        before, after = (load_file(folder / "model.safetensors") for folder in (llama.folders[name], tmp_path / name))
        for key in before:
            assert torch.equal(before[key], after[key]), (name, key)


def test_base_drops_rows_beyond_its_own(llama, tmp_path, caplog):
    """An expert with more rows than the base: tokens are named, padding is counted, the export has what was kept."""
    added = [f"<extra_{number}>" for number in range(7)]
    folder = save(model_of_size("llama", 270, 7), extended(*added, eos="<extra_6>"), tmp_path / "big", 265)
    experts = Experts(llama.base, {**llama.folders, "big": folder})
    with caplog.at_level(logging.WARNING):
        experts.convert(tmp_path / "out", "math", "big", tokenizer_source="base")
    assert "'big' has 2 tokens that the base does not have, their rows are dropped (tokenizer_source: base): " in (
        caplog.text
    )
    assert "'<extra_5>', '<extra_6>'" in caplog.text
    assert "'big' has 4 padding rows beyond the base's, they are dropped" in caplog.text
    assert "'big' loses its end-of-sequence token: its answers end at the base's" in caplog.text
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["vocabulary"]["experts"]["big"]
    assert report["dropped_tokens"] == ["<extra_5>", "<extra_6>"] and report["dropped_padding_rows"] == 4
    # Its own tokenizer would make tokens that are not there any more: the merged one serves.
    assert not (tmp_path / "out" / "experts" / "big").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    speaker = ExpertTokenizer.of_checkpoint(tmp_path / "out", read_merged_config(tmp_path / "out"), tokenizer, "big")
    assert speaker.encode("a<extra_6>", chat=True) == tokenizer.encode("[a<extra_6>]</s>")
    assert speaker.decode(tokenizer.encode("so</s>")) == "so"
    export_expert(tmp_path / "out", "big", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.vocab_size == BASE_SIZE
    assert torch.equal(model.lm_head.weight, experts.dense("big").lm_head.weight[:BASE_SIZE])


def test_an_expert_in_another_order_is_merged_by_token(llama, tmp_path):
    """The same strings at other ids: the merged model reads each token at the base's id, the export at its own."""
    tokenizer = byte_tokenizer()
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"] = {token: 255 - number for token, number in values["model"]["vocab"].items()}
    reversed_ = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = model_of_size("llama", NUM_BASE_TOKENS, 8)
    experts = Experts(llama.base, {**llama.folders, "reversed": save(model, reversed_, tmp_path / "reversed")})
    for source in ("base", "union"):
        out = experts.convert(tmp_path / source, "math", "reversed", tokenizer_source=source)
        merged, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
        text = "What is 12 + 30?"
        with torch.no_grad():
            ours = merged(**tokenizer(text, return_tensors="pt"), expert_index="reversed").logits
            theirs = model(**reversed_(text, return_tensors="pt", return_token_type_ids=False)).logits
        torch.testing.assert_close(ours[..., :256], theirs[..., :256].flip(-1), rtol=1e-4, atol=1e-5)
        export_expert(out, "reversed", tmp_path / f"{source}-export")
        state = load_file(tmp_path / f"{source}-export" / "model.safetensors")
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key


def test_special_tokens_of_the_base_move_with_its_padding(llama, tmp_path):
    """A base that pads with a row that no token names: it is another row once tokens are added."""
    model = model_of_size("llama", BASE_SIZE, 0)
    base = save(model, extended(), tmp_path / "base")
    for file in (base / "config.json", base / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 263}))
    out = Experts(base, llama.folders).convert(tmp_path / "out")
    assert read_merged_config(out).pad_token_id == read_merged_config(out).text_config.pad_token_id == 267
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 267
    # Nobody has that row any more.
    out = Experts(base, llama.folders).convert(tmp_path / "none", "code", "small")
    assert read_merged_config(out).pad_token_id is None
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.pad_token_id is None


def test_runs_and_inverse():
    channels = torch.tensor([0, 1, 2, 7, 8, 5])
    assert channel_runs(channels) == [[0, 3], [7, 2], [5, 1]]
    assert channel_runs(torch.empty(0, dtype=torch.int64)) == []
    assert inverse(torch.tensor([2, -1, 0]), 4).tolist() == [2, -1, 0, -1]
