"""What is made of a merged checkpoint keeps its vocabularies: a trained router, an adapter, a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.export import export_expert
from conversion.train_router import main as train_router

from .conftest import BASE_TEMPLATE, NAMES, UNION, Experts


def test_a_trained_router_keeps_the_experts_files(merged_llama, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{n} {name}", "expert": name}) + "\n" for n in range(4) for name in NAMES)
    )
    train_router(
        [
            "--checkpoint",
            str(merged_llama),
            "--train-data",
            str(data),
            "--output-dir",
            str(tmp_path / "out"),
            "--use-cpu",
        ]
        + ["--max-steps", "1", "--disable-tqdm", "true"]
    )
    before, after = ({f.relative_to(d) for f in d.glob("experts/*/*")} for d in (merged_llama, tmp_path / "out"))
    assert before == after and Path("experts/chat/tokenizer.json") in after
    old, new = read_merged_config(merged_llama), read_merged_config(tmp_path / "out")
    assert old.expert_vocabularies == new.expert_vocabularies and old.expert_eos_token_ids == new.expert_eos_token_ids
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates == AutoTokenizer.from_pretrained(merged_llama).chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(model.generation_config.eos_token_id) == [257, 260]


# PEFT 0.21 still asks Transformers by the deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_beside_a_larger_vocabulary(llama, tmp_path):
    """A LoRA expert has the base's vocabulary, which the union moves as it does the base's."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama.base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "lora")
    out = Experts(llama.base, {"chat": llama.folders["chat"], "lora": tmp_path / "lora"}).convert(tmp_path / "out")
    assert read_merged_config(out).vocabulary_channels("lora") == [*range(259), 261, 262, 263, 264, 265]
    export_expert(out, "lora", tmp_path / "export")
    state = load_file(tmp_path / "export" / "model.safetensors")
    for key, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-7)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == BASE_TEMPLATE


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
own = AutoTokenizer.from_pretrained(sys.argv[1], subfolder="experts/chat")
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="chat", tokenize=False)
inputs = tokenizer([text, text], add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
logits = model(**inputs, expert_index=["chat", "math"]).logits
sequences = model.generate(**inputs, expert_index=["chat", "math"], max_new_tokens=20)
torch.save((inputs["input_ids"], own(text)["input_ids"], logits, sequences), sys.argv[2])
"""


def test_a_fresh_offline_process_without_this_package(merged_llama, tmp_path, without_package):
    """Tokenizer, templates, logits and ends are all in the checkpoint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", without_package + REMOTE, merged_llama, tmp_path / "out.pt"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    input_ids, own_ids, logits, sequences = torch.load(tmp_path / "out.pt")
    assert input_ids[0].tolist() == [UNION["chat"][number] for number in own_ids]
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    keys = {"attention_mask": torch.ones_like(input_ids), "expert_index": ["chat", "math"]}
    with torch.no_grad():
        assert torch.equal(model(input_ids, **keys).logits, logits)
    assert torch.equal(model.generate(input_ids, max_new_tokens=20, **keys), sequences)
