"""What a calibration measures is what a plain loop over the texts does, on every family, and in whatever portions."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, FalconConfig, GemmaConfig, OPTConfig

import conversion.merging.calibration as room
from conversion.io.journal import Journal
from conversion.merging.calibration import make_batches, measure_calibration
from conversion.merging.calibration_memory import plan_calibration
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.merging.shared_inputs import shared_inputs
from conversion.vocabulary.calibration_texts import CalibrationText

MEMORY = 10**9
FINGERPRINT = {"run": 1}
CALIBRATION = {"data": "texts.jsonl"}
SIZES = {"vocab_size": 259, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {  # a scaled embedding; one tensor for attention and feed-forward; modules that see tokens without texts
    "gemma": GemmaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, head_dim=8),
    "falcon": FalconConfig(**SIZES, hidden_dropout=0.5),
    "opt": OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=20, dropout=0.5),
}


def random_texts(num_experts: int, count: int = 7, seed: int = 0, longest: int = 40) -> list[CalibrationText]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for expert in [*range(num_experts)] * count:
        length = int(torch.randint(4, longest, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        texts.append(CalibrationText(expert, ids, int(torch.randint(1, length - 1, (), generator=generator))))
    return texts


@pytest.fixture
def plan_of(make_experts, write_recipe):
    def plan_of(family: str = "llama", num_experts: int = 2, **keys):
        return make_plan(
            parse_recipe(write_recipe(*make_experts(family, num_experts, **keys), calibration=CALIBRATION))
        )

    return plan_of


@pytest.fixture
def measure(tmp_path):
    def measure(plan, texts, folder="run", *, max_memory=MEMORY, threads=1, **keys):
        memory = plan_calibration(plan, max_memory, threads, max(len(text.input_ids) for text in texts))
        (tmp_path / folder).mkdir(exist_ok=True)
        journal = Journal(tmp_path / folder, FINGERPRINT)
        return measure_calibration(plan, texts, memory, journal, progress=False, **keys)

    return measure


def reference(plan, number: int, texts: list[CalibrationText], model=None):
    """One text at a time, in float64, with every gradient kept: squares and covariances by module."""
    model = model or AutoModelForCausalLM.from_pretrained(plan.experts[number].folder)
    model = copy.deepcopy(model).double().eval()
    inputs, outputs, squares, covariances, count = {}, {}, {}, {}, 0

    def keep(path, module, args, output):
        if output.is_leaf:
            output.requires_grad_()
        output.retain_grad()
        inputs[path], outputs[path] = args[0], output

    model.requires_grad_(False)
    for path in plan.modules.channel:
        model.get_submodule(path).register_forward_hook(lambda *args, path=path: keep(path, *args))
    for text in texts:
        ids = torch.tensor([text.input_ids])
        logits = model(ids, use_cache=False).logits[0]
        start = text.answer_start
        F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").backward()
        count += ids.numel()
        for path, module in plan.modules.channel.items():
            gradient = outputs[path].grad.flatten(0, -2).square()
            if module.kind == "embedding":
                by_token = torch.zeros(module.out_features, dtype=torch.float64)
                for token, row in zip(text.input_ids, gradient, strict=True):
                    by_token[token] += row.mean()
                gradient = by_token[None]
            else:
                rows = inputs[path].detach().flatten(0, -2)
                covariances[path] = covariances.get(path, 0) + rows.T @ rows
            squares[path] = squares.get(path, 0) + gradient.sum(0)
    return (
        {path: value / count for path, value in squares.items()},
        {path: value / count for path, value in covariances.items()},
    )


def assert_measured(calibration, number, plan, squares, covariances, tolerance=1e-4):
    for path, module in plan.modules.channel.items():
        found = calibration.gradient_squares(path)[number]
        assert found.dtype == torch.float64 and found.shape == (module.out_features,)
        torch.testing.assert_close(found, squares[path], rtol=tolerance, atol=tolerance * squares[path].max().item())
        covariance = calibration.covariance(path)
        if module.kind == "embedding":
            assert covariance is None
        else:
            expected = covariances[path]
            assert covariance.shape == (plan.num_experts, *expected.shape) and covariance.dtype == torch.float32
            scale = expected.diagonal().max().item()
            torch.testing.assert_close(covariance[number].double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_measures_what_a_plain_loop_does(plan_of, measure, family):
    """Biases, q/k norms, transposed fused matrices, tied heads."""
    plan, texts = plan_of(family), random_texts(2)
    calibration = measure(plan, texts)
    assert calibration.texts == {"e0": 7, "e1": 7}
    for number in range(2):
        own = [text for text in texts if text.expert == number]
        assert_measured(calibration, number, plan, *reference(plan, number, own))
    assert not torch.allclose(calibration.covariance("lm_head")[0], calibration.covariance("lm_head")[1], rtol=0.01)


def test_bfloat16_runs_in_bfloat16(plan_of, measure):
    """And is what the experts are within its rounding."""
    plan, texts = plan_of("llama", dtype=torch.bfloat16), random_texts(2)
    calibration = measure(plan, texts)
    model = AutoModelForCausalLM.from_pretrained(plan.experts[0].folder)
    squares, covariances = reference(plan, 0, texts[::2], model)
    for path in plan.modules.channel:
        found = calibration.gradient_squares(path)[0]
        assert (found - squares[path]).norm() < 0.05 * squares[path].norm()
        if path in covariances:
            error = (calibration.covariance(path)[0] - covariances[path]).norm() / covariances[path].norm()
            assert 1e-6 < error < 0.05


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_measured(plan_of, make_experts, write_recipe, measure, tmp_path):
    base, experts = make_experts("llama", 1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=40, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    plan, texts = (
        make_plan(parse_recipe(write_recipe(base, [*experts, tmp_path / "adapter"], calibration=CALIBRATION))),
        random_texts(2),
    )
    calibration = measure(plan, texts)
    assert_measured(calibration, 1, plan, *reference(plan, 1, texts[1::2], model.merge_and_unload()), tolerance=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_portions_change_nothing(plan_of, measure, monkeypatch, family):
    """Bit for bit: one covariance at a time or all, one thread or several."""
    monkeypatch.setattr(room, "BATCH_TOKENS", 64)
    plan, texts = plan_of(family), random_texts(2, count=9)
    calls = []
    covariances = room._Expert.covariances
    monkeypatch.setattr(
        room._Expert, "covariances", lambda self, paths, step: calls.append(paths) or covariances(self, paths, step)
    )
    whole = measure(plan, texts)
    assert len(calls) == 2  # one group an expert
    least = plan_calibration(plan, MEMORY, 1, 40)
    small = least.activation_bytes + max(least.sum_bytes.values()) + least.written_bytes
    split = measure(plan, texts, "split", max_memory=small)
    assert len(calls) >= 2 + 2 * 2
    threads = measure(plan, texts, "threads", threads=3)
    for other in (split, threads):
        for name, tensor in whole.stored().items():
            assert torch.equal(whole._reader.read(name), other._reader.read(name)), name
            assert other.stored()[name].file != tensor.file


def test_a_stopped_run_goes_on(plan_of, measure, monkeypatch, tmp_path):
    """What was finished is not measured again, and the result is the same bits."""
    plan, texts = plan_of(), random_texts(2)
    whole = measure(plan, texts)
    covariances, loaded = room._Expert.covariances, []

    def stopped(self, paths, step):
        for count, result in enumerate(covariances(self, paths, step)):
            if self._number == 1 and count == 3:
                raise KeyboardInterrupt
            yield result

    load = room.load_expert_model
    monkeypatch.setattr(
        room, "load_expert_model", lambda plan, number, *args: loaded.append(number) or load(plan, number, *args)
    )
    monkeypatch.setattr(room._Expert, "covariances", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(plan, texts, "stopped")
    assert loaded == [0, 1]
    again = []
    monkeypatch.setattr(
        room._Expert, "covariances", lambda self, paths, step: again.append(paths) or covariances(self, paths, step)
    )
    finished = measure(plan, texts, "stopped")
    assert loaded == [0, 1, 1] and len(again) == 1 and len(again[0]) == len(set(shared_inputs(plan).values())) - 3
    for name in whole.stored():
        assert torch.equal(whole._reader.read(name), finished._reader.read(name)), name


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_are_named(plan_of, measure, monkeypatch, name):
    plan = plan_of()
    load = room.load_expert_model

    def broken(plan, number, *args):
        model = load(plan, number, *args)
        if number == 1:
            model.get_parameter(name).data[:, 3] = torch.nan
        return model

    monkeypatch.setattr(room, "load_expert_model", broken)
    module = name.removesuffix(".weight")
    with pytest.raises(ValueError, match=f"expert 'e1': the output of {module} holds NaN or infinity"):
        measure(plan, random_texts(2), threads=2)


def test_gradients_that_are_not_finite_are_named(plan_of, measure, monkeypatch):
    """The first one on the way back from the loss."""
    plan = plan_of()
    load = room.load_expert_model

    def broken(*args):
        model = load(*args)
        model.model.norm.register_full_backward_hook(lambda module, before, after: (before[0] * torch.nan,))
        return model

    monkeypatch.setattr(room, "load_expert_model", broken)
    with pytest.raises(ValueError, match="expert 'e0': the gradient of model.layers.1.mlp.down_proj holds NaN"):
        measure(plan, random_texts(2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_modules_that_read_the_same_are_found(plan_of, family):
    first = shared_inputs(plan_of(family))
    layer = {path.split(".")[-1]: path for path in first if ".1." in path}
    if family == "gpt2":
        assert all(path == other for path, other in first.items())
    else:
        assert first[layer["k_proj"]] == first[layer["v_proj"]] == layer["q_proj"]
        assert first[layer["up_proj"]] == layer["gate_proj"]
        alone = [path for path, other in first.items() if path == other and list(first.values()).count(path) == 1]
        assert {path.split(".")[-1] for path in alone} == {"o_proj", "down_proj", "lm_head"}
    assert list(first)[-1] == "lm_head"


def test_batches_hold_every_text_once():
    """With like lengths, as many as fit; a longer text is one of its own."""
    texts = random_texts(1, count=50) + [CalibrationText(0, list(range(700)), 650)]
    batches = make_batches(texts)
    rows = []
    for number, batch in enumerate(batches):
        assert batch.number == number
        tokens = batch.is_token.view_as(batch.input_ids)
        for ids, kept, answer in zip(batch.input_ids, tokens, batch.before_answer, strict=True):
            rows.append((ids[kept].tolist(), int(answer.nonzero()[0]) + 1, int(answer.sum())))
        assert batch.input_ids.numel() <= room.BATCH_TOKENS or len(batch.input_ids) == 1
    assert sorted(rows) == sorted(
        (text.input_ids, text.answer_start, len(text.input_ids) - text.answer_start) for text in texts
    )
    assert len(batches) < 6


def test_memory_is_planned(plan_of):
    plan = plan_of("llama", dtype=torch.bfloat16)
    memory = plan_calibration(plan, MEMORY, 8, 40)
    assert memory.threads == 8 and memory.groups(memory.sources) == [memory.sources]
    assert memory.expected_peak < MEMORY + memory.weight_bytes + 2**29
    parameters = sum(tensor.numel for name, tensor in plan.readers[0].tensors.items())
    assert memory.weight_bytes == 2 * parameters
    with pytest.raises(ValueError, match=r"max_memory is 1.00 MB, expected at least .* beside one expert's weights"):
        plan_calibration(plan, 10**6, 8, 40)
    longer = plan_calibration(plan, MEMORY, 8, 4000)
    assert longer.activation_bytes > 4 * memory.activation_bytes and longer.threads < 8


@pytest.mark.parametrize("family", OTHERS)
def test_other_architectures(family, write_recipe, measure, tmp_path):
    """Against the same loop; the gradient of a scaled embedding is that at its rows."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(OTHERS[family]).eval())
        models[-1].save_pretrained(tmp_path / f"model{seed}")
    folders = [tmp_path / f"model{seed}" for seed in range(3)]
    plan = make_plan(parse_recipe(write_recipe(folders[0], folders[1:], calibration=CALIBRATION)))
    texts = random_texts(2)
    squares, covariances = reference(plan, 1, texts[1::2], models[2])
    embedding = next(path for path, module in plan.modules.channel.items() if module.kind == "embedding")
    if family == "gemma":
        squares[embedding] *= 24  # the square of its scale
    assert_measured(measure(plan, texts), 1, plan, squares, covariances)
    shared = len(set(shared_inputs(plan).values()))
    assert shared == {"gemma": 2 * 4 + 1, "falcon": 2 * 3 + 1, "opt": 2 * 4 + 3}[family]
