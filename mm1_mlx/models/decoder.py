"""The language model: dense, or with experts in some layers."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import DecoderConfig
from mm1_mlx.kernels.add_norm import add_norm
from mm1_mlx.kernels.metal import chosen
from mm1_mlx.models.cache import KVCache, QuantizedKVCache, claim, make_cache
from mm1_mlx.models.layers import (
    MLP,
    Attention,
    Mask,
    RotaryEmbedding,
    head_turns,
    norm,
)
from mm1_mlx.models.moe import MoE
from mm1_mlx.models.walk import LayerWalk


class DecoderLayer(nn.Module):
    """A pre-norm block: attention, then an MLP or experts. (B, L, D) -> (B, L, D).

    parallel_block: both read the same norm and are added together (Phi-2). last_only:
    compute the last position alone, (B, 1, D); all are still stored in the cache. rows:
    give these flat places alone, (M,) -> (M, D). turns: see Attention.
    """

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        c = config
        rope = RotaryEmbedding(c.rotary_dims, c.rope_theta, c.rope_scaling)
        self.norm1 = norm(c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        self.attn = Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.size_per_head,
            num_kv_heads=c.kv_heads,
            qkv_bias=c.qkv_bias,
            out_bias=c.attention_out_bias,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            rope=rope,
        )
        self._parallel = c.parallel_block
        if not c.parallel_block:
            self.norm2 = norm(c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        if c.is_sparse(index):
            self.moe = MoE(c)
        else:
            self.mlp = MLP(
                c.hidden_size,
                c.intermediate_size,
                c.hidden_act,
                gated=c.gated_mlp,
                bias=c.mlp_bias,
            )

    def __call__(
        self,
        x: mx.array,
        mask: Mask = None,
        cache=None,
        positions: mx.array | None = None,
        router_outputs: list | None = None,
        is_token: mx.array | None = None,
        last_only: bool = False,
        rows: mx.array | None = None,
        turns: mx.array | None = None,
    ) -> mx.array:
        h = self.norm1(x) if self._parallel else x
        # With experts all tokens go on: they balance over all.
        few = None if "moe" in self else rows
        before = None if self._parallel else self.norm1
        if last_only and x.shape[1] > 1:
            x = x[:, -1:]
            is_token = None if is_token is None else is_token[:, -1:]
        if few is not None:
            x = _at(x, few)
        x = self.attn(
            h, mask, cache, positions, last_only, before, few, residual=x, turns=turns
        )
        if self._parallel:
            h = h[:, -1:] if last_only else h
            h = h if few is None else _at(h, few)
            x = self._feed_forward(h, None, x, router_outputs, is_token)
        else:
            x = self._feed_forward(x, self.norm2, x, router_outputs, is_token)
        return x if rows is None or few is rows else _at(x, rows)

    def carry(
        self,
        x: mx.array,
        delta: mx.array | None,
        mask: Mask,
        cache,
        turns: mx.array | None,
        last_only: bool,
    ) -> tuple[mx.array, mx.array]:
        """The same to answer, with the layer's last sum left to the next norm.

        x + delta goes in, as x alone where delta is None, and so they come out: each
        sum and the norm of it are one launch, see kernels.add_norm.
        """
        x, h = (x, self.norm1(x)) if delta is None else add_norm(x, delta, self.norm1)
        delta = self.attn(h, mask, cache, None, last_only, turns=turns)
        if last_only:
            x = x[:, -1:]
        x, h = add_norm(x, delta, self.norm2)
        return x, self.moe(h) if "moe" in self else self.mlp(h)

    def _feed_forward(
        self,
        x: mx.array,
        before: nn.Module | None,
        residual: mx.array,
        router_outputs: list | None,
        is_token: mx.array | None,
    ) -> mx.array:
        if "moe" not in self:
            return self.mlp(x, before, residual)
        x = x if before is None else before(x)
        return self.moe(x, router_outputs, is_token, residual)


def _at(x: mx.array, rows: mx.array) -> mx.array:
    """Flat places of states. (B, L, D), (M,) -> (M, D)."""
    return x.reshape(-1, x.shape[-1])[rows]


class Decoder(nn.Module):
    """Tokens, or embeddings, to next-token logits.

    Keeps mlx-lm's contract (`decoder(inputs, cache=None, input_embeddings=None)`,
    `.layers`, `make_cache()`), so its generate_step can drive it.

    Shapes:
        inputs: (B, L) token ids; ignored where input_embeddings is given
        input_embeddings: (B, L, D)
        cache: one entry per layer, from make_cache, or None
        mask: None for the causal mask, or bool (B, 1, L, L), True where seen
        positions: (B, L) when rows are packed; None counts from the cache's offset
        router_outputs: a list that receives (logits, experts) of each sparse layer
        is_token: (B, L) bool, False on padding, which then takes no expert's place
            where moe_config.capacity_factor limits them in training; None: all
        last_only: compute the last position alone, which is all that generation asks
            of a prompt: the last layer then runs its MLP or experts on it alone
        walk: of a training step, which has no cache
        rows: (M,) flat places of (B, L) that are asked for, as a loss does, which has
            no target for pictures and questions: a last layer without experts then
            runs its MLP on them alone (experts balance over all tokens)
        returns: (B, L, V) float32, or (B, 1, V), or (M, V)
    """

    adapter: Any = None  # the mark of the one in use; caches remember it

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.group: mx.distributed.Group | None = None  # see models.sharding
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c, i) for i in range(c.num_hidden_layers)]
        self.norm = norm(c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=c.lm_head_bias)

    def __call__(
        self,
        inputs: mx.array | None,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
        **settings,
    ) -> mx.array:
        return self.head(self.hidden(inputs, cache, input_embeddings, **settings))

    def hidden(
        self,
        inputs: mx.array | None,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
        *,
        mask: Mask = None,
        positions: mx.array | None = None,
        router_outputs: list | None = None,
        is_token: mx.array | None = None,
        last_only: bool = False,
        walk: LayerWalk | None = None,
        rows: mx.array | None = None,
    ) -> mx.array:
        """The states that `head` turns into logits, after the last norm. (B, L, D)."""
        if cache is not None:
            claim(cache, self.adapter)
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches = cache if cache is not None else [None] * len(self.layers)
        if mask is None:
            mask = _causal_mask(x.shape[1], caches[0])
        end = len(self.layers) - 1
        if walk is not None:
            x = self._walk(walk, x, mask, positions, router_outputs, is_token, rows)
            return self.norm(x)
        turns = None
        if cache is not None and x.shape[1] == 1 and positions is None:
            turns = self._turns(x.shape[0], caches[0])
        if cache is not None and chosen("add_norm"):
            plain = positions is None and router_outputs is None and rows is None
            if plain and not self.training and not self.config.parallel_block:
                return self._carry(x, mask, caches, turns, last_only)
        for i, (layer, entry) in enumerate(zip(self.layers, caches, strict=True)):
            short, few = last_only and i == end, rows if i == end else None
            x = layer(
                x, mask, entry, positions, router_outputs, is_token, short, few, turns
            )
        return self.norm(x)

    def _carry(
        self,
        x: mx.array,
        mask: Mask,
        caches: list,
        turns: mx.array | None,
        last_only: bool,
    ) -> mx.array:
        """`hidden` to answer, where a sum and a norm are one kernel."""
        delta, end = None, len(self.layers) - 1
        for i, (layer, entry) in enumerate(zip(self.layers, caches, strict=True)):
            short = last_only and i == end
            x, delta = layer.carry(x, delta, mask, entry, turns, short)
        assert delta is not None
        return add_norm(x, delta, self.norm)[1]

    def _turns(self, rows: int, cache) -> mx.array:
        """How far each head of the next token turns, the same in every layer."""
        attn = self.layers[0].attn
        heads = attn.num_heads + 2 * attn.num_kv_heads
        offset = getattr(cache, "positions", cache.offset)
        return head_turns(offset, rows, heads, attn.num_kv_heads)

    def _walk(
        self,
        walk: LayerWalk,
        x: mx.array,
        mask: Mask,
        positions: mx.array | None,
        router_outputs: list | None,
        is_token: mx.array | None,
        rows: mx.array | None,
    ) -> mx.array:
        x = walk.mark("decoder.embeddings", x)
        for i, layer in enumerate(self.layers):
            few = rows if i == len(self.layers) - 1 else None

            def run(x: mx.array, routed: list, layer=layer, few=few) -> mx.array:
                return layer(x, mask, None, positions, routed, is_token, rows=few)

            x = walk.through(f"decoder.layers.{i}", layer, x, run, router_outputs)
        return x

    def head(self, hidden: mx.array) -> mx.array:
        """Logits of the given states, in float32. (..., D) -> (..., V)."""
        if self.config.tie_word_embeddings:
            logits = self.embed_tokens.as_linear(hidden)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(mx.float32)

    def make_cache(self, **settings) -> list[KVCache] | list[QuantizedKVCache]:
        """An empty cache entry per layer; settings as cache.make_cache."""
        return make_cache(len(self.layers), **settings)


def _causal_mask(length: int, cache) -> Mask:
    if cache is None:
        return "causal" if length > 1 else None
    # Spelt out because mlx-lm's caches, which fit too, have no defaults for these.
    return cache.make_mask(length, return_array=False, window_size=None)
