"""The router trained by Transformers' own Trainer, the ordinary way: no subclass, no collator, no label names."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

VOCABULARY = 30
EXPERTS = ["instruct", "math", "code"]
OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 4,
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def tiny_model(seed: int = 0) -> ChannelMergedForCausalLM:
    torch.manual_seed(seed)
    text_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return ChannelMergedForCausalLM(ChannelMergedConfig(text_config=text_config, expert_names=EXPERTS)).eval()


def frozen_model() -> ChannelMergedForCausalLM:
    model = tiny_model()
    model.freeze_for_router_training()
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *map(str, range(2, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def queries(count: int, tokenizer, seed: int) -> Dataset:
    """Texts of 5 to 11 words, an expert's words for each expert, and the expert as `label`; columns of no use too."""
    generator = torch.Generator().manual_seed(seed)
    labels = [number % 3 for number in range(count)]
    texts = []
    for label in labels:
        length = int(torch.randint(5, 12, (), generator=generator))
        words = 2 + 9 * label + torch.randint(0, 9, (length,), generator=generator)
        texts.append(" ".join(map(str, words.tolist())))
    return Dataset.from_dict({"text": texts, "label": labels}).map(
        lambda batch: tokenizer(batch["text"]), batched=True, load_from_cache_file=False
    )


@pytest.fixture(scope="module")
def train_dataset(tokenizer):
    return queries(188, tokenizer, seed=0)  # the last batch of an epoch is smaller


@pytest.fixture(scope="module")
def eval_dataset(tokenizer):
    return queries(30, tokenizer, seed=1)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def make_trainer(tmp_path, tokenizer, train_dataset, eval_dataset):
    def make(model=None, callbacks=None, folder="out", **options) -> Trainer:
        return Trainer(
            model=frozen_model() if model is None else model,
            args=TrainingArguments(output_dir=str(tmp_path / folder), **OPTIONS | options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            callbacks=callbacks,
        )

    return make


def router_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.router.state_dict().items()}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_router(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def test_trains_evaluates_and_predicts(make_trainer, eval_dataset, tmp_path):
    """A plain Trainer learns separable queries, changes nothing but the router, and what it saves routes."""
    trainer = make_trainer(eval_strategy="epoch")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("router."), name
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.5
    prediction = trainer.predict(eval_dataset)
    assert prediction.predictions.shape == (30, 3) and prediction.predictions.dtype == "float32"
    assert prediction.label_ids.tolist() == eval_dataset["label"]
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    routed = [model.route(torch.tensor([ids])).expert_index.item() for ids in eval_dataset["input_ids"]]
    assert routed == prediction.predictions.argmax(-1).tolist()


def test_first_loss_is_the_mean_over_the_queries(make_trainer):
    """The untrained router's loss is log N: the Trainer divides by the queries, neither more nor fewer."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(torch.tensor(3.0).log()), rel=1e-5)


def test_accumulated_batches_equal_a_larger_one(make_trainer):
    """Four batches of 2 are one batch of 8: the same losses and router up to rounding, uneven end included."""
    runs = []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        trainer = make_trainer(**options)
        trainer.train()
        runs.append((losses(trainer), router_state(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert_same_router(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-5)


class StopAt(TrainerCallback):
    """Ends training early, as a killed job would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resumed_training_equals_uninterrupted(make_trainer, tmp_path):
    whole = make_trainer(folder="whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 7, "folder": "parts"}
    make_trainer(callbacks=[StopAt(9)], **saving).train()
    resumed = make_trainer(**saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert_same_router(router_state(whole.model), router_state(resumed.model), rtol=0, atol=0)


def test_early_stopping_keeps_the_best(make_trainer):
    """Without progress training stops, and the best router is the one that is left."""
    trainer = make_trainer(
        num_train_epochs=50,
        learning_rate=5.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) < 50
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-5)


@pytest.mark.slow
def test_bf16_is_close_to_float32(make_trainer, eval_dataset):
    """Autocast reaches the trunk alone: the router's parameters, logits and loss stay float32."""
    trainer = make_trainer(bf16=True)
    trainer.train()
    assert trainer.model.router.head.weight.dtype == torch.float32
    reference = make_trainer()
    reference.train()
    assert losses(trainer) == pytest.approx(losses(reference), abs=0.05)
    prediction = trainer.predict(eval_dataset)
    logits = torch.from_numpy(prediction.predictions)
    assert prediction.metrics["test_accuracy"] == 1.0 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_evaluating_in_half_precision(make_trainer, eval_dataset, dtype):
    """The Trainer casts the model for good: what the router learned is not rounded."""
    trainer = make_trainer(**{f"{dtype}_full_eval": True})
    trainer.train()
    learned = router_state(trainer.model)
    assert trainer.predict(eval_dataset).metrics["test_accuracy"] == 1.0
    assert trainer.model.dtype in (torch.bfloat16, torch.float16)
    assert_same_router(router_state(trainer.model), learned, rtol=0, atol=0)


def test_reports_to_tensorboard(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(report_to="tensorboard", eval_strategy="epoch")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "eval/accuracy", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(trainer), rel=1e-5)


def test_language_modelling_is_evaluated_too(make_trainer, tokenizer, train_dataset):
    """One kind of label a run: token labels alone give a loss, and the logits are a tuple's first."""
    dataset = train_dataset.remove_columns(["label", "text"]).map(lambda row: {"labels": row["input_ids"]})
    dataset = dataset.filter(lambda row: len(row["input_ids"]) == 6)
    model = tiny_model()
    metrics = Trainer(model, make_trainer().args, eval_dataset=dataset, processing_class=tokenizer).evaluate()
    batch = {name: torch.tensor(dataset[name]) for name in ("input_ids", "attention_mask", "labels")}
    assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_counting_labels_as_a_language_model_is_refused(make_trainer):
    """Not frozen by the call, the Trainer would divide the router's loss by one query too few, silently."""
    model = tiny_model()
    model.requires_grad_(False).router.requires_grad_(True)
    with pytest.raises(ValueError, match=r"call model.freeze_for_router_training\(\) before the Trainer"):
        make_trainer(model).train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_trains_saves_reloads_and_merges(make_trainer, tmp_path, eval_dataset):
    """`modules_to_save=["router"]`: the adapter holds the router, and merging puts it into the model."""
    model = frozen_model()
    adapter = LoraConfig(r=2, target_modules=["q_proj.rows"], modules_to_save=["router"])
    trainer = make_trainer(get_peft_model(model, adapter))
    trainer.train()
    expected = trainer.predict(eval_dataset)
    assert expected.metrics["test_accuracy"] == 1.0
    trainer.model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(frozen_model(), tmp_path / "adapter")
    assert (make_trainer(reloaded).predict(eval_dataset).predictions == expected.predictions).all()
    merged = reloaded.merge_and_unload()
    assert isinstance(merged, ChannelMergedForCausalLM)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded.freeze_for_router_training()
    assert make_trainer(loaded).predict(eval_dataset).predictions == pytest.approx(expected.predictions, abs=1e-5)
