"""How well a router picks the expert for queries of sources that it was not trained on, against simple baselines.

    python hub_examples/benchmark_router.py CHECKPOINT queries/*.jsonl [--test unseen.jsonl]

The files are JSONL with the columns `text` and `expert`; a query's source is its column `source`, else its file's
name. Every source is left out in turn, the router is trained on the rest, and the source is tested; with `--test`,
all of the files train one router, and the sources of the test files are tested. Rows that are marked as `generated`
(style_queries.py writes such) train all contenders and are never tested.
Contenders:

- router: the checkpoint's own, as its config says, trained from zero as `channel-merge train-router` does
- trunk: the same without the n-grams of the tokens
- embedding: the trunk features before the first block
- naive Bayes, TF-IDF: on bags of words (runs of letters, digits, single Chinese characters, signs); TF-IDF goes
  through logistic regression

Accuracy of each source, their mean per expert and over experts (macro), and the calibration error (ECE, 15 bins)
before any temperature. A table, then one line of JSON.
"""

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from conversion.router.augmentation import augment
from conversion.router.metrics import expected_calibration_error
from conversion.vocabulary.prompts import load_tokenizer
from modeling_channel_merged.router_inputs import shorten

WORD = re.compile(r"[a-z]+|\d|[\u4e00-\u9fff]|[^\sa-z\d]")
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 3, 16, 1e-2, 0.1  # of `channel-merge train-router`

Row = dict[str, str | bool]
# Trains on the first rows and gives the probabilities (B, N) of the second.
Contender = Callable[[list[Row], list[Row]], torch.Tensor]


def read_rows(files: list[Path]) -> list[Row]:
    rows = []
    for file in files:
        for line in file.read_text(encoding="utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            rows.append({"source": file.stem, "generated": False, **row})
    return rows


def labels(rows: list[Row], names: list[str]) -> torch.LongTensor:
    return torch.tensor([names.index(row["expert"]) for row in rows])


def fit(
    forward: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    inputs: torch.Tensor,
    targets: torch.LongTensor,
):
    """AdamW with a learning rate that falls to zero; `inputs` (B, F), dense."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * math.ceil(len(targets) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(targets)).split(BATCH):
            F.cross_entropy(forward(inputs[rows]), targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class RouterContender:
    """The router of a checkpoint, or of its trunk features or embeddings alone; features are computed once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, seed: int):
        self.model, self.tokenizer, self.kind, self.seed = model, tokenizer, kind, seed
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def features(self, texts: list[str]) -> torch.Tensor:
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            inputs = self.tokenizer(part, padding=True, return_tensors="pt").to(self.model.device)
            max_tokens = self.model.config.router["max_tokens"]
            ids, mask, _ = shorten(inputs["input_ids"], inputs["attention_mask"], None, max_tokens)
            if self.kind == "embedding":
                hidden_states = torch.where(mask[..., None] == 0, 0, self.embeddings(ids, mask))
                features = F.layer_norm(hidden_states.sum(1) / mask.sum(1, keepdim=True), hidden_states.shape[-1:])
                features = features / self.model.config.hidden_size**0.5
            else:
                features = self.model.router_features(ids, mask)
                if self.kind == "trunk":
                    features = features[:, : self.model.config.hidden_size]
            self.known.update(zip(part, features.float().cpu(), strict=True))
        return torch.stack([self.known[text] for text in texts])

    def embeddings(self, ids: torch.LongTensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, H) of the trunk expert; its first block is not asked."""
        seen = {}
        block = self.model.decoder_blocks()[0]
        hook = block.register_forward_pre_hook(lambda module, args: seen.update(embedded=args[0].float()))
        try:
            self.model.router_features(ids, mask)
        finally:
            hook.remove()
        return seen["embedded"]

    def __call__(self, train: list[Row], test: list[Row]) -> torch.Tensor:
        names = self.model.config.expert_names
        texts = [row["text"] for row in train]
        inputs = self.features(texts + [augment(text, self.seed) for text in texts])
        targets = labels(train, names).repeat(2)
        set_seed(self.seed)
        if self.kind == "router":
            head = self.model.router.float().cpu()
            for parameter in head.parameters():
                torch.nn.init.zeros_(parameter)
        else:
            head = torch.nn.Linear(inputs.shape[1], len(names))
        head.train()
        fit(head, list(head.parameters()), inputs, targets)
        head.eval()
        with torch.no_grad():
            return head(self.features([row["text"] for row in test])).softmax(-1)


def bags(rows: list[Row]) -> list[Counter[str]]:
    return [Counter(WORD.findall(row["text"].lower())) for row in rows]


def count_matrix(rows: list[Row], vocabulary: dict[str, int]) -> torch.Tensor:
    """(B, W) counts of known words."""
    counts = torch.zeros(len(rows), len(vocabulary))
    for number, bag in enumerate(bags(rows)):
        for word, count in bag.items():
            if word in vocabulary:
                counts[number, vocabulary[word]] = count
    return counts


def vocabulary_of(rows: list[Row]) -> dict[str, int]:
    """Words of at least two queries."""
    frequency = Counter(word for bag in bags(rows) for word in bag)
    return {word: number for number, word in enumerate(sorted(word for word, n in frequency.items() if n > 1))}


def naive_bayes(names: list[str]) -> Contender:
    """Multinomial, with one added to every count, and experts equally likely."""

    def contender(train: list[Row], test: list[Row]) -> torch.Tensor:
        vocabulary = vocabulary_of(train)
        counts, targets = count_matrix(train, vocabulary), labels(train, names)
        per_expert = torch.stack([counts[targets == expert].sum(0) for expert in range(len(names))]) + 1
        log_likelihood = (per_expert / per_expert.sum(1, keepdim=True)).log()
        return (count_matrix(test, vocabulary) @ log_likelihood.T).softmax(-1)

    return contender


def tf_idf(names: list[str]) -> Contender:
    """Logistic regression on logarithmic term frequencies times inverse document frequencies, of unit norm."""

    def contender(train: list[Row], test: list[Row]) -> torch.Tensor:
        vocabulary = vocabulary_of(train)
        counts, targets = count_matrix(train, vocabulary), labels(train, names)
        inverse = (len(train) / (1 + (counts > 0).sum(0))).log() + 1

        def weigh(counts: torch.Tensor) -> torch.Tensor:
            return F.normalize(torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0) * inverse)

        head = torch.nn.Linear(len(vocabulary), len(names))
        torch.nn.init.zeros_(head.weight)
        inputs = weigh(counts)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(head(inputs), targets) + head.weight.square().sum() / (20 * len(train))
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            return head(weigh(count_matrix(test, vocabulary))).softmax(-1)

    return contender


def experiments(rows: list[Row], test: list[Row]) -> list[tuple[list[Row], list[Row]]]:
    """(training, test) rows of each round: the test files, or every source left out in turn."""
    if test:
        return [(rows, test)]
    sources = sorted({row["source"] for row in rows if not row["generated"]})
    return [
        ([row for row in rows if row["source"] != source], [row for row in rows if row["source"] == source])
        for source in sources
    ]


def measure(contender: Contender, rounds: list[tuple[list[Row], list[Row]]], names: list[str]) -> dict:
    """Accuracy by source, their mean over the sources of each expert and then over experts, and the ECE of all."""
    probabilities = torch.cat([contender(train, test) for train, test in rounds])
    tested = [row for _, test in rounds for row in test]
    targets = labels(tested, names)
    right = (probabilities.argmax(-1) == targets).tolist()
    by_source: dict[tuple[str, str], list[bool]] = {}
    for row, hit in zip(tested, right, strict=True):
        by_source.setdefault((row["source"], row["expert"]), []).append(hit)
    by_expert: dict[str, list[float]] = {}
    for (_, expert), hits in by_source.items():
        by_expert.setdefault(expert, []).append(statistics.mean(hits))
    return {
        "sources": {source: statistics.mean(hits) for (source, _), hits in sorted(by_source.items())},
        "macro": statistics.mean(statistics.mean(values) for values in by_expert.values()),
        "ece": expected_calibration_error(probabilities.log().numpy(), targets.numpy()),
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="channel-merged checkpoint, its router trained or not")
    parser.add_argument("queries", type=Path, nargs="+", help="JSONL files")
    parser.add_argument("--test", type=Path, nargs="+", default=[], help="JSONL files of unseen sources")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True).eval()
    names = model.config.expert_names
    rows, test = (read_rows(files) for files in (args.queries, args.test))
    if unknown := {row["expert"] for row in rows + test} - set(names):
        raise ValueError(f"the queries name the experts {sorted(unknown)}, but {args.checkpoint} has {names}")
    contenders: dict[str, Contender] = {
        kind: RouterContender(model, tokenizer, kind, args.seed) for kind in ("router", "trunk", "embedding")
    }
    contenders |= {"naive Bayes": naive_bayes(names), "TF-IDF": tf_idf(names)}
    rounds = experiments(rows, test)
    results = {name: measure(contender, rounds, names) for name, contender in contenders.items()}
    table = Table("source", *contenders, title="Accuracy on unseen sources")
    for source in results["router"]["sources"]:
        table.add_row(source, *(f"{result['sources'][source]:.3f}" for result in results.values()))
    table.add_section()
    for key in ("macro", "ece"):
        table.add_row(key, *(f"{result[key]:.3f}" for result in results.values()))
    Console().print(table)
    summary = {"checkpoint": str(args.checkpoint), "router": dict(model.config.router), "results": results}
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    main()
