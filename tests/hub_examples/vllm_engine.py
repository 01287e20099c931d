"""Runs in the environment of vLLM: answers requests by one engine after the other, and says what they did as JSON.

    python vllm_engine.py JOBS.json

Each job has `engine` (arguments of `LLM`), `adapters` (a folder of selector adapters), `batches`, lists of requests
with `prompt_token_ids`, `expert` (a name or null) and `max_tokens`, and `answers`, the file to write: for each request
its `token_ids`, their `logprobs`, and how many tokens of the prompt were `cached`.
"""

import gc
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def answer(job: dict):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    started = time.perf_counter()
    engine = LLM(**job["engine"])
    ready = time.perf_counter()
    names = sorted(folder.name for folder in Path(job["adapters"]).iterdir())
    adapters = {name: LoRARequest(name, number, f"{job['adapters']}/{name}") for number, name in enumerate(names, 1)}
    answers = []
    for batch in job["batches"]:
        outputs = engine.generate(
            [{"prompt_token_ids": request["prompt_token_ids"]} for request in batch],
            [
                SamplingParams(
                    temperature=0, max_tokens=request["max_tokens"], logprobs=0, detokenize=False, ignore_eos=True
                )
                for request in batch
            ],
            lora_request=[adapters[request["expert"]] if request["expert"] else None for request in batch],
            use_tqdm=False,
        )
        answers.append(
            [
                {
                    "token_ids": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
                    ],
                    "cached": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    result = {
        "answers": answers,
        "start_seconds": ready - started,
        "answer_seconds": time.perf_counter() - ready,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    Path(job["answers"]).write_text(json.dumps(result))


def main(jobs_file: str):
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(Path(jobs_file).read_text()):
        answer(job)
        gc.collect()  # the engine
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
