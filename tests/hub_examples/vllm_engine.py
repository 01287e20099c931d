"""Runs in the environment of vLLM: answers the batches of a JSON file by one engine, and says what it did as JSON.

    python vllm_engine.py JOB.json ANSWERS.json

The job has `engine` (arguments of `LLM`), `adapters` (a folder of selector adapters, or null) and `batches`, lists of
requests with `prompt_token_ids`, `expert` (a name or null) and `max_tokens`. Each answer has `token_ids`, `logprobs`
(of those tokens) and `cached` (tokens of the prompt that came from the prefix cache).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main(job_file: str, answers_file: str):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(job_file).read_text())
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
    Path(answers_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
