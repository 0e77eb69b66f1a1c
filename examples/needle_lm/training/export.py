# SPDX-License-Identifier: MIT
"""Files that the C++ side reads, and reference logits computed without PyTorch.

`ReferenceModel` shares no code with model.py: plain NumPy in float64 from the exported fp16
weights, so that golden logits check the training code as well as the C++ decoder.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

SAFETENSORS_TYPES = {"uint8": "U8", "int32": "I32", "float16": "F16", "float32": "F32"}
PREFILL_CHUNK = 128
# Masked golden logits keep every 8th row of the prompt, to keep the file below 4 MB.
ROW_STRIDE = 8


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """u64 header length (little-endian), JSON header padded with spaces to a multiple of 8 bytes,
    then the tensors.

    Tensors are contiguous, widest type first and by name within a type, so each starts at a
    multiple of its item size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype = SAFETENSORS_TYPES[tensors[name].dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Inverse of `write_safetensors`; trusts the file."""
    content = path.read_bytes()
    (header_length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_length])
    body = content[8 + header_length :]
    types = {label: np.dtype(name) for name, label in SAFETENSORS_TYPES.items()}
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_scores(path: Path, scores: np.ndarray) -> None:
    """The published TSV layout: a line per layer, a tab-separated value per KV head, `%.18e`, LF,
    no header.
    """
    lines = ["\t".join(f"{value:.18e}" for value in layer) for layer in scores.astype(np.float64)]
    path.write_text("\n".join(lines) + "\n", newline="\n")


class ReferenceModel:
    """The decoder in float64. Weights are the exported tensors under their Hugging Face names."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict[str, object]) -> None:
        self.weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
        self.num_layers = int(config["num_hidden_layers"])
        self.num_qo_heads = int(config["num_attention_heads"])
        self.num_kv_heads = int(config["num_key_value_heads"])
        self.head_dim = int(config["head_dim"])
        self.theta = float(config["rope_theta"])
        self.eps = float(config["rms_norm_eps"])

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return (
            x
            / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
            * self.weights[name + ".weight"]
        )

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Half-split rotary embedding as complex multiplication; x [heads, T, d]."""
        half = self.head_dim // 2
        position = np.arange(x.shape[1])[:, None]
        turn = np.exp(1j * position * self.theta ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        """[T, heads * d] -> [heads, T, d]."""
        return x.reshape(len(x), -1, self.head_dim).transpose(1, 0, 2)

    def logits(
        self, tokens: np.ndarray, retrieval: np.ndarray, streaming_mask: np.ndarray
    ) -> np.ndarray:
        """[T, vocab_size] float64.

        @param tokens  [T].
        @param retrieval  [num_layers, num_kv_heads] bool; these heads see everything before and at
          a query.
        @param streaming_mask  [T, T] bool; what the queries (rows) of the other heads see.
        """
        group_size = self.num_qo_heads // self.num_kv_heads
        causal = np.tri(len(tokens), dtype=bool)
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(x, prefix + "input_layernorm")
            q = self._rotate(self._heads(self._linear(normed, prefix + "self_attn.q_proj")))
            k = self._rotate(self._heads(self._linear(normed, prefix + "self_attn.k_proj")))
            v = self._heads(self._linear(normed, prefix + "self_attn.v_proj"))
            outputs = []
            for head in range(self.num_qo_heads):
                kv_head = head // group_size
                visible = causal if retrieval[layer, kv_head] else streaming_mask
                scores = np.where(visible, q[head] @ k[kv_head].T / np.sqrt(self.head_dim), -np.inf)
                weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
                outputs.append(weight / weight.sum(axis=-1, keepdims=True) @ v[kv_head])
            x = x + self._linear(np.concatenate(outputs, axis=-1), prefix + "self_attn.o_proj")
            normed = self._norm(x, prefix + "post_attention_layernorm")
            gate = self._linear(normed, prefix + "mlp.gate_proj")
            up = self._linear(normed, prefix + "mlp.up_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        return self._norm(x, "model.norm") @ self.weights["model.embed_tokens.weight"].T


def windowed_mask(length: int, sink: int, recent: int) -> np.ndarray:
    """[T, T] bool: query i sees key j iff j <= i and (j < sink or i - j < recent)."""
    query, key = np.ogrid[:length, :length]
    return (key <= query) & ((key < sink) | (query - key < recent))


def chunk_causal_mask(length: int, prompt_length: int, sink: int, recent: int) -> np.ndarray:
    """[T, T] bool: the prompt in chunks of PREFILL_CHUNK tokens, then one token at a time by the
    window rule.

    A query of chunk [a, b) sees, of the rows before a, what query a sees by the window rule, and of
    its own chunk everything up to itself (DuoAttention's deployed rule).
    """
    mask = windowed_mask(length, sink, recent)
    query, key = np.ogrid[:prompt_length, :length]
    chunk_start = query // PREFILL_CHUNK * PREFILL_CHUNK
    mask[:prompt_length] = (key <= query) & ((key < sink) | (chunk_start - key < recent))
    return mask


def golden_logits(
    model: ReferenceModel,
    documents: dict[str, tuple[np.ndarray, int, int]],
    retrieval_masks: dict[str, np.ndarray],
    sink: int,
    recent: int,
) -> dict[str, np.ndarray]:
    """Tensors of golden.safetensors; MODEL.md lists them.

    @param documents  name -> (tokens [T], prompt_length, answer_length); both 0 where nothing is
      asked: full logits only.
    @param retrieval_masks  name -> [num_layers, num_kv_heads] bool.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, (tokens, prompt_length, answer_length) in documents.items():
        length = len(tokens)
        everything = np.ones((model.num_layers, model.num_kv_heads), dtype=bool)
        full = model.logits(tokens, everything, np.tri(length, dtype=bool))
        tensors[f"{name}.tokens"] = tokens.astype(np.uint8)
        tensors[f"{name}.logits.full"] = full.astype(np.float32)
        if prompt_length == 0:
            continue
        tensors[f"{name}.prompt_length"] = np.array([prompt_length], dtype=np.int32)
        tensors[f"{name}.answer_length"] = np.array([answer_length], dtype=np.int32)
        rows = np.concatenate(
            [np.arange(0, prompt_length - 1, ROW_STRIDE), np.arange(prompt_length - 1, length)]
        )
        tensors[f"{name}.rows"] = rows.astype(np.int32)
        streaming_masks = {
            "windowed": windowed_mask(length, sink, recent),
            "chunk_causal": chunk_causal_mask(length, prompt_length, sink, recent),
        }
        for mask_name, retrieval in retrieval_masks.items():
            tensors[f"{name}.mask.{mask_name}"] = retrieval.astype(np.uint8)
            for mode, streaming_mask in streaming_masks.items():
                masked = model.logits(tokens, retrieval, streaming_mask)
                tensors[f"{name}.logits.{mask_name}.{mode}"] = masked[rows].astype(np.float32)
    return tensors
