"""How well a router picks the expert for queries of sources that it was not trained on, against simple baselines.

    python hub_examples/benchmark_router.py CHECKPOINT queries/*.jsonl [--test unseen.jsonl]

The files are JSONL with the columns `text` and `expert`; a query's source is its column `source`, else its file's
name. Every source is left out in turn, the router is trained on the rest, and the source is tested; with `--test`,
all of the files train one router, and the sources of the test files are tested. Rows that are marked as `generated`
(style_queries.py writes such) train all contenders and are never tested.
Contenders:

- router: the checkpoint's own, fitted from zero as `channel-merge train-router` does
- naive Bayes, TF-IDF: on bags of words (runs of letters, digits, single Chinese characters, signs); TF-IDF goes
  through logistic regression

Accuracy of each source, their mean per expert and over experts (macro), and the calibration error (ECE, 15 bins;
the router's at the temperature that it chose). A table, then one line of JSON.
"""

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from conversion.router.data import Query, encode_queries, with_variants
from conversion.router.fitting import fit_router
from conversion.router.metrics import expected_calibration_error
from conversion.vocabulary.prompts import load_tokenizer

WORD = re.compile(r"[a-z]+|\d|[\u4e00-\u9fff]|[^\sa-z\d]")
BATCH = 64

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


class RouterContender:
    """The router of a checkpoint, fitted anew as `channel-merge train-router` does."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    def queries(self, rows: list[Row]) -> list[Query]:
        names = self.model.config.expert_names
        queries = [
            {"text": row["text"], "chat": False, "labels": names.index(row["expert"]), "source": row["source"]}
            | {"generated": row["generated"]}
            for row in rows
        ]
        return encode_queries(queries, self.tokenizer, self.model.config)

    @torch.no_grad()
    def features(self, queries: list[Query]) -> torch.Tensor:
        """(B, F) of encoded queries."""
        order = sorted(range(len(queries)), key=lambda number: len(queries[number]["input_ids"]))
        parts = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            padded = self.tokenizer.pad(
                {"input_ids": [queries[number]["input_ids"] for number in batch]}, return_tensors="pt"
            ).to(self.model.device)
            features = self.model.router_features(padded["input_ids"], padded["attention_mask"])
            parts.update(zip(batch, features.float().cpu(), strict=True))
        return torch.stack([parts[number] for number in range(len(queries))])

    @torch.no_grad()
    def __call__(self, train: list[Row], test: list[Row]) -> torch.Tensor:
        size = self.model.config.hidden_size
        own = self.queries(train)
        queries = encode_queries(with_variants(own, self.seed), self.tokenizer, self.model.config)
        fit_router(self.model, self.tokenizer, queries, lambda part: self.features(part)[:, :size].double().numpy())
        router = self.model.router.float().cpu()
        return self.model.router_probabilities(router(self.features(self.queries(test))))


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
    contenders: dict[str, Contender] = {"router": RouterContender(model, tokenizer, args.seed)}
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
