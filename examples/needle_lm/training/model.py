# SPDX-License-Identifier: MIT
"""The decoder: Llama layers (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) with
replaceable attention.

Parameter names are those of Hugging Face's LlamaForCausalLM without the leading `model.`. Shapes in
docstrings use B documents, T tokens, D = hidden_size, H query heads, K KV heads, d = head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import VOCAB_SIZE

# attend(layer_idx, q, k, v): q [B, H, T, d], k and v [B, K, T, d] after rotation -> [B, H, T, d].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """4.2 million parameters; 24 KV heads, enough for policies to differ, each shared by two query
    heads.
    """

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    num_layers: int = 6
    num_qo_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 640
    # As Llama 3: with 16 rotary pairs, 10000 would leave only 2 that turn by less than 1 rad over
    # 2048 tokens; this leaves 6.
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads


@dataclass(frozen=True)
class Window:
    """What a streaming head sees: query i sees key j iff j <= i and (j < sink or i - j < recent).
    The current token counts.

    4 sinks as StreamingLLM (arXiv:2309.17453); 64 tokens in all, one cache page; `recent` is less
    than the 64 tokens that lie between what is asked for and the question.
    """

    sink: int = 4
    recent: int = 60


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: dimension i turns with i + d/2. x [B, heads, T, d]; cos, sin
    [T, d/2].
    """
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class SelfAttention(nn.Module):
    """The four projections; attention itself is passed to the layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        query_size = config.num_qo_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream [B, T, D] -> q [B, H, T, d], k, v [B, K, T, d]; q and k rotated."""
        attn, normed = self.self_attn, self.input_layernorm(x)
        q = rotate(attn.split_heads(attn.q_proj(normed)), cos, sin)
        k = rotate(attn.split_heads(attn.k_proj(normed)), cos, sin)
        return q, k, attn.split_heads(attn.v_proj(normed))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds the attention output [B, H, T, d] and the MLP to the residual stream [B, T, D]."""
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer with full causal attention: the path that training compiles."""
        q, k, v = self.project(x, cos, sin)
        return self.finish(
            x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )


class NeedleLm(nn.Module):
    """Embedding, layers, final norm; the output projection is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        # theta^(-2i/d) of each rotary pair i (RoFormer, arXiv:2104.09864, eq. 15).
        exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.register_buffer("rotary_frequency", config.rope_theta**-exponent, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of variance 1/fan_in; what writes to the residual stream is scaled down by
        the number of writers.
        """
        # Small, so that tied logits start near 0 (chosen on this model; 1/sqrt(D) = 0.0625 is of
        # the same size).
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        writer_std = (2 * self.config.num_layers * self.config.hidden_size) ** -0.5
        for layer in self.layers:
            nn.init.normal_(layer.self_attn.o_proj.weight, std=writer_std)
            nn.init.normal_(layer.mlp.down_proj.weight, std=writer_std)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [T, d/2] each, of position * frequency for positions [T]."""
        angle = positions.float()[:, None] * self.rotary_frequency
        return angle.cos(), angle.sin()

    def hidden_states(
        self, tokens: Tensor, attend: Attend | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Final normed hidden states [B, T, D] of tokens [B, T].

        @param attend  attention to use; None is full causal attention through the compiled layers.
        @param positions  [T] absolute positions; None counts from 0.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = self.rotation(positions)
        x = self.embed_tokens(tokens)
        for layer_idx, layer in enumerate(self.layers):
            if attend is None:
                x = layer(x, cos, sin)
            else:
                x = layer.finish(x, attend(layer_idx, *layer.project(x, cos, sin)))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocab_size]."""
        return F.linear(hidden, self.embed_tokens.weight)


@lru_cache(maxsize=32)
def streaming_mask(length: int, window: Window, device: torch.device) -> Tensor:
    """[T, T] bool, true where query i (row) sees key j (column) on a streaming head."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    return (key <= query) & ((key < window.sink) | (query - key < window.recent))


def per_query_head(values: Tensor, group_size: int) -> Tensor:
    """Repeats dimension 1 (KV heads) once per query head of the group."""
    return values.repeat_interleave(group_size, 1)


def full_attention(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of every head to everything; an `Attend`."""
    group_size = q.shape[1] // k.shape[1]
    k, v = per_query_head(k, group_size), per_query_head(v, group_size)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mixed_attention(gates: Tensor, window: Window) -> Attend:
    """gate * full + (1 - gate) * streaming attention, per KV head (DuoAttention, arXiv:2410.10819,
    section 2.2).

    Both terms use the same q, k, v, as the paper writes it. Gates of 0 and 1 give exactly the two
    kinds of heads.
    @param gates  [num_layers, num_kv_heads] in [0, 1].
    """

    def attend(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group_size = q.shape[1] // k.shape[1]
        k, v = per_query_head(k, group_size), per_query_head(v, group_size)
        full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = streaming_mask(q.shape[2], window, q.device)
        streaming = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        gate = gates[layer_idx].repeat_interleave(group_size)[:, None, None].to(q.dtype)
        return gate * full + (1 - gate) * streaming

    return attend


class BatchDecoder:
    """Generates for a fixed number of documents at once, with gated heads; on CUDA one decode step
    is a replayed graph.

    Prefill obeys the window rule as decode does. Every row of K and V is kept and masked: this
    measures answers, not memory. Arithmetic is fp32. K and V take 2 * num_layers * B * K *
    max_length * d * 4 bytes.
    """

    def __init__(
        self, model: NeedleLm, num_documents: int, max_length: int, window: Window
    ) -> None:
        config, device = model.config, model.embed_tokens.weight.device
        rows = (config.num_layers, num_documents, config.num_kv_heads, max_length, config.head_dim)
        self.model, self.window = model, window
        self.keys, self.values = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
        self.tokens = torch.zeros(num_documents, max_length, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.gates = torch.ones(config.num_layers, config.num_kv_heads, device=device)
        self.temperature = torch.ones(1, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _sample(self, logits: Tensor) -> None:
        """Writes the token after `position` and advances: Gumbel-max, so that temperature 0 is
        greedy in the same graph.
        """
        uniform = torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)
        choice = (logits - self.temperature * torch.log(-torch.log(uniform))).argmax(-1)
        self.position += 1
        self.tokens.index_copy_(1, self.position, choice[:, None])

    def _prefill(self, prompt: Tensor) -> None:
        length = prompt.shape[1]
        self.tokens[:, :length] = prompt
        mixed = mixed_attention(self.gates, self.window)

        def attend(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer_idx, :, :, :length] = k
            self.values[layer_idx, :, :, :length] = v
            return mixed(layer_idx, q, k, v)

        last = self.model.hidden_states(prompt, attend)[:, -1]
        self.position.fill_(length - 1)
        self._sample(self.model.logits(last))

    def _step(self) -> None:
        """Runs the token at `position` and writes the next one."""
        config, position = self.model.config, self.position
        key_position = torch.arange(self.tokens.shape[1], device=position.device)
        distance = position - key_position
        seen = distance >= 0
        seen_streaming = seen & (
            (key_position < self.window.sink) | (distance < self.window.recent)
        )

        def attend(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer_idx].index_copy_(2, position, k)
            self.values[layer_idx].index_copy_(2, position, v)
            grouped = q.reshape(q.shape[0], config.num_kv_heads, config.group_size, config.head_dim)
            scores = grouped @ self.keys[layer_idx].transpose(-1, -2) / math.sqrt(config.head_dim)
            full = scores.masked_fill(~seen, -math.inf).softmax(-1)
            streaming = scores.masked_fill(~seen_streaming, -math.inf).softmax(-1)
            gate = self.gates[layer_idx][:, None, None]
            return ((gate * full + (1 - gate) * streaming) @ self.values[layer_idx]).reshape(
                q.shape
            )

        token = self.tokens.index_select(1, position)
        self._sample(self.model.logits(self.model.hidden_states(token, attend, position)[:, 0]))

    def _capture(self) -> None:
        """Records one step; it leaves garbage in rows that the next prefill overwrites."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, num_tokens: int, gates: Tensor, temperature: float
    ) -> Tensor:
        """Continues prompt [B, P] by `num_tokens` and returns them, [B, num_tokens].

        @param gates  [num_layers, num_kv_heads] in [0, 1]; 0 and 1 are streaming and retrieval
          heads.
        """
        assert prompt.shape[1] + num_tokens <= self.tokens.shape[1]
        self.gates.copy_(gates)
        self.temperature.fill_(temperature)
        if prompt.is_cuda and self.graph is None:
            self._prefill(prompt)
            self._capture()
        self._prefill(prompt)
        for _ in range(num_tokens - 1):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
        return self.tokens[:, prompt.shape[1] : prompt.shape[1] + num_tokens].clone()
