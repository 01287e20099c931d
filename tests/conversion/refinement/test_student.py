import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.refinement.arguments import RefineArguments
from conversion.refinement.divergence import divergence, top_tokens
from conversion.refinement.padding import pad
from conversion.refinement.student import load_student, round_to_stored, route, single_owner_rows, without_dropout
from conversion.refinement.trainer import batch_divergence

ARCHITECTURES = ("llama", "qwen2-tied", "gpt2-tied")


def student_of(stored, **options):
    with MergedCheckpoint(stored.folder) as merged:
        return load_student(merged, RefineArguments(checkpoint=str(stored.folder), **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_rows_train(tmp_path, write_checkpoint, architecture):
    """In float32, and the parameters that are kept per expert only if they are asked for; never the router."""
    stored = write_checkpoint(tmp_path / "merged", architecture, dtype=torch.bfloat16)
    model = student_of(stored)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {name for name, _ in model.named_parameters() if ".rows." in name}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = student_of(stored, train_per_expert=True, dtype="bfloat16")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("router.")}
    assert model.get_input_embeddings().rows.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_shared_rows_add_up(tmp_path, write_checkpoint, architecture):
    """A mixed batch's gradient is the sum of those of every expert as a dense model of its own, row by row."""
    stored = write_checkpoint(tmp_path / "merged", architecture)
    model = student_of(stored)
    texts = [[5, 9, 3, 7], [4, 4, 8], [11, 2, 6, 10, 3], [9, 5], [7, 12, 13]]
    experts = torch.tensor([0, 1, 2, 1, 0])
    positions = [len(text) - 1 for text in texts]
    generator = torch.Generator().manual_seed(0)
    teacher = top_tokens(torch.randn(sum(positions), stored.config.vocab_size, generator=generator), 6)
    input_ids, mask = pad(texts)
    batch = {"input_ids": input_ids, "attention_mask": mask, "expert_index": experts, **teacher._asdict()}
    terms = batch_divergence(model, batch)
    terms.sum().backward()

    rows = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    modules = model.channel_modules()
    dense = AutoModelForCausalLM.from_config(stored.config.text_config).eval()
    start = 0
    for text, expert, count in zip(texts, experts.tolist(), positions):
        weights = {name: value for name, value in stored.experts[expert].items()}
        for path, module in modules.items():
            index = module.channel_index[expert].long()
            name = f"model.{path}.rows.weight"
            if name in rows:  # a tied head has none of its own
                weight = rows[name][index]
                transposed = weights[f"{path}.weight"].shape != weight.shape or "c_" in path
                weights[f"{path}.weight"] = weight.T if transposed else weight
            if f"model.{path}.rows.bias" in rows:
                weights[f"{path}.bias"] = rows[f"model.{path}.rows.bias"][index]
        if dense.config.tie_word_embeddings:
            embedding = next(path for path in modules if dense.get_submodule(path) is dense.get_input_embeddings())
            weights["lm_head.weight"] = weights[f"{embedding}.weight"]
        logits = functional_call(dense, weights, kwargs={"input_ids": torch.tensor([text])}, tie_weights=False).logits
        own = divergence(logits[0, :-1], type(teacher)(*(part[start : start + count] for part in teacher)))
        torch.testing.assert_close(terms[start : start + count], own, rtol=1e-4, atol=1e-5)
        own.sum().backward()
        start += count
    for name, parameter in model.named_parameters():
        if ".rows." in name:
            torch.testing.assert_close(parameter.grad, rows[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_single_owner(tmp_path, write_checkpoint, architecture):
    """Counted entry by entry; a tied head's tokens are the embedding's rows, and shared by as many."""
    stored = write_checkpoint(tmp_path / "merged", architecture)
    model = student_of(stored)
    single = single_owner_rows(model)
    assert single.keys() == {name for name, _ in model.named_parameters() if ".rows." in name}
    for path, module in model.channel_modules().items():
        readers = [set() for _ in range(module.num_rows)]
        for expert, index in enumerate(module.channel_index.tolist()):
            for row in index:
                readers[row].add(expert)
        name = f"model.{path}.rows.weight"
        if name in single:
            assert single[name].tolist() == [len(owners) == 1 for owners in readers]
            assert single[name].any() and not single[name].all()


def test_frozen_rows_have_no_gradient(stored):
    model = student_of(stored, freeze_single_owner_rows=True)
    model(
        torch.tensor([[4, 5, 6, 7]] * 3), labels=torch.tensor([[4, 5, 6, 7]] * 3), expert_index=[0, 1, 2]
    ).loss.backward()
    for name, single in single_owner_rows(model).items():
        gradient = model.get_parameter(name).grad
        assert not gradient[single].any() and gradient[~single].any(), name


def test_rounding_reaches_what_trains(stored):
    """To the stored dtype and back: nothing changes when it is stored; the rest stays as it is."""
    model = student_of(stored)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    round_to_stored(model, dict.fromkeys(before, torch.bfloat16))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16().float() if parameter.requires_grad else before[name])
        assert parameter.requires_grad is False or not torch.equal(parameter, before[name]), name


def test_dropout_is_off():
    """Whatever an architecture calls it; what is no probability stays."""
    config = GPT2Config(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3, summary_first_dropout=0.4)
    without_dropout(config)
    assert [config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout] == [0.0] * 4
    config = LlamaConfig(attention_dropout=0.5)
    without_dropout(config)
    assert config.attention_dropout == 0.0 and config.rms_norm_eps > 0


def test_prompts_are_routed_in_any_batches(stored):
    """As each would be alone, in the order in which they are given."""
    model = student_of(stored)
    with torch.no_grad():
        model.router.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    prompts = [[number, *range(3, 3 + number % 5)] for number in range(3, 20)]
    alone = [model.route(torch.tensor([prompt])).expert_index.item() for prompt in prompts]
    assert route(model, prompts, 4) == alone and len(set(alone)) > 1
    assert route(model, [], 4) == []
