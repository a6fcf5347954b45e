"""torch integration: operator checks, compilation, autocast, checkpointing, graphs, recompilation, errors."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from triton_ops import AttentionLayout, block_sparse_attention, decode_attention
from triton_ops.config import INTERPRETED
from triton_ops.ops import attention_op, decode_op
from triton_ops.testing import block_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: run tests/triton_ops on a machine with one")


def problem(size, dtype=torch.float32, dim=16, batch=2, heads=2, requires_grad=True):
    torch.manual_seed(1)
    layout = AttentionLayout.from_keep_mask(block_mask(heads, size + 5, size + 5, 32, 0.4, 1, DEVICE), tile=32)
    rows = min(size, 40)  # fewer queries than keys: the interpreter is slow
    tensors = [torch.randn(batch, heads, t, dim, device=DEVICE, dtype=dtype) for t in (rows, size, size)]
    return layout, [x.requires_grad_(requires_grad) for x in tensors]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_attention(size, dropout_p):
    layout, (q, k, v) = problem(size)
    tables = [*layout.query_table()[:2], *layout.key_table()[:2]]
    lengths = torch.tensor([size, size // 2], device=DEVICE)
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None
    mask, numbers = (layout.words, layout.row_shift, tables, *layout.tile), (dropout_p, 0.25, 0, None)
    arguments = (q, k, v, *mask, lengths, lengths, seed, *numbers)
    torch.library.opcheck(attention_op, arguments, rtol=1e-4, atol=1e-5)


def test_opcheck_decode():
    layout, _ = problem(24)
    q, k = torch.randn(2, 3, 2, 16, device=DEVICE), torch.randn(2, 3, 2, 24, 16, device=DEVICE)
    step = torch.tensor([7], device=DEVICE)
    torch.library.opcheck(decode_op, (q, k, k, *layout.row_lists(), step, 24, *[None] * 4, 0.25, 0, None))


def test_compiled_without_graph_breaks(size):
    layout, tensors = problem(size)
    layout.prepare(causal=True, decode=True)
    lengths = torch.tensor([size, size // 2], device=DEVICE)

    def loss(q, k, v):
        out, lse = block_sparse_attention(
            q * 2, k, v, layout, k_lengths=lengths, causal=True, backend="triton", return_lse=True
        )
        return out.sin().sum() + lse.logsumexp(-1).sum()

    def step(q, k):
        return decode_attention(q, k, k, layout, torch.tensor([3], device=DEVICE), backend="triton").cos()

    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    got = torch.autograd.grad(compiled(*tensors), tensors)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*tensors), tensors))
    arguments = torch.randn(2, 3, 2, 16, device=DEVICE), torch.randn(2, 2, size, 16, device=DEVICE)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=backend)(*arguments), step(*arguments))


def test_compiled_once_for_all_lengths_of_a_size_class():
    layout, _ = problem(60)
    counter = torch._dynamo.testing.CompileCounter()

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, backend="triton").sin()

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for q_size, k_size in [(5, 9), (6, 31), (30, 12)]:
        q, k = torch.randn(2, 2, q_size, 16, device=DEVICE), torch.randn(2, 2, k_size, 16, device=DEVICE)
        torch.testing.assert_close(compiled(q, k, k), attend(q, k, k))
    assert counter.frame_count == 1


def test_autocast(size):
    layout, (q, k, v) = problem(size)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block_sparse_attention(q, k, v.bfloat16(), layout, backend="triton")
    expected = block_sparse_attention(*(x.bfloat16() for x in (q, k, v)), layout, backend="triton")
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_dropout(size, reentrant):
    layout, tensors = problem(size)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, dropout_p=0.5, backend="triton")

    torch.manual_seed(4)
    plain = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    torch.manual_seed(4)
    leaves = [x.detach().requires_grad_() for x in tensors]
    checkpoint(attend, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, leaves, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_works_with_sdpa_and_is_refused_by_the_kernels():
    layout, (q, k, v) = problem(24, requires_grad=False)

    def loss(q, backend):
        return block_sparse_attention(q, k, v, layout, backend=backend).square().sum()

    with pytest.raises(RuntimeError, match="torch.func transforms .* use backend 'sdpa'"):
        torch.func.grad(loss)(q, "triton")
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, "triton"), leaf)[0]
    close = dict(rtol=1e-4, atol=1e-4)  # products of the kernels keep 22 of 24 bits on a GPU
    torch.testing.assert_close(torch.func.grad(loss)(q, "sdpa"), expected, **close)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused CUDA kernels do not take the mask of a vmap
        each = torch.func.vmap(lambda q: loss(q, "sdpa"))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(each, torch.stack([loss(q, "triton"), loss(2 * q, "triton")]), **close)

    def keyed(k):  # the output is laid out as q, whatever is batched
        return block_sparse_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, layout, backend="sdpa")

    with sdpa_kernel(SDPBackend.MATH):
        each = torch.func.vmap(keyed)(torch.stack([k, 2 * k]))
        torch.testing.assert_close(each, torch.stack([keyed(k), keyed(2 * k)]), **close)

    def step(q, backend):
        return decode_attention(q, k, v, layout, torch.tensor([5], device=q.device), backend=backend)

    queries = torch.stack([q[:, None, :, 0], q[:, None, :, 1]])
    with pytest.raises(RuntimeError, match="torch.func transforms .* use backend 'sdpa'"):
        torch.func.vmap(lambda q: step(q, "triton"))(queries)
    each = torch.func.vmap(lambda q: step(q, "sdpa"))(queries)
    torch.testing.assert_close(each, torch.stack([step(q, "triton") for q in queries]), **close)


def test_no_second_derivative(size):
    """It was 0, unsaid, where the gradient of the output is constant, as that of a sum."""
    layout, (q, k, v) = problem(size)
    weights = torch.ones_like(q, requires_grad=True)
    for factor in (1, weights):
        loss = (block_sparse_attention(q, k, v, layout, backend="triton") * factor).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="the kernels have no second derivative; use backend 'sdpa'"):
            (loss + grad.pow(2).sum()).backward()


@ON_GPU
def test_cuda_graph_replays_with_new_inputs_lengths_and_seed(size):
    layout, (q, k, v) = problem(size)
    layout.prepare()
    lengths, seed = torch.tensor([size, size], device=DEVICE), torch.tensor([1], device=DEVICE)

    def run():
        out = block_sparse_attention(q, k, v, layout, k_lengths=lengths, dropout_p=0.2, seed=seed, backend="triton")
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run()
    for new_seed, new_length in [(7, size // 2), (8, 1)]:
        with torch.no_grad():
            q.normal_()
        lengths.copy_(torch.tensor([size, new_length]))
        seed.fill_(new_seed)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(static, run(), strict=True))


@ON_GPU
def test_cuda_graph_of_a_decode_step_replays_for_every_step():
    layout, _ = problem(24)
    layout.prepare(decode=True)
    q, k = torch.randn(2, 3, 2, 16, device=DEVICE), torch.randn(2, 3, 2, 24, 16, device=DEVICE)
    step = torch.tensor([0], device=DEVICE)
    decode_attention(q, k, k, layout, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, k, layout, step)
    for i in range(24):
        step.fill_(i)
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, k, layout, i))


@ON_GPU
def test_new_lengths_compile_nothing():
    """Fifty random lengths after one call per size class: not one new kernel."""
    from triton_ops import backward, decode, forward, small

    kernels = [
        forward._forward_kernel, backward._dq_kernel, backward._dkdv_kernel,
        small._small_forward_kernel, small._small_backward_kernel, decode._decode_kernel,
    ]  # fmt: skip

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    layout = AttentionLayout.from_keep_mask(torch.rand(2, 600, 600, device=DEVICE) < 0.5)

    def call(size, batch):
        x = torch.randn(size, batch, 2, 32, device=DEVICE, dtype=torch.bfloat16).permute(1, 2, 0, 3).requires_grad_()
        lengths = torch.randint(0, size + 1, (batch,), device=DEVICE)
        for options in (dict(), dict(q_lengths=lengths, causal=True)):
            out = block_sparse_attention(x, x, x, layout, k_lengths=lengths, dropout_p=0.1, **options)
            out.sum().backward()
        cache = torch.randn(batch, 3, 2, size, 32, device=DEVICE, dtype=torch.bfloat16)
        decode_attention(cache[:, :, :, 0], cache, cache, layout, size - 1, k_lengths=lengths)
        pool = cache.transpose(2, 3).flatten(0, 2)
        rows = torch.zeros(batch, 3, size, dtype=torch.int32, device=DEVICE)
        offsets = torch.zeros(2, size, dtype=torch.int32, device=DEVICE)
        starts = torch.zeros(batch, 2, dtype=torch.int64, device=DEVICE)
        for tables in (
            dict(block_table=rows),
            dict(block_table=rows, cache_offsets=offsets),
            dict(cache_starts=starts[:, 0].contiguous()),
            dict(cache_starts=starts, cache_offsets=offsets),
        ):
            kv = pool[:, 0] if "cache_offsets" in tables else pool
            decode_attention(cache[:, :, :, 0], kv, kv, layout, size - 1, k_lengths=lengths, **tables)

    for size in (20, 50, 100, 300):
        call(size, 3)
    before = compiled()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        call(int(torch.randint(1, 601, (), generator=generator)), int(torch.randint(1, 9, (), generator=generator)))
    assert before > 0 and compiled() == before


def refused(error, message, size=8, **change):
    layout, (q, k, v) = problem(size)
    arguments = dict(q=q, k=k, v=v, layout=layout, backend="triton") | change
    with pytest.raises(error, match=message):
        block_sparse_attention(**arguments)


def test_bad_arguments_are_refused_with_both_values():
    layout, (q, k, v) = problem(8)
    refused(ValueError, r"\(2, 2, Tk, 16\).*\(2, 3, 8, 16\)", k=torch.zeros(2, 3, 8, 16, device=DEVICE))
    refused(ValueError, r"\(2, 2, 8, 16\).*\(2, 2, 7, 16\)", v=v[:, :, :7])
    refused(ValueError, r"\(2, 8, 16\)", q=q[0])
    refused(TypeError, "float32, torch.float16", k=k.half())
    refused(ValueError, "13 x 13.*14 x 8", q=torch.zeros(2, 2, 14, 16, device=DEVICE))
    three_heads = torch.zeros(2, 3, 8, 16, device=DEVICE)
    refused(ValueError, "2 heads.*has 3", **dict.fromkeys("qkv", three_heads))
    refused(ValueError, r"\(2,\).*\(3,\)", q_lengths=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    refused(TypeError, "float32", k_lengths=torch.zeros(2, device=DEVICE))
    refused(ValueError, r"\[0, 1\).*1\.0", dropout_p=1.0)
    refused(ValueError, "-0.5", scale=-0.5)
    refused(ValueError, "'fastest'.*auto, triton, sdpa", backend="fastest")
    refused(TypeError, "'5'", dropout_p=0.1, seed="5")
    refused(
        TypeError,
        "float64, got torch.int64",
        backend="sdpa",
        **{n: x.detach().long() for n, x in zip("qkv", (q, k, v), strict=True)},
    )
    refused(ValueError, "int32", dropout_p=0.1, seed=torch.tensor([1], dtype=torch.int32, device=DEVICE))
    refused(ValueError, "float64", **{n: x.double() for n, x in zip("qkv", (q, k, v), strict=True)})
    odd_size = torch.zeros(2, 2, 8, 24, device=DEVICE)
    refused(ValueError, "head size 24.*16, 32, 64, 96, 128", **dict.fromkeys("qkv", odd_size))
    refused(ValueError, rf"layout is on meta.*q is on {q.device}", layout=layout.to("meta"))


@pytest.mark.skipif(
    DEVICE == "cuda", reason="checks on the CPU: run with CUDA_VISIBLE_DEVICES= (on a GPU lengths are clamped)"
)
def test_lengths_beyond_the_tensor_are_refused():
    refused(ValueError, r"k_lengths.*\[0, 8\].*from 3 to 9", k_lengths=torch.tensor([3, 9]))
    refused(ValueError, r"q_lengths.*\[0, 8\].*from -1 to 8", q_lengths=torch.tensor([-1, 8]))


@ON_GPU
def test_lengths_beyond_the_tensor_are_clamped_on_a_gpu():
    layout, (q, k, v) = problem(132, requires_grad=False)
    wild, tame = torch.tensor([10**6, -5], device=DEVICE), torch.tensor([132, 0], device=DEVICE)
    results = [block_sparse_attention(q, k, v, layout, q_lengths=n, k_lengths=n) for n in (wild, tame)]
    assert torch.equal(*results)


@ON_GPU
def test_auto_takes_sdpa_for_what_the_kernels_do_not_take():
    layout, (q, k, v) = problem(8)
    x = [t.double() for t in (q, k, v)]
    assert torch.equal(block_sparse_attention(*x, layout), block_sparse_attention(*x, layout, backend="sdpa"))


@pytest.mark.skipif(DEVICE == "cuda" or not INTERPRETED, reason="about CPU tensors: run with CUDA_VISIBLE_DEVICES=")
def test_triton_on_cpu_tensors_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr("triton_ops.config.INTERPRETED", False)
    refused(ValueError, "cpu.*TRITON_INTERPRET=1")
