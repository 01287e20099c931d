"""Each answer ends where its own expert ends it."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from conversion.checkpoints.merged_checkpoint import read_merged_config

from .conftest import CHATML, Experts, extended, model_of_size, save


class Say(LogitsProcessor):
    """Makes every query say its script, whatever the model thinks of it; a script of its own for every sequence."""

    def __init__(self, scripts: list[list[int]], prompt_length: int):
        self.scripts, self.prompt_length = scripts, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, -1e4)
        for row in range(len(scores)):
            script = self.scripts[row * len(self.scripts) // len(scores)]
            forced[row, script[min(step, len(script) - 1)]] = 0
        return forced


SCRIPTS = [[1, 257, 2, 3, 4], [1, 257, 2, 260, 4], [1, 260, 2, 3, 257]]  # of math, chat, math
ENDED = [[1, 257], [1, 257, 2, 260], [1, 260, 2, 3, 257]]


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
def test_each_row_stops_at_its_own_experts_end(merged_llama, options):
    """The other expert's end of sequence ends nothing; rows that are done are padded."""
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    assert sorted(model.generation_config.eos_token_id) == [257, 260]
    assert model.config.expert_eos_token_ids == {"math": [257], "chat": [260], "code": [257], "small": [257]}
    prompts = torch.tensor([[5, 6], [5, 6], [5, 6]])
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        expert_index=["math", "chat", "math"],
        max_new_tokens=5,
        logits_processor=LogitsProcessorList([Say(SCRIPTS, 2)]),
        **options,
    )
    copies = options.get("num_return_sequences", 1)
    longest = max(map(len, ENDED))
    expected = [[5, 6, *end, *[258] * (longest - len(end))] for end in ENDED for _ in range(copies)]
    assert sequences.tolist() == expected


def test_another_end_of_sequence_given_to_generate_is_that_of_all_rows(merged_llama):
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    prompts = torch.tensor([[5, 6], [5, 6]])
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        expert_index=["math", "chat"],
        max_new_tokens=5,
        eos_token_id=3,
        logits_processor=LogitsProcessorList([Say([[1, 257, 3, 4, 4], [1, 260, 4, 3, 4]], 2)]),
    )
    assert sequences.tolist() == [[5, 6, 1, 257, 3, 258], [5, 6, 1, 260, 4, 3]]


def test_an_end_that_all_experts_share_is_that_of_the_model(llama, tmp_path):
    """Experts that all left the base's end of sequence: theirs is the model's, and needs no table."""
    tokenizer = extended("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    folders = {
        name: save(model_of_size("llama", 261, seed), copy.deepcopy(tokenizer), tmp_path / name, 260)
        for seed, name in enumerate(("a", "b"))
    }
    out = Experts(llama.base, folders).convert(tmp_path / "out")
    config = read_merged_config(out)
    assert config.expert_eos_token_ids is None and config.eos_token_id == 260
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 260
