import shutil

import torch
from transformers import AutoModelForCausalLM

from conversion.io.sources import find_source
from conversion.io.weights_hash import weights_hash


def hash_of(folder) -> str:
    return weights_hash(find_source("e", str(folder), folder))


def test_weights_are_told_apart_by_content(make_experts, tmp_path):
    """Not by where they lie, nor when they were written, nor in how many files."""
    base, experts = make_experts("llama", 2, hidden_size=64, intermediate_size=256)
    hashes = [hash_of(folder) for folder in (base, *experts)]
    assert len(set(hashes)) == 3
    shutil.copytree(experts[0], tmp_path / "copy")
    assert hash_of(tmp_path / "copy") == hashes[1]
    model = AutoModelForCausalLM.from_pretrained(experts[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert hash_of(tmp_path / "shards") == hashes[1]
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    model.save_pretrained(tmp_path / "changed")
    assert hash_of(tmp_path / "changed") != hashes[1]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    assert hash_of(tmp_path / "narrow") != hash_of(tmp_path / "changed")
