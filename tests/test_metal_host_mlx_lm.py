"""mlx-lm's own Metal kernels, unchanged, under the host harness."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from helpers import assert_close, assert_equal, need
from metal_host import KernelError, fresh_import, host_kernels, schedules
from metal_host.pytest_glue import needs_host

pytestmark = needs_host

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
STEP = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of values of about 1
SEEDS = schedules(8)[::3]  # each kind of schedule once

floats = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])


def kernels(name: str):
    """A copy of one of mlx-lm's modules, whose kernels run here."""
    need("mlx_lm")
    with host_kernels():
        return fresh_import(f"mlx_lm.kernels.{name}")


def random(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.mark.parametrize("experts", [8, 60])
def test_expert_routing(experts):
    module = kernels("expert_routing")
    logits, bias = random(5, experts), random(experts, seed=1) / 10
    scores = mx.sigmoid(logits * 0.5)
    expected = mx.argsort(-(scores + bias), axis=-1)[:, :3]
    weights = mx.take_along_axis(scores, expected, axis=-1)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-3) * 2.0
    settings = {"multiplier": 0.5, "score_eps": 1e-3, "route_scale": 2.0}
    for seed in SEEDS:
        with host_kernels(seed=seed):
            out = module.expert_routing(logits, bias, top_k=3, **settings)
        assert_equal(out[0], expected)
        assert_close(out[1], weights, atol=1e-6)


@floats
def test_norm_add_norm(dtype):
    module = kernels("norm_add_norm")
    branch, stream = random(3, 300, dtype=dtype), random(3, 300, seed=1)
    alpha, beta = random(300, seed=2), random(300, seed=3)
    norm = nn.RMSNorm(300)
    normed = mx.fast.rms_norm(branch.astype(mx.float32), None, 1e-5)
    expected = alpha * stream + beta * normed.astype(dtype).astype(mx.float32)
    for seed in SEEDS:
        with host_kernels(seed=seed):
            new_stream, out = module.norm_add_norm(
                branch,
                stream,
                alpha=alpha,
                beta=beta,
                post_weight=None,
                post_eps=1e-5,
                next_norm=norm,
            )
        # One value may round to the other side.
        assert_close(new_stream, expected, atol=8 * STEP[dtype])
        reference = mx.fast.rms_norm(new_stream, None, norm.eps)
        assert_close(out, reference, atol=STEP[dtype], rtol=STEP[dtype])


@floats
def test_qk_norm_rope(dtype):
    module = kernels("qk_norm_rope")
    heads, kv_heads, dim, length = 4, 2, 40, 5
    qkvg = random(2, length, 2 * (heads + kv_heads) * dim, dtype=dtype)
    rope = {"traditional": True, "base": 10000.0, "scale": 1.0, "offset": 3}

    def expected(first, count, scale):
        x = qkvg.reshape(2, length, -1, dim)[:, :, first : first + count]
        x = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6) * scale
        return mx.fast.rope(x.swapaxes(1, 2), dim, **rope).swapaxes(1, 2)

    for seed in SEEDS:
        with host_kernels(seed=seed):
            q, k = module.qk_norm_rope(
                qkvg,
                n_heads=heads,
                n_kv_heads=kv_heads,
                head_dim=dim,
                eps=1e-6,
                query_scale=0.5,
                rope_base=10000.0,
                offset=3,
            )
        # Rounded before the rotation too; angles are computed in another order.
        assert_close(q, expected(0, heads, 0.5), atol=5 * STEP[dtype])
        assert_close(k, expected(heads, kv_heads, 1.0), atol=10 * STEP[dtype])


def test_a_kernel_that_reads_strided_inputs():
    """rms_norm_sigmoid_gate asks for inputs as they lie: here a transposed one."""
    module = kernels("rms_norm_sigmoid_gate")
    x = random(2, 5, 3, 40).swapaxes(1, 2)  # (B, H, L, D), and so it comes from sdpa
    gate = random(2, 5, 2 * 3 * 40, seed=1)[..., ::2]
    normed = mx.fast.rms_norm(x, None, 1e-6).swapaxes(1, 2).reshape(2, 5, 120)
    for seed in SEEDS:
        with host_kernels(seed=seed):
            out = module.rms_norm_sigmoid_gate(x, gate, eps=1e-6)
        assert_close(out, normed * mx.sigmoid(gate), atol=2e-6)


def test_post_expert_norm_combine():
    module = kernels("post_expert_norm_combine")
    experts, weights, scale = (
        random(3, 2, 200),
        random(3, 2, seed=1),
        random(200, seed=2),
    )
    normed = mx.fast.rms_norm(experts * scale, None, 1e-6)
    for seed in SEEDS:
        with host_kernels(seed=seed):
            out = module.post_expert_norm_combine(
                experts, weights, norm_weight=scale, eps=1e-6
            )
        assert_close(out, (weights[..., None] * normed).sum(1), atol=4e-6)


def test_the_race_of_the_kl_loss_is_found(monkeypatch):
    """github.com/ml-explore/mlx-lm/issues/1700: training went wrong on real Macs.

    It reads what the threadgroup shares and then rewrites it, with a barrier between
    that orders no memory.
    """
    need("mlx_lm")
    losses = __import__("mlx_lm.tuner.losses", fromlist=["losses"])
    monkeypatch.setattr(losses, "can_run_metal", lambda: True)
    q, p = random(1, 1, 500), random(1, 1, 500, seed=1)
    with host_kernels(lint=False, strict=False) as host:
        kernel = losses._make_kl_forward_kernel()
        kernel(
            inputs=[q, p],
            output_shapes=[(1, 1)],
            output_dtypes=[mx.float32],
            template=[("T", mx.float32), ("V", 500)],
            grid=(1024, 1, 1),
            threadgroup=(1024, 1, 1),
        )
    if "mem_flags::mem_none" not in host.last.source:
        pytest.skip("this mlx-lm has corrected its KL loss")
    races = [finding for finding in host.findings if finding.kind == "race"]
    assert races
    with pytest.raises(KernelError, match=r"race: .* 'shared' unordered"):
        raise KernelError("kl_forward", races)
