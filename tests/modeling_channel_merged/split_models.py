"""Run by torchrun: load each checkpoint of a folder split among the processes; keep what it answers and refuses."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModel, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_channel_merged import ChannelMergedForCausalLM

PROMPTS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "do_sample": False}
EXPERTS = (None, 1, [2, 0, 1])


@torch.no_grad()
def answers(model: ChannelMergedForCausalLM) -> dict[str, torch.Tensor]:
    """Router logits, and logits and tokens of routed prompts, of one expert and of several."""
    found = {"router": model.route(PROMPTS).logits}
    for experts in EXPERTS:
        found[f"logits of {experts}"] = model(PROMPTS, expert_index=experts).logits
        found[f"tokens of {experts}"] = model.generate(PROMPTS, expert_index=experts, **GREEDY)
    found["static cache"] = model.generate(PROMPTS, cache_implementation="static", **GREEDY)
    return found


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def main(folder: Path):
    split = {"distributed_config": DistributedConfig(tp_size=2)}
    for path in sorted(folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path, **split)
        found = answers(model)
        found["values"] = sum(parameter.numel() for parameter in model.model.parameters())
        found["styles"] = {name.rpartition(".")[2]: style for name, style in model.tp_plan.items()}
        torch.save(found, f"{path.name}-{dist.get_rank()}.pt")
    headless = AutoModel.from_pretrained(path, **split)
    found = {
        "hidden": headless(PROMPTS, expert_index=1).last_hidden_state.detach(),
        "saved": refusal(lambda: model.save_pretrained("saved")),
        "pushed": refusal(lambda: model.push_to_hub("nobody/nothing")),
        "resized": refusal(lambda: model.resize_token_embeddings(120)),
        "train": refusal(model(PROMPTS, labels=PROMPTS, expert_index=1).loss.backward),
    }
    torch.save(found, f"refused-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
