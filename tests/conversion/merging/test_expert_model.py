"""An expert that is read tensor by tensor computes what its own checkpoint does."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from conversion.merging.expert_model import load_expert_model
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

IDS = torch.arange(3, 90, 7).view(1, -1)
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def plan_of(make_experts, write_recipe):
    def plan_of(family: str, dtype: torch.dtype = torch.float32, extra=(), **keys):
        base, experts = make_experts(family, 2, dtype=dtype, **keys)
        experts += [make(base) for make in extra]
        return make_plan(parse_recipe(write_recipe(base, experts))), experts

    return plan_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_checkpoints(plan_of, family, dtype):
    """Bit for bit: norms, biases, tied heads and transposed matrices too."""
    plan, experts = plan_of(family, dtype)
    for number, folder in enumerate(experts):
        model = load_expert_model(plan, number)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert plan.text_config.dtype == make_plan(plan.recipe).text_config.dtype  # the plan's config stays as it was


def test_the_dtype_can_be_chosen(plan_of):
    plan, (folder, _) = plan_of("llama")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(load_expert_model(plan, 0, torch.bfloat16)), logits(expected))


def test_tied_heads_share_their_memory(plan_of):
    plan, _ = plan_of("qwen2")
    model = load_expert_model(plan, 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "target"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])])
def test_adapters_are_laid_over_the_base(plan_of, tmp_path, family, target):
    def adapter(base):
        model = AutoModelForCausalLM.from_pretrained(base)
        peft = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=5, target_modules=target, fan_in_fan_out=family == "gpt2")
        )
        torch.manual_seed(4)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        peft.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    plan, experts = plan_of(family, extra=[adapter])
    base = AutoModelForCausalLM.from_pretrained(plan.base.folder)
    expected = PeftModel.from_pretrained(base, experts[2]).merge_and_unload().eval()
    torch.testing.assert_close(logits(load_expert_model(plan, 2)), logits(expected), rtol=1e-4, atol=1e-5)
    plain = logits(AutoModelForCausalLM.from_pretrained(plan.base.folder))
    assert (logits(expected) - plain).abs().max() > 1e-2
