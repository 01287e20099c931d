"""Rows quantized by Transformers on loading: quantizing shared rows is quantizing each expert alike."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from .conftest import GREEDY, dense_expert, random_model

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: make test-quantized")

# On a CPU, torchao holds four-bit values in a byte each; its packed ones need a GPU.
WEIGHTS = {
    "int8": lambda: torchao.Int8WeightOnlyConfig(),
    "int4 values": lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.granularity.PerGroup(4)),
}


@pytest.fixture(params=WEIGHTS)
def quantization(request):
    return TorchAoConfig(WEIGHTS[request.param]())


@pytest.fixture
def saved(text_config, tmp_path):
    """A model of three experts and the folder where it is saved in floats."""
    model = random_model(text_config, 3)
    model.save_pretrained(tmp_path / "floats")
    return model, tmp_path / "floats"


def quantized(folder, quantization):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization).eval()


@torch.no_grad()
def test_each_expert_is_the_dense_expert_quantized(saved, quantization, prompts, tmp_path):
    """A row's scales are its own, so it is the same row whoever shares the matrix with it."""
    model, folder = saved
    merged = quantized(folder, quantization)
    for expert in range(3):
        dense_expert(model, expert).save_pretrained(tmp_path / f"dense{expert}")
        dense = quantized(tmp_path / f"dense{expert}", quantization)
        expected = dense(prompts).logits
        assert not torch.allclose(expected, model(prompts, expert_index=expert).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(prompts, expert_index=expert).logits, expected)
        assert torch.equal(merged.generate(prompts, expert_index=expert, **GREEDY), dense.generate(prompts, **GREEDY))


@torch.no_grad()
def test_mixed_batches_and_routing(saved, quantization, prompts):
    merged = quantized(saved[1], quantization)
    one_by_one = torch.cat([merged(prompts[[row]], expert_index=row).logits for row in range(3)])
    torch.testing.assert_close(merged(prompts, expert_index=[0, 1, 2]).logits, one_by_one)
    expert_index = merged.route(prompts).expert_index
    assert len(expert_index.unique()) > 1
    routed, given = merged.generate(prompts, **GREEDY), merged.generate(prompts, expert_index=expert_index, **GREEDY)
    assert torch.equal(routed, given)


@torch.no_grad()
def test_saved_and_loaded_again(saved, quantization, prompts, tmp_path):
    merged = quantized(saved[1], quantization)
    merged.save_pretrained(tmp_path / "quantized")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "quantized", saved[1])]
    assert sizes[0] < sizes[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(loaded(prompts, expert_index=[0, 1, 2]).logits, merged(prompts, expert_index=[0, 1, 2]).logits)
    assert torch.equal(loaded.route(prompts).logits, merged.route(prompts).logits)


def test_what_is_quantized(saved, quantization):
    """The linear maps of the blocks; not embeddings, head, norms and router."""
    merged = quantized(saved[1], quantization)
    plain = {name for name, parameter in merged.named_parameters() if type(parameter) is nn.Parameter}
    floats = {name for name in plain if name.endswith("weight") and ".layers." in name}
    assert floats == {name for name in floats if ".experts." in name}
    assert {"model.model.embed_tokens.rows.weight", "router.head.weight"} <= plain
    assert type(merged.model.lm_head.rows.weight) is nn.Parameter
    assert merged.router.head.weight.dtype == torch.float32


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2]), expert_index=[0, 1, 2]).logits, sys.argv[3])
"""


def test_remote_code_in_a_fresh_offline_process(llama_model, prompts, tmp_path, without_package):
    llama_model.save_pretrained(tmp_path / "floats")
    merged = quantized(tmp_path / "floats", TorchAoConfig(WEIGHTS["int8"]()))
    merged.save_pretrained(tmp_path / "quantized")
    torch.save(prompts, tmp_path / "prompts.pt")
    files = [tmp_path / name for name in ("quantized", "prompts.pt", "out.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", without_package + REMOTE, *files],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), merged(prompts, expert_index=[0, 1, 2]).logits)


@torch.no_grad()
def test_a_head_of_its_own_is_quantized_when_asked(llama_model, prompts, tmp_path):
    llama_model.save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    merged = quantized(tmp_path, config)
    assert type(merged.model.lm_head.rows.weight) is not nn.Parameter
    assert merged(prompts, expert_index=[0, 1, 2]).logits.isfinite().all()
