"""The GPU kernel against the plain definition: on a GPU where there is one, else in Triton's interpreter.

tests/conftest.py turns the interpreter on before anything imports Triton.
"""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from conversion.channels.row_layout import layout_rows  # noqa: E402
from modeling_channel_merged import channel_kernels  # noqa: E402
from modeling_channel_merged.active_experts import ActiveExperts, activate  # noqa: E402
from modeling_channel_merged.channel_kernels import (  # noqa: E402
    KERNEL_MAX_TOKENS,
    kernel_applies,
    kernel_linear,
    kernels_run_on,
    row_owners,
)
from modeling_channel_merged.channel_merged_layers import ChannelMergedLinear, initial_channel_index  # noqa: E402
from modeling_channel_merged.channel_ops import fill_missing, reference_linear  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One token; one block of 16 with some and with all places taken; blocks of 32 and 64: (B, T).
BATCHES = [(1, 1), (3, 1), (4, 4), (1, 17), (8, 8)]
STEPS = 1100  # inputs: several steps of every block size, the last one cut


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch):
    """Mend the interpreter, which holds bfloat16 as bits: it multiplies them as integers and cuts where it rounds."""
    if not INTERPRETED:
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), float32)

    def rounding_cast(self, source, dtype):
        if source.dtype.scalar == float32 and dtype.scalar == bfloat16:
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), bfloat16)
        return cast(self, source, dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)


@pytest.fixture
def kernel_everywhere(monkeypatch):
    """Layers use the kernel on DEVICE; returns the list of the shapes that it was called with."""
    monkeypatch.setattr(channel_kernels, "KERNEL_DEVICES", (DEVICE,))
    calls = []

    def recorded(hidden_states, *args):
        calls.append(tuple(hidden_states.shape))
        return kernel_linear(hidden_states, *args)

    monkeypatch.setattr("modeling_channel_merged.channel_merged_layers.kernel_linear", recorded)
    return calls


def random_case(num_experts, num_channels, width, seed, *, dtype=torch.float32, integers=False, missing=False):
    """weight (R, I), bias (R,), channel_index (N, O); channels fall into one to N groups. R is odd."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_rows(torch.randint(0, num_experts, (num_experts, num_channels), generator=generator))
    num_rows = len(layout.row_channel) // 2 * 2 + 1  # the last row may be nobody's
    if integers:
        weight = torch.randint(-1, 2, (num_rows, width), generator=generator)
        bias = torch.randint(-9, 10, (num_rows,), generator=generator)
    else:
        weight = torch.randn(num_rows, width, generator=generator)
        bias = torch.randn(num_rows, generator=generator)
    index = layout.channel_index
    if missing:
        gone = torch.rand(index.shape, generator=generator) < 0.3
        gone[:, 0] = False
        index = index.masked_fill(gone, -1)
    return weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), index.to(DEVICE)


def inputs_of(batch, width, seed, *, dtype=torch.float32, integers=False):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-1, 2, (*batch, width), generator=generator).to(DEVICE, dtype)
    return torch.randn(*batch, width, generator=generator).to(DEVICE, dtype)


def experts_of(num_sequences, num_experts, seed):
    return torch.randint(0, num_experts, (num_sequences,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run_kernel(hidden_states, weight, bias, index, expert_index):
    return kernel_linear(hidden_states, weight, bias, row_owners(index, len(weight)), expert_index)


def summed_in_order(hidden_states, weight, bias, index, expert_index):
    """`reference_linear`, its sums in float32 one input after the other: no library's blocks, the same everywhere."""
    outputs = []
    for inputs, expert in zip(hidden_states.float(), expert_index.tolist(), strict=True):
        rows = index[expert].long().clamp(min=0)
        output = inputs.new_zeros(*inputs.shape[:-1], len(rows))
        for value, column in zip(inputs.unbind(-1), weight[rows].float().unbind(-1), strict=True):
            output += value[..., None] * column
        if bias is not None:
            output += bias[rows].float()
        outputs.append(fill_missing(output, index[expert] < 0))
    return torch.stack(outputs).to(hidden_states.dtype)


def assert_within_twice_the_plain_error(output, hidden_states, weight, bias, index, expert_index):
    """At most twice the RMS error of the plain sums in float32, both against float64.

    One rounding of the result is allowed on top: at tiny sizes the plain product can be exact by luck.
    """
    plain = summed_in_order(hidden_states, weight, bias, index, expert_index)
    exact_bias = None if bias is None else bias.double()
    exact = reference_linear(hidden_states.double(), weight.double(), exact_bias, index, expert_index)
    assert output.dtype == plain.dtype and output.shape == plain.shape
    assert torch.equal(output.isneginf(), exact.isneginf())
    there = exact.isfinite()
    rounding = torch.finfo(output.dtype).eps / 2 * rms(exact[there])
    assert rms((output.double() - exact)[there]) <= 2 * rms((plain.double() - exact)[there]) + rounding


def rms(values):
    return values.square().mean().sqrt()


class TestRowOwners:
    @pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5, 62])
    def test_is_the_layout(self, num_experts):
        groups = torch.randint(
            0, num_experts, (num_experts, 101), generator=torch.Generator().manual_seed(num_experts)
        )
        layout = layout_rows(groups)
        rows = row_owners(layout.channel_index, len(layout.row_channel))
        assert torch.equal(rows.channel.long(), layout.row_channel) and torch.equal(rows.owners, layout.row_owners)
        assert rows.num_channels == 101 and rows.complete
        assert [expert.tolist() for expert in rows.experts] == [[expert] for expert in range(num_experts)]

    def test_missing_channels_own_nothing(self):
        rows = row_owners(torch.tensor([[0, -1, 2], [3, 1, -1]]), 5)
        assert rows.channel.tolist()[:4] == [0, 1, 2, 0]
        assert rows.owners.tolist() == [0b01, 0b10, 0b01, 0b10, 0]
        assert not rows.complete

    @pytest.mark.parametrize(
        "index",
        [[[0, 0]], [[0, 1, 0], [2, 1, 3]], [[0, 1], [1, 2]], [[-1, 0, 1], [0, -1, 1]]],
        ids=["one expert twice", "one of two experts twice", "two experts", "beside missing channels"],
    )
    def test_a_row_of_several_channels_has_no_owners(self, index):
        """The kernel stores a row's products at one channel; such a matrix is left to the plain products."""
        assert row_owners(torch.tensor(index), 4) is None

    def test_more_experts_than_bits(self):
        assert row_owners(torch.zeros(63, 1, dtype=torch.int32), 1) is None


class TestKernelLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("num_experts", [2, 3, 4, 5])
    @pytest.mark.parametrize("width", [1, 33, 64, 100])
    def test_matches_the_plain_definition(self, dtype, batch, num_experts, width):
        missing, with_bias = bool(num_experts % 2), bool((width + num_experts) % 2)
        weight, bias, index = random_case(num_experts, 19, width, seed=width, dtype=dtype, missing=missing)
        case = (weight, bias if with_bias else None, index, experts_of(batch[0], num_experts, seed=width))
        hidden_states = inputs_of(batch, width, seed=width, dtype=dtype)
        assert_within_twice_the_plain_error(run_kernel(hidden_states, *case), hidden_states, *case)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_many_steps_and_programs(self, dtype, batch):
        weight, bias, index = random_case(4, 75, STEPS, seed=1, dtype=dtype)
        case = (weight, bias, index, experts_of(batch[0], 4, seed=1))
        hidden_states = inputs_of(batch, STEPS, seed=2, dtype=dtype)
        assert_within_twice_the_plain_error(run_kernel(hidden_states, *case), hidden_states, *case)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("missing", [False, True])
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_integers_are_exact(self, dtype, missing, batch):
        """Sums that every dtype holds exactly leave no room for a wrong row, channel or token."""
        weight, bias, index = random_case(4, 41, 63, seed=3, dtype=dtype, integers=True, missing=missing)
        hidden_states = inputs_of(batch, 63, seed=4, dtype=dtype, integers=True)
        case = (hidden_states, weight, bias, index, experts_of(batch[0], 4, seed=5))
        assert torch.equal(run_kernel(*case), reference_linear(*case))

    @pytest.mark.parametrize("expert", range(3))
    @pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 7, 21), (2, 3, 2, 21)], ids=str)
    def test_one_expert(self, expert, shape):
        """One expert number stands for the whole batch, whatever its leading dimensions."""
        weight, bias, index = random_case(3, 10, 21, seed=6, integers=True)
        hidden_states = inputs_of(shape[:-1], 21, seed=7, integers=True)
        rows, read = row_owners(index, len(weight)), index[expert].long()
        output = kernel_linear(hidden_states, weight, bias, rows, rows.experts[expert])
        assert torch.equal(output, F.linear(hidden_states, weight[read], bias[read]))

    def test_flattened_tokens(self):
        """(B * T, I) is (B, T, I): a sequence's tokens follow each other."""
        weight, bias, index = random_case(3, 10, 21, seed=8, integers=True)
        hidden_states, experts = inputs_of((4, 3), 21, seed=9, integers=True), experts_of(4, 3, seed=9)
        flat = run_kernel(hidden_states.flatten(0, 1), weight, bias, index, experts)
        assert torch.equal(flat, run_kernel(hidden_states, weight, bias, index, experts).flatten(0, 1))

    def test_views(self):
        """Rows that are a part of a wider tensor, inputs with strides and an index that is one number expanded."""
        weight, bias, index = random_case(3, 10, 40, seed=10, integers=True)
        hidden_states = inputs_of((40, 4), 2, seed=11, integers=True).transpose(0, 2)[..., 3:34]  # (2, 4, 31)
        case = (hidden_states, weight[:, 5:36], bias, index, torch.tensor([1], device=DEVICE).expand(2))
        assert torch.equal(run_kernel(*case), reference_linear(*case))

    def test_batch_that_does_not_divide(self):
        weight, bias, index = random_case(2, 5, 8, seed=12)
        with pytest.raises(RuntimeError, match=r"mixed batch of 2 rows .* \(3, 8\)"):
            run_kernel(inputs_of((3,), 8, seed=12), weight, bias, index, experts_of(2, 2, seed=12))

    @pytest.mark.parametrize("batch", [(1, 1), (2, 1), (2, 20)], ids=str)
    def test_rows_of_other_experts_do_not_leak(self, batch):
        weight, bias, index = random_case(4, 41, 33, seed=13)
        owners = row_owners(index, len(weight)).owners
        idle = (owners & 0b0101) == 0
        assert 0 < idle.sum() < len(weight)
        weight[idle], bias[idle] = float("nan"), float("nan")
        experts = torch.tensor([2, 0], device=DEVICE)[: batch[0]]
        if batch[0] == 1:
            idle = (owners & 0b0100) == 0
            weight[idle], bias[idle] = float("nan"), float("nan")
        assert run_kernel(inputs_of(batch, 33, seed=13), weight, bias, index, experts).isfinite().all()

    @pytest.mark.skipif(not INTERPRETED, reason="counts the loads of Triton's interpreter")
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("active", [[0], [3], [1, 2], [0, 1, 2, 3]], ids=str)
    def test_each_active_row_is_read_once_and_no_other(self, monkeypatch, batch, active):
        """Every element of a row that an active expert owns is loaded once, of any other row never."""
        from triton.runtime.interpreter import InterpreterBuilder

        weight, bias, index = random_case(4, 41, STEPS, seed=14)
        rows = row_owners(index, len(weight))
        experts = torch.tensor(active).repeat(batch[0])[: batch[0]]
        loaded, load = [], InterpreterBuilder.create_masked_load

        def recorded(self, pointers, mask, *args):
            loaded.append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
            return load(self, pointers, mask, *args)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded)
        kernel_linear(inputs_of(batch, STEPS, seed=14), weight, bias, rows, experts)
        places = torch.cat(loaded) - weight.data_ptr()
        places = places[(places >= 0) & (places < weight.nbytes)] // weight.element_size()
        times = torch.bincount(places, minlength=weight.numel()).view_as(weight)
        mask = sum(1 << expert for expert in set(experts.tolist()))
        assert torch.equal(times, ((rows.owners & mask) != 0).long()[:, None].expand_as(times))


class TestChoice:
    def test_applies(self):
        weight, bias, _ = random_case(2, 5, 8, seed=15)
        for batch in [(), (1,), (KERNEL_MAX_TOKENS,), (8, 8)]:
            assert kernel_applies(inputs_of(batch, 8, seed=15), weight, bias)
            assert kernel_applies(inputs_of(batch, 8, seed=15), weight, None)

    def test_does_not_apply(self):
        weight, bias, _ = random_case(2, 5, 8, seed=16)
        hidden_states = inputs_of((3, 1), 8, seed=16)
        assert not kernel_applies(inputs_of((0, 1), 8, seed=16), weight, bias)
        assert not kernel_applies(inputs_of((KERNEL_MAX_TOKENS + 1,), 8, seed=16), weight, bias)
        assert not kernel_applies(hidden_states.double(), weight.double(), bias.double())
        assert not kernel_applies(hidden_states.half(), weight, bias)
        assert not kernel_applies(hidden_states, weight, bias.half())
        assert not kernel_applies(hidden_states, weight.t().contiguous().t(), bias)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert not kernel_applies(hidden_states, weight, bias)

    @pytest.mark.parametrize("needs_gradient", range(3), ids=["hidden_states", "weight", "bias"])
    def test_gradients_take_the_plain_products(self, needs_gradient):
        tensors = [inputs_of((3, 1), 8, seed=17), *random_case(2, 5, 8, seed=17)[:2]]
        tensors[needs_gradient].requires_grad_()
        assert not kernel_applies(*tensors)
        with torch.no_grad():
            assert kernel_applies(*tensors)

    def test_devices(self, monkeypatch):
        """A CPU never runs the kernel outside of these tests, and without Triton nothing does."""
        assert not kernels_run_on(torch.device("cpu")) and not kernels_run_on(torch.device("meta"))
        monkeypatch.setattr(channel_kernels, "KERNEL_DEVICES", ("cpu",))
        assert kernels_run_on(torch.device("cpu"))
        monkeypatch.setattr(channel_kernels, "triton", None)
        assert not kernels_run_on(torch.device("cpu"))

    def test_old_gpus_take_the_plain_products(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not kernels_run_on(torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert kernels_run_on(torch.device("cuda"))

    def test_import_without_triton(self, monkeypatch):
        """The file loads and answers where Triton has no wheel."""
        monkeypatch.setitem(sys.modules, "triton", None)
        spec = importlib.util.spec_from_file_location("without_triton", channel_kernels.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not module.kernels_run_on(torch.device("cuda"))


def random_layer(seed=18):
    torch.manual_seed(seed)
    layout = layout_rows(torch.randint(0, 2, (4, 30)))
    layer = ChannelMergedLinear(21, 30, len(layout.row_channel), 4, bias=True, device=DEVICE)
    layer.channel_index.copy_(layout.channel_index)
    return layer.requires_grad_(False)


class TestLayer:
    @pytest.mark.parametrize("experts", [[2], [1, 1, 1], [3, 0, 3]], ids=str)
    def test_few_tokens_take_the_kernel(self, kernel_everywhere, experts):
        layer, experts = random_layer(), torch.tensor(experts, device=DEVICE)
        hidden_states = inputs_of((len(experts), 2), 21, seed=18)
        with activate(ActiveExperts.from_index(experts)):
            output, flat = layer(hidden_states), layer(hidden_states.flatten(0, 1))
        assert kernel_everywhere == [hidden_states.shape, hidden_states.flatten(0, 1).shape]
        case = (layer.weight, layer.bias, layer.channel_index, experts)
        assert_within_twice_the_plain_error(output, hidden_states, *case)
        assert torch.equal(flat, output.flatten(0, 1))

    def test_many_tokens_and_training_do_not(self, kernel_everywhere):
        layer = random_layer()
        with activate(ActiveExperts.from_index(torch.tensor([1, 2], device=DEVICE))):
            layer(inputs_of((2, KERNEL_MAX_TOKENS), 21, seed=19))
            layer.requires_grad_(True)(inputs_of((2, 1), 21, seed=19)).sum().backward()
        assert not kernel_everywhere and layer.weight.grad.abs().sum() > 0

    def test_rows_that_are_not_plain_do_not(self, kernel_everywhere):
        layer = random_layer()
        layer.rows.register_forward_hook(lambda module, args, output: output * 2)
        with activate(ActiveExperts(1)):
            layer(inputs_of((2, 1), 21, seed=20))
        assert not kernel_everywhere

    def test_rows_of_several_channels_do_not(self, kernel_everywhere):
        layer = random_layer()
        layer.channel_index = initial_channel_index(4, 30, layer.num_rows).to(DEVICE)
        hidden_states = inputs_of((2, 1), 21, seed=21)
        with activate(ActiveExperts(1)):
            output = layer(hidden_states)
        assert not kernel_everywhere and layer.derived.row_owners is None
        rows = layer.channel_index[1].long()
        torch.testing.assert_close(output, F.linear(hidden_states, layer.weight[rows], layer.bias[rows]))

    def test_a_changed_index_is_seen(self, kernel_everywhere):
        layer, hidden_states = random_layer(), inputs_of((1, 1), 21, seed=22)
        with activate(ActiveExperts(0)):
            layer(hidden_states)
            layer.channel_index.copy_(layer.channel_index.flip(0))
            output = layer(hidden_states)
        case = (layer.weight, layer.bias, layer.channel_index, torch.tensor([0]))
        assert_within_twice_the_plain_error(output, hidden_states, *case)

    def test_copies(self, kernel_everywhere):
        layer, hidden_states = random_layer(), inputs_of((1, 1), 21, seed=23)
        with activate(ActiveExperts(3)):
            output = layer(hidden_states)
            assert torch.equal(copy.deepcopy(layer)(hidden_states), output)
            assert torch.equal(pickle.loads(pickle.dumps(layer))(hidden_states), output)
        assert len(kernel_everywhere) == 3


@torch.no_grad()
def test_model_decodes_through_the_kernel(kernel_everywhere, monkeypatch, llama_model, prompts):
    """A step of a mixed batch, with a cache: the logits are those of the plain products."""
    model, prompts = llama_model.to(DEVICE), prompts.to(DEVICE)
    long_prompts = prompts.repeat(1, 4)  # 84 tokens: the prefill is not the kernel's
    step = prompts[:, :1]

    def decode():
        cache = model(long_prompts, expert_index=[0, 2, 1], use_cache=True).past_key_values
        assert not kernel_everywhere
        return model(step, expert_index=[0, 2, 1], past_key_values=cache).logits

    output = decode()
    assert len(kernel_everywhere) == 3 * 7 + 1  # the linear layers of three blocks, and the head
    kernel_everywhere.clear()
    monkeypatch.setattr(channel_kernels, "KERNEL_DTYPES", ())
    torch.testing.assert_close(output, decode(), rtol=1e-4, atol=1e-4)


def run_without_interpreter(code: str) -> list:
    """Run code that prints JSON in a fresh process, where `kernels` is the module under its compiler."""
    load = (
        "import importlib.util, json, re, sys\n"
        f"spec = importlib.util.spec_from_file_location('kernels', {channel_kernels.__file__!r})\n"
        "sys.modules['kernels'] = kernels = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(kernels)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", load + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
names, result = kernels.row_products.arg_names, []
for capability in (80, 90):
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for tokens, rows in kernels.BLOCK_ROWS.items():
            pointers = {name: "*" + dtype for name in ("hidden_states", "weight", "bias", "output")}
            pointers |= {"row_channel": "*i32", "row_owners": "*i64", "expert_index": "*i64"}
            sizes = {"HAS_BIAS": True, "BLOCK_R": rows, "BLOCK_T": tokens}
            sizes["BLOCK_I"] = kernels.STEP_BYTES // (rows * size)
            signature = {name: pointers.get(name, "constexpr" if name in sizes else "i32") for name in names}
            aligned = [*pointers, "num_inputs", "weight_stride"]
            source = ASTSource(
                kernels.row_products,
                signature,
                {(names.index(name),): value for name, value in sizes.items()},
                {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            )
            compiled = compile(source, target=GPUTarget("cuda", capability, 32))
            wide = r"ld\\.global\\.v4\\.b32" if tokens == 1 else r"cp\\.async\\.cg\\.shared\\.global [^;]*, 0x10,"
            matrix = r"mma\\.sync|wgmma\\.mma_async"
            ptx = compiled.asm["ptx"]
            result.append([capability, dtype, tokens, len(compiled.asm["cubin"]), compiled.metadata.shared,
                           len(re.findall(wide, ptx)), len(re.findall(matrix, ptx))])
print(json.dumps(result))
"""


def test_compiles_for_gpus(tmp_path, monkeypatch):
    """Machine code for two generations without a GPU: 16 bytes a load, matrix instructions, modest shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run_without_interpreter(COMPILE)
    assert len(result) == 2 * 3 * len(channel_kernels.BLOCK_ROWS)
    for capability, dtype, tokens, cubin, shared, wide_loads, matrix_instructions in result:
        name = f"sm_{capability} {dtype} {tokens}"
        assert cubin > 0 and shared <= 48 * 1024, name
        assert wide_loads >= 4, name
        assert (matrix_instructions > 0) == (tokens > 1 and dtype != "fp32"), name


TRACE = """
import torch, triton
import torch.utils._triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors
from triton.backends.compiler import GPUTarget

class NoDriver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0

triton.runtime.driver.set_active(NoDriver())
torch.utils._triton.has_triton = lambda: True
rows = kernels.row_owners(torch.arange(10).view(2, 5), 10)
weight, calls = torch.randn(10, 24), []

def backend(graph, inputs):
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_mutation:
            arguments = {key: value.meta["example_value"] for key, value in node.kwargs["kwargs"].items()}
            calls.append(get_mutated_tensors(
                node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"], arguments, {}
            ))
    return lambda *inputs: (torch.zeros(2, 1, 5),)

@torch.compile(fullgraph=True, backend=backend, dynamic=False)
def layer(hidden_states, expert_index):
    assert kernels.kernel_applies(hidden_states, weight, None)
    return kernels.kernel_linear(hidden_states, weight, None, rows, expert_index)

with torch.no_grad():
    layer(torch.randn(2, 1, 24), torch.tensor([1, 0]))
print(json.dumps(calls))
"""


def test_traces_into_one_graph(tmp_path, monkeypatch):
    """torch.compile takes the launch into its graph whole, and finds that it writes the output and nothing else."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run_without_interpreter(TRACE) == [["output"]]
