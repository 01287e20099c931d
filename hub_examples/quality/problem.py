"""What is given to every contender, and what it gives back.

Shapes here and in the contenders: N experts, O channels, I inputs, M matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from tiny_experts.make_tiny_experts import load
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from quality.expert_sets import ExpertSet
from quality.input_statistics import EMBEDDING, InputStatistics, input_statistics
from quality.questions import Questions

State = dict[str, torch.Tensor]  # float32, without the head, which is tied to the embedding

HEAD = "lm_head.weight"
BYTES = 2  # of a stored bfloat16 number


@dataclass(frozen=True)
class Stored:
    """What a contender stores, and the N models that it answers with.

    `rows` says how many rows of each matrix are stored, where rows are all that is: these can be quantized.
    `checkpoint` is the merged checkpoint that was made, if one was.
    """

    views: list[State]
    num_bytes: int
    rows: dict[str, int] | None = None
    checkpoint: Path | None = None


@dataclass
class Problem:
    """One set of experts with its texts, for one seed. `scratch` is a folder for what contenders write."""

    expert_set: ExpertSet
    questions: Questions
    work_dir: Path
    scratch: Path
    seed: int
    model: LlamaForCausalLM = field(init=False)  # whose parameters are overwritten by whoever runs it
    tokenizer: PreTrainedTokenizerFast = field(init=False)
    base: State = field(init=False)
    experts: list[State] = field(init=False)

    def __post_init__(self):
        base_folder = self.expert_set.base_folder(self.work_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(base_folder, padding_side="left")
        self.model = load(base_folder).eval()
        self.base = state(self.model)
        self.experts = [
            state(load(self.expert_set.expert_folder(self.work_dir, expert))) for expert in self.expert_set.experts
        ]

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.expert_set.experts]

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that are merged; everything else each expert keeps."""
        return [name for name, tensor in self.base.items() if tensor.ndim == 2]

    def stacked(self, name: str) -> torch.Tensor:
        """One matrix of all experts: (N, O, I)."""
        return torch.stack([expert[name] for expert in self.experts])

    @property
    def vector_bytes(self) -> int:
        """Bytes of what every expert keeps for itself: the norms."""
        return BYTES * sum(tensor.numel() for expert in self.experts for tensor in expert.values() if tensor.ndim < 2)

    @property
    def model_bytes(self) -> int:
        """Bytes of one expert in bfloat16."""
        return BYTES * sum(tensor.numel() for tensor in self.base.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of the N experts in bfloat16, which all shares are of."""
        return len(self.experts) * self.model_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the channel indices that a merged checkpoint holds: one int32 for each channel of each expert."""
        channels = sum(len(self.base[name]) for name in self.matrices) + len(
            self.base[EMBEDDING]
        )  # tied head: its own
        return 4 * len(self.experts) * channels

    def allowance(self, budget: float) -> int:
        """What others may store where ours stores `budget` of the parameters: as many bytes, its indices with them."""
        return int(budget * self.expert_bytes) + self.index_bytes

    def views(self, matrix: Callable[[int, str], torch.Tensor]) -> list[State]:
        """N models: `matrix(expert, name)` for every matrix, and each expert's own of everything else."""
        return [
            {name: tensor if tensor.ndim < 2 else matrix(number, name) for name, tensor in expert.items()}
            for number, expert in enumerate(self.experts)
        ]

    @cached_property
    def statistics(self) -> list[InputStatistics]:
        """Of each expert on its own calibration texts."""
        return [
            input_statistics(set_weights(self.model, expert), self.tokenizer, self.questions.calibration[name])
            for name, expert in zip(self.names, self.experts, strict=True)
        ]


def state(model: LlamaForCausalLM) -> State:
    """A copy of a model's parameters."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != HEAD}


def set_weights(model: LlamaForCausalLM, weights: State) -> LlamaForCausalLM:
    """The same model with other parameters."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {HEAD} and not unexpected
    return model


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """As it is stored in bfloat16."""
    return tensor.bfloat16().float()
