"""The checkpoint that is served: loaded once, its names as models, and each request's expert and prompt."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import InferenceThread, Modality

from conversion.checkpoints.merged_checkpoint import whole_checkpoint
from conversion.io.foreign_files import foreign
from conversion.io.options import check_dtype, find_device
from conversion.router.choices import choose_experts
from conversion.serving.requests import RequestError
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer, end_of_answer
from conversion.vocabulary.prompts import encode_prompts, load_tokenizer, router_queries, with_valid_text

AUTO = "auto"  # the name of the model that routes by itself


@dataclass(frozen=True)
class Question:
    """One request on its way to its expert.

    Attributes:
        probability: the router's, of the expert that answers; None where the request names the expert.
        fallback: why the default expert answers, where the router did not choose; None where it did.
        input_ids: the conversation in the expert's own chat template and tokens.
        ends: the tokens that end its answer.
    """

    expert: str
    probability: float | None
    fallback: str | None
    input_ids: list[int]
    ends: list[int]
    tokenizer: ExpertTokenizer

    @property
    def routing(self) -> dict[str, Any]:
        """What an answer says of the choice."""
        return {"expert": self.expert, "probability": self.probability, "fallback": self.fallback}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"x-expert": quote(self.expert)}
        return headers if self.probability is None else {**headers, "x-expert-probability": f"{self.probability:.4f}"}


class MergedModelManager(ModelManager):
    """`ModelManager` of one channel-merged checkpoint, which is never unloaded and has a model's name per expert.

    The installed classes run the checkpoint; code files beside the weights are not executed.

    Raises:
        ValueError: no channel-merged checkpoint, one without a chat template or with an expert called "auto", an
            unknown device or dtype.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, dtype: str = "auto"):
        check_dtype(dtype)
        device = find_device(device)
        source, self.config = whole_checkpoint(checkpoint)
        self.folder = source.folder
        if AUTO in self.config.expert_names:
            raise ValueError(f"{self.folder} has an expert {AUTO!r}, the name by which requests ask for the router")
        self.name = Path(checkpoint).resolve().name if Path(checkpoint).exists() else str(checkpoint)
        super().__init__(device=str(device), dtype=dtype, force_model=str(self.folder))
        (loaded,) = self.loaded_models.values()
        self.model, self.tokenizer = loaded.model, loaded.processor
        self.experts = {
            name: ExpertTokenizer.of_checkpoint(self.folder, self.config, self.tokenizer, name)
            for name in self.config.expert_names
        }
        self._thread = InferenceThread()

    def _load_processor(self, *args, **kwargs) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.folder)
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.folder} has no chat template, and a server answers chats")
        return tokenizer

    def _load_model(self, *args, **kwargs) -> PreTrainedModel:
        with foreign(str(self.folder)):
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()

    @staticmethod
    def get_model_modality(model: PreTrainedModel, processor: Any = None) -> Modality:
        return Modality.LLM

    @property
    def model_names(self) -> list[str]:
        return [AUTO, *self.config.expert_names]

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        created = int((self.folder / "config.json").stat().st_mtime)
        return [{"id": n, "object": "model", "created": created, "owned_by": self.name} for n in self.model_names]

    def expert_of(self, model: Any) -> str | None:
        """The expert that a request names as its model; None where the router is to choose.

        Raises:
            RequestError: there is no such model.
        """
        if model in (None, AUTO, self.name):
            return None
        if model in self.config.expert_names:
            return model
        raise RequestError(
            f"there is no model {model!r:.100}: this server has {', '.join(self.model_names)}",
            status=404,
            param="model",
            code="model_not_found",
        )

    async def question(self, model: Any, messages: list[dict[str, str]]) -> Question:
        """Choose who answers a conversation, and put it into that expert's words.

        Raises:
            RequestError: no such model, or messages that the expert's chat template does not take.
        """
        expert = self.expert_of(model)
        # In a thread of its own, one after the other: answers go on being streamed meanwhile. It finishes also what a
        # client does not wait for.
        return await asyncio.shield(self._thread.async_submit(self._question, expert, with_valid_text(messages)))

    def _question(self, expert: str | None, messages: list[dict[str, str]]) -> Question:
        probability = fallback = None
        try:
            if expert is None:
                queries = encode_prompts(self.tokenizer, router_queries([messages], self.config), chat=True)
                chosen = choose_experts(self.model, queries.to(self.model.device), whole=True)
                (expert,), (probability,), (fallback,) = chosen
            input_ids = self.experts[expert].encode(messages, chat=True)
            if not input_ids:
                raise ValueError("the conversation has no tokens")
        except ValueError as error:
            raise RequestError(str(error), param="messages") from None
        ends = sorted(end_of_answer(self.model, expert))
        return Question(expert, probability, fallback, input_ids, ends, self.experts[expert])
