"""Answers out of mixed batches: each request's tokens as text, up to its own end, stop strings or token limit."""

import asyncio
from collections.abc import Callable
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import CBGenerateManager, CBWorkerDeadError, GenerationState, _StreamError
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import drain_queue

from conversion.serving.model_manager import Question
from conversion.serving.sampling import request_processors
from conversion.vocabulary.expert_tokenizer import until_end

# On a CPU, whose memory is not the server's alone: Transformers would fill more than half of it.
CPU_CACHE_TOKENS = 16_384
CPU_BATCH_TOKENS = 1024  # of a step: more only make a single prompt hold up the others


class AnswerStream:
    """Puts an answer's text into a queue, piece by piece, and at its end None; an error is a `_StreamError`.

    What could still become a stop string is held back. A streamer of Transformers' handlers: `total_tokens`, `cancel`.

    Args:
        limits: its `stop_strings` end the answer; `max_new_tokens` becomes None where the answer ended by itself, for
            the handlers call an answer cut short that has as many tokens.
        cancel: frees what the request holds of the running batch.
    """

    def __init__(self, question: Question, limits: GenerationConfig, cancel: Callable[[], None]):
        self.queue: asyncio.Queue = asyncio.Queue()
        self.total_tokens = 0
        self.cancel = cancel
        self._question, self._limits = question, limits
        self._step = question.tokenizer.decode_stream()
        self._text = ""  # decoded so far
        self._said = 0  # characters of it that are in the queue
        self._done = False

    def put(self, output: GenerationOutput) -> None:
        """Take what continuous batching says of the request: all tokens so far, or that it failed."""
        if self._done:
            return
        if output.error is not None:
            self._finish(_StreamError(output.error.replace('"', "'")))
            return
        tokens = output.generated_tokens
        if output.is_finished():
            self._end(tokens)
            return
        for token in tokens[self.total_tokens :]:
            self.total_tokens += 1
            self._text += self._step(token)
            if self._say():
                self.cancel()
                return

    def _end(self, tokens: list[int]) -> None:
        own = until_end(tokens, {*self._question.ends})
        self.total_tokens = len(tokens)
        whole = self._question.tokenizer.decode(own)
        if whole.startswith(self._text[: self._said]):
            self._text = whole
        if self._say(last=True):
            return
        if len(own) < len(tokens):
            self._limits.max_new_tokens = None
        self._finish()

    def _say(self, last: bool = False) -> bool:
        """Put what is certain into the queue; whether a stop string ended the answer."""
        new, stops = self._text[self._said :], self._limits.stop_strings or []
        found = [place for place in map(new.find, stops) if place >= 0]
        if found:
            new = new[: min(found)]
        elif not last:
            new = new[: len(new) - max((begun(new, stop) for stop in stops), default=0)]
        if new:
            self.queue.put_nowait(new)
            self._said += len(new)
        if found:
            self._limits.max_new_tokens = None
            self._finish()
        return bool(found)

    def _finish(self, error: _StreamError | None = None) -> None:
        self._done = True
        self.queue.put_nowait(error)


def begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class ExpertGenerateManager(CBGenerateManager):
    """`CBGenerateManager` whose requests have an expert, sampling and stop strings of their own."""

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        if self._cb is not None:
            return
        config = GenerationConfig.from_dict({**gen_config.to_dict(), "do_sample": False})
        cb = model.init_continuous_batching(generation_config=config, continuous_batching_config=self._cb_config)
        cb.logit_processor = request_processors(cb.logit_processor, model.config.vocab_size)
        cb.warmup()
        cb.start()
        self._cb = cb

    @property
    def max_request_tokens(self) -> int:
        """The most tokens that one request can have, its answer included."""
        return self._cb.max_request_tokens

    def is_alive(self) -> bool:
        """Whether requests are answered; not from the moment on at which the model failed."""
        return self._cb is None or self._cb.background_thread_status.can_accept_new_requests() is None

    def check_alive(self) -> None:
        """CBWorkerDeadError where requests are not answered any more."""
        if not self.is_alive():
            raise CBWorkerDeadError("generation has failed and stopped: the server must be started anew")

    def generate_streaming(self, model, processor: Question, inputs, gen_config, request_id, response_parser=None):
        stream = self._start(processor, inputs, gen_config, request_id, streaming=True)
        return stream.queue, stream

    async def generate_non_streaming(self, model, processor: Question, inputs, gen_config, request_id):
        stream = self._start(processor, inputs, gen_config, request_id, streaming=bool(gen_config.stop_strings))
        text = ""
        try:
            while (piece := await stream.queue.get()) is not None:
                if isinstance(piece, _StreamError):
                    self.check_alive()
                    raise RuntimeError(f"{request_id} failed: {piece.msg}")
                text += piece
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return text, len(processor.input_ids), range(stream.total_tokens)

    def _start(
        self, question: Question, inputs: dict[str, Any], limits: GenerationConfig, request_id: str, streaming: bool
    ) -> AnswerStream:
        """Begin an answer; `inputs` are the request's own arguments of continuous batching."""
        cb = self._cb

        def cancel() -> None:
            cb.cancel_request(request_id)
            with cb.output_router._lock:
                cb.output_router.result_handlers.pop(request_id, None)
            drain_queue(cb.output_router.output_queue)  # what came for requests that were cancelled before

        stream = AnswerStream(question, limits, cancel)
        cb.register_result_handler(request_id, stream.put)  # first: an answer may be there at once
        try:
            cb.add_request(
                **inputs,
                request_id=request_id,
                streaming=streaming,
                max_new_tokens=limits.max_new_tokens,
                eos_token_id=question.ends or -1,
            )
        except BaseException:
            cancel()
            raise
        return stream

    def stop(self) -> None:
        if self._cb is not None:
            self._cb.stop(block=True, hard_stop=True)


class ExpertGenerationState(GenerationState):
    """`GenerationState` of one model, whose continuous batching runs from the start.

    Args:
        cache_tokens: tokens of all running requests together whose keys and values are kept; None: CPU_CACHE_TOKENS
            on a CPU, elsewhere as many as fit.

    Raises:
        ValueError: the cache does not fit into memory.
    """

    def __init__(self, model: PreTrainedModel, cache_tokens: int | None = None):
        config = ContinuousBatchingConfig()
        if model.device.type == "cpu":
            config.max_batch_tokens = CPU_BATCH_TOKENS
            cache_tokens = cache_tokens or CPU_CACHE_TOKENS
        if cache_tokens is not None:
            config.num_blocks = -(-cache_tokens // config.page_size)
        super().__init__(continuous_batching=True, cb_config=config)
        self._cb_manager = ExpertGenerateManager(config)
        try:
            self._cb_manager.init_cb(model, model.generation_config)
        except MemoryError as error:
            raise ValueError(f"the cache for the keys and values of requests does not fit: {error}") from None

    def get_manager(self, *args, **kwargs) -> ExpertGenerateManager:
        return self._cb_manager
