"""`channel-merged-selectors CHECKPOINT OUT`: the adapters by which a request to vLLM names an expert.

Each is a LoRA adapter of rank 1 in PEFT's form, a folder named as its expert. They hold numbers, no weights of the
model, and fit any checkpoint with the same experts in the same order.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import modeling_channel_merged  # noqa: F401  registers the config

SELECTOR = "expert_selector"
SELECTOR_SIZE = 16  # the least that GPU kernels for adapters take


def selector_tensors(expert: int) -> dict[str, torch.Tensor]:
    """Rank-1 factors by which a layer of zeros gives `expert + 1` for an input of ones."""
    down, up = torch.zeros(1, SELECTOR_SIZE), torch.zeros(SELECTOR_SIZE, 1)
    down[0, 0], up[0, 0] = 1, expert + 1
    prefix = f"base_model.model.{SELECTOR}"
    return {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}


def write_selectors(checkpoint: str, out: Path) -> list[str]:
    """Write one adapter for each expert of a checkpoint, a folder or a Hub id, into the new folder `out`.

    Returns:
        The experts' names, in the checkpoint's order.

    Raises:
        ValueError: no channel-merged checkpoint, an expert whose name is no folder's, or `out` is there and not empty.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != "channel_merged":
        raise ValueError(f"{checkpoint}: model_type is {config.model_type!r}, expected 'channel_merged'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another one, or remove it")
    for name in config.expert_names:
        if Path(name).name != name:
            raise ValueError(f"expert_names has {name!r}, which cannot be the name of a folder")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [SELECTOR],
        "bias": "none",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        for expert, name in enumerate(config.expert_names):
            folder = Path(staging, "adapters", name)
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            save_file(selector_tensors(expert), folder / "adapter_model.safetensors")
        Path(staging, "adapters").rename(out)  # also where an empty folder is there
    return config.expert_names


def serve_command(checkpoint: str, out: Path, names: list[str]) -> str:
    """The command that serves the checkpoint with its adapters."""
    modules = [f"{name}={out / name}" for name in names]
    options = ["--enable-lora", "--max-loras", str(len(names)), "--lora-modules", *modules]
    return shlex.join(["vllm", "serve", checkpoint, *options])


def main():
    parser = argparse.ArgumentParser(prog="channel-merged-selectors", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="folder or Hub id of a channel-merged checkpoint")
    parser.add_argument("out", type=Path, help="new folder for the adapters")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        names = write_selectors(arguments.checkpoint, out)
    except (OSError, ValueError) as error:
        sys.exit(f"channel-merged-selectors: {' '.join(str(error).split())}")
    print(f"{len(names)} adapters in {out}. Serve the checkpoint with them:\n")
    print(serve_command(arguments.checkpoint, out, names))


if __name__ == "__main__":
    main()
