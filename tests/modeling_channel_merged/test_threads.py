"""A model that serves several threads answers each of them as if it were alone, and no forward pass writes to it."""

import threading

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from .conftest import CONFIGS, SIZES, random_model

CONFIGS_WITH_POSITIONS = CONFIGS | {
    "gpt2": lambda: GPT2Config(
        vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
}
# Of three prompts: one expert, named in each way, and mixed batches of two and three experts.
EXPERTS = ["instruct", "math", 2, [0, 1, 2], [2, 1, 0], [1, 1, 0], [0, 2, 2], None]


def in_threads(work, items):
    """`work(item)` in a thread for each item, all starting together; their results in order, or the first error."""
    results, errors, barrier = [None] * len(items), [], threading.Barrier(len(items))

    def run(place, item):
        try:
            barrier.wait()
            with torch.no_grad():
                results[place] = work(item)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place, item)) for place, item in enumerate(items)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("family", CONFIGS_WITH_POSITIONS)
@torch.no_grad()
def test_eight_threads_answer_as_one(family, prompts):
    """Bit for bit, single experts, mixed batches and routed ones at once; the model is the same one afterwards."""
    model = random_model(CONFIGS_WITH_POSITIONS[family](), 3)

    def answer(expert_index):
        outputs = []
        for _ in range(4):
            logits = model(prompts, expert_index=expert_index).logits
            tokens = model.generate(prompts, expert_index=expert_index, max_new_tokens=5, do_sample=False)
            outputs.append((logits, tokens))
        return outputs

    before, modules = tensors_of(model), dict(model.named_modules())
    values = {name: tensor.clone() for name, tensor in before.items()}
    expected = [answer(experts) for experts in EXPERTS]
    for theirs, alone in zip(in_threads(answer, EXPERTS), expected, strict=True):
        for ours, one in zip(theirs, alone, strict=True):
            assert torch.equal(ours[0], one[0]) and torch.equal(ours[1], one[1])
    after = tensors_of(model)
    assert after.keys() == before.keys() and all(after[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert dict(model.named_modules()) == modules


@torch.no_grad()
def test_compiled_blocks_use_the_experts_of_their_own_thread(prompts):
    """Compiled one by one, blocks meet the experts of a thread as they start, not as they were traced."""
    model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), 3)
    experts = [0, 1, 2, torch.tensor([2, 0, 1])]

    def logits(expert_index):
        return [model(prompts, expert_index=expert_index, use_cache=False).logits for _ in range(20)]

    expected = [logits(expert_index)[0] for expert_index in experts]
    for block in model.decoder_blocks():
        block.compile(backend="eager", fullgraph=True)
    for expert_index, one in zip(experts, expected, strict=True):
        torch.testing.assert_close(logits(expert_index)[0], one)
    for theirs, one in zip(in_threads(logits, experts), expected, strict=True):
        for ours in theirs:
            torch.testing.assert_close(ours, one)


@torch.no_grad()
def test_a_model_compiled_in_one_thread_runs_in_others(prompts):
    """A thread that has not run the model before compiles it, and the main thread goes on with other experts."""
    torch._dynamo.reset()
    model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), 3)
    step = torch.compile(model, backend="eager", fullgraph=True)

    def logits(expert):
        return step(prompts, expert_index=expert, use_cache=False).logits

    for expert in (0, 1, 2):
        expected = model(prompts, expert_index=expert).logits
        torch.testing.assert_close(in_threads(logits, [expert])[0], expected)
        torch.testing.assert_close(logits(expert), expected)


@torch.no_grad()
def test_process_wide_settings_stay(prompts):
    model = random_model(CONFIGS["llama"](), 3).bfloat16()
    seen = []
    model.model.base_model.layers[1].register_forward_hook(lambda *args: seen.append(torch.backends.mkldnn.enabled))
    settings = (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_default_dtype())
    for expert_index in ("math", [0, 1, 2]):
        model.generate(prompts, expert_index=expert_index, max_new_tokens=3)
    assert all(seen) and len(seen) >= 6
    assert settings == (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.get_default_dtype())
