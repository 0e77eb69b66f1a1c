# SPDX-License-Identifier: MIT
"""Which KV heads matter: DuoAttention gates, RLKV-like gates, RazorAttention scores, and the table
that compares them.

All scores are [num_layers, num_kv_heads] fp32 tensors on the CPU, in [0, 1], higher = keep.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import ANSWER, EOS, Documents, DocumentSource
from training.model import (
    BatchDecoder,
    NeedleLm,
    Window,
    full_attention,
    mixed_attention,
    per_query_head,
)

Log = Callable[[str], None]


def autocast(model: NeedleLm) -> torch.autocast:
    """bf16 matrix products on CUDA, fp32 elsewhere."""
    device = model.embed_tokens.weight.device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def trapezoid(step: int, num_steps: int, num_warmup: int) -> float:
    """Learning-rate factor: linear up over `num_warmup` steps, flat, linear down over the last 30 %
    of the steps.
    """
    return min(1.0, (step + 1) / num_warmup, (num_steps - step) / (0.3 * num_steps))


@dataclass(frozen=True)
class DuoSettings:
    """Chosen in short runs on this model; the paper's figures (2000 steps, lr 0.02, weight 0.05)
    are for 8 B parameters.
    """

    num_steps: int = 200
    num_documents: int = 16
    length: int = 1024
    learning_rate: float = 0.03
    # One run leaves ties at exactly 0 and 1; a path from a weak to a strong pull towards 0 orders
    # the heads.
    regularisation_path: tuple[float, ...] = (0.05, 0.2, 0.8)
    # Heads that end at 0 on the whole path are ordered by how long they resisted. Too small to
    # reorder others.
    tie_break: float = 1e-3


def train_duo_gates(
    model: NeedleLm,
    source: DocumentSource,
    regularisation: float,
    settings: DuoSettings,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Gates of one DuoAttention run on passkey documents: (final, mean over steps).

    Loss: distance of the final hidden states between full and mixed attention over answer tokens,
    plus regularisation * mean gate (arXiv:2410.10819, eq. 1 and 2). We differ by dividing the
    distance by the energy of the full model's states, which makes the two terms comparable, and by
    taking both attention terms from the mixed stream.
    """
    config, device = model.config, source.device
    gates = torch.ones(config.num_layers, config.num_kv_heads, device=device, requires_grad=True)
    average = torch.zeros_like(gates)
    optimiser = torch.optim.Adam([gates], betas=(0.9, 0.99))
    rng = random.Random(0)
    for step in range(settings.num_steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * trapezoid(
            step, settings.num_steps, 20
        )
        documents = source.passkey(
            settings.num_documents,
            settings.length + 1,
            rng.randint(4, 8),
            rng.randint(8, 13),
            num_queries=4,
            gap=64,
        )
        tokens, is_answer = documents.tokens[:, :-1], (documents.weights[:, 1:] >= 1)[..., None]
        with autocast(model):
            with torch.no_grad():
                full = model.hidden_states(tokens, full_attention).float()
            mixed = model.hidden_states(tokens, mixed_attention(gates, window)).float()
        distance = ((full - mixed).pow(2) * is_answer).sum() / (full.pow(2) * is_answer).sum()
        loss = distance + regularisation * gates.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            average += gates / settings.num_steps
    return gates.detach().cpu(), average.cpu()


def duo_scores(
    model: NeedleLm, source: DocumentSource, settings: DuoSettings, window: Window, log: Log
) -> Tensor:
    """Mean gate over the regularisation path, plus the tie break, rescaled to [0, 1]."""
    total = torch.zeros(model.config.num_layers, model.config.num_kv_heads)
    for regularisation in settings.regularisation_path:
        gates, average = train_duo_gates(model, source, regularisation, settings, window)
        total += gates + settings.tie_break * average
        log(
            f"duo gates at regularisation {regularisation}: mean {gates.mean():.3f}\n"
            f"{gates.numpy().round(2)}"
        )
    return total / (len(settings.regularisation_path) * (1 + settings.tie_break))


@dataclass(frozen=True)
class RlkvSettings:
    """Chosen on this model; prompts are as long and as deep as those of the evaluation at 512
    tokens.
    """

    num_iterations: int = 170
    num_prompts: int = 32
    num_rollouts: int = 8
    length: int = 512
    learning_rate: float = 0.02
    regularisation: float = 0.03
    # Mean reward above which the pull towards 0 acts: tau of arXiv:2510.08525.
    reward_threshold: float = 0.5
    # Ours: in the second half, gate * (1 - gate) pushes gates to 0 or 1, since they will be used as
    # a yes or no.
    binarisation: float = 0.05
    # Weight of the mean over iterations in the score; orders the gates that end at 0.
    average_weight: float = 0.1


def answer_value(generated: Tensor) -> Tensor:
    """[B]: the token after the first `ANS z` in generated tokens [B, N]; -1 where there is none."""
    is_answer = generated == ANSWER
    after = (is_answer.float().argmax(1) + 2).clamp(max=generated.shape[1] - 1)
    value = generated.gather(1, after[:, None])[:, 0]
    return torch.where(is_answer.any(1), value, torch.full_like(value, -1))


def rlkv_scores(
    model: NeedleLm, source: DocumentSource, settings: RlkvSettings, window: Window, log: Log
) -> Tensor:
    """Gates trained by reinforcement on whole chains of thought, rewarded by the final answer
    alone.

    RLKV (arXiv:2510.08525): rollouts under the current gates, advantages normalised within the
    rollouts of a prompt (eq. 3), L1 pull scaled by the mean reward. One update per rollout, so the
    importance ratio is 1 and its clip never acts. We differ in the scale of the pull, (r - tau) /
    (1 - tau) in place of exp(r) - 1, and in the binarisation.
    """
    config, device = model.config, source.device
    num_documents = settings.num_prompts * settings.num_rollouts
    decoder = BatchDecoder(model, num_documents, settings.length, window)
    gates = torch.ones(config.num_layers, config.num_kv_heads, device=device, requires_grad=True)
    average = torch.zeros_like(gates)
    optimiser = torch.optim.Adam([gates], betas=(0.9, 0.97))
    for iteration in range(settings.num_iterations):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * trapezoid(
            iteration, settings.num_iterations, 10
        )
        documents = source.evaluation_documents("cot", settings.num_prompts, settings.length)
        tokens = documents.tokens.repeat_interleave(settings.num_rollouts, 0)
        prompt = tokens[:, : documents.prompt_length]
        generated = decoder.generate(
            prompt, documents.answer_length, gates.detach(), temperature=1.0
        )
        reward = (answer_value(generated) == tokens[:, -2]).float()
        mean_reward = reward.mean().item()

        grouped = reward.view(settings.num_prompts, settings.num_rollouts)
        spread = grouped.std(1, keepdim=True)
        advantage = ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        undecided = (spread > 0).expand_as(grouped).flatten()
        pull = max(0.0, (mean_reward - settings.reward_threshold) / (1 - settings.reward_threshold))
        loss = settings.regularisation * pull * gates.mean()
        if 2 * iteration >= settings.num_iterations:
            loss = loss + settings.binarisation * pull * (gates * (1 - gates)).mean()
        if undecided.any():
            rollouts = torch.cat([prompt, generated], 1)[undecided]
            with autocast(model):
                hidden = model.hidden_states(rollouts[:, :-1], mixed_attention(gates, window))
            logits = model.logits(hidden[:, documents.prompt_length - 1 :].float())
            log_probability = -F.cross_entropy(
                logits.transpose(1, 2), generated[undecided], reduction="none"
            )
            is_end = (generated[undecided] == EOS).long()
            until_end = is_end.cumsum(1) - is_end == 0
            policy = (advantage[undecided, None] * log_probability * until_end).sum()
            loss = loss - policy / (num_documents * documents.answer_length)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            average += gates / settings.num_iterations
        if (iteration + 1) % 20 == 0:
            log(
                f"rlkv iteration {iteration + 1}: reward {mean_reward:.3f}, "
                f"mean gate {gates.mean().item():.3f}"
            )
    final = gates.detach().cpu()
    log(f"rlkv gates: mean {final.mean():.3f}\n{final.numpy().round(2)}")
    return (final + settings.average_weight * average.cpu()) / (1 + settings.average_weight)


@torch.no_grad()
def razor_scores(
    model: NeedleLm,
    source: DocumentSource,
    num_documents: int,
    num_repeats: int = 4,
    period: int = 192,
) -> tuple[Tensor, Tensor]:
    """(induction, echo) scores of RazorAttention (arXiv:2407.15891), as its authors' tool counts
    them.

    BOS and a block of random tokens repeated four times. Per query after the first block: attention
    mass on the tokens that followed earlier copies of it (induction), and on these copies (echo);
    BOS is left out without renormalising. Mean over queries, then the maximum over the query heads
    of a KV head. We differ in the period, 192 in place of 2500, which this model's context does not
    hold.
    """
    config = model.config
    tokens = source.periodic_echo(num_documents, 1 + num_repeats * period, period).tokens
    query = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    key = torch.arange(tokens.shape[1], device=tokens.device)[None]
    counted = (query > period) & (key > 0) & (key < query)
    is_copy = counted & ((query - key) % period == 0)
    is_successor = counted & ((query - key + 1) % period == 0)
    induction = torch.zeros(config.num_layers, config.num_qo_heads)
    echo = torch.zeros_like(induction)

    def attend(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = per_query_head(k, config.group_size), per_query_head(v, config.group_size)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)).masked_fill(
            key > query, -math.inf
        )
        probability = scores.softmax(-1)
        num_queries = num_documents * (num_repeats - 1) * period
        induction[layer_idx] = (probability * is_successor).sum((0, 2, 3)).cpu() / num_queries
        echo[layer_idx] = (probability * is_copy).sum((0, 2, 3)).cpu() / num_queries
        return probability @ v

    model.hidden_states(tokens, attend)
    return tuple(
        score.unflatten(1, (-1, config.group_size)).amax(-1) for score in (induction, echo)
    )


def top_heads(scores: Tensor, num_retrieval: int) -> Tensor:
    """[num_layers, num_kv_heads] bool: the best `num_retrieval` heads; equal scores go to the later
    layer and head.
    """
    order = scores.flatten().argsort(stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[scores.numel() - num_retrieval :]] = True
    return mask.view_as(scores)


def razor_ranking(induction: Tensor, echo: Tensor) -> Tensor:
    """One list from Razor's two: the best echo head first, the rest by induction.

    The paper keeps 1 % of the heads by echo score; of 24 heads that is less than one, here it is
    one.
    """
    ranking = induction.clone()
    ranking.view(-1)[echo.argmax()] += 2
    return ranking


def teacher_forced_exact(model: NeedleLm, documents: Documents) -> float:
    """Share of documents whose every answer token is the argmax given the true tokens before it
    (full attention).

    As answers are deterministic, this is the share that greedy decoding reproduces.
    """
    with torch.no_grad(), autocast(model):
        hidden = model.hidden_states(documents.tokens[:, :-1], full_attention)
        right = model.logits(hidden).argmax(-1) == documents.tokens[:, 1:]
    return (right | (documents.weights[:, 1:] < 1)).all(1).float().mean().item()


@dataclass(frozen=True)
class Accuracy:
    """Shares of documents answered, by greedy generation."""

    passkey: float  # all 13 tokens right
    thought: float  # the whole chain of thought and the answer right, token by token
    answer: float  # the value at the end right (0.1 by guessing)

    def __str__(self) -> str:
        return f"passkey {self.passkey:.3f}  cot {self.thought:.3f}  answer {self.answer:.3f}"


def generation_accuracy(
    decoder: BatchDecoder, tasks: dict[str, Documents], retrieval: Tensor
) -> Accuracy:
    """Generates every document's answer with the given retrieval heads, the others streaming, from
    the first token on.

    @param tasks  "passkey" and "cot".
    @param retrieval  [num_layers, num_kv_heads] bool.
    """
    batch = decoder.tokens.shape[0]
    exact, value_right = {}, {}
    for task, documents in tasks.items():
        exact[task] = value_right[task] = 0.0
        num_documents = len(documents.tokens)
        first, last = documents.prompt_length, documents.prompt_length + documents.answer_length
        for start in range(0, num_documents, batch):
            tokens = documents.tokens[start : start + batch]
            generated = decoder.generate(
                tokens[:, :first], documents.answer_length, retrieval.float(), temperature=0.0
            )
            exact[task] += (generated == tokens[:, first:last]).all(1).sum().item() / num_documents
            value_right[task] += (
                answer_value(generated) == tokens[:, -2]
            ).sum().item() / num_documents
    return Accuracy(exact["passkey"], exact["cot"], value_right["cot"])


def policy_table(
    model: NeedleLm,
    rankings: dict[str, Tensor],
    tasks: dict[str, Documents],
    num_retrieval: tuple[int, ...],
    batch: int,
    window: Window,
    log: Log,
) -> None:
    """Prints passkey and chain-of-thought accuracy of every ranking at every number of retrieval
    heads.

    Random is the mean of four draws; full and all-streaming bound the table. `kv` is the share of K
    and V rows kept at the documents' length.
    """
    config, length = model.config, tasks["cot"].tokens.shape[1]
    num_heads, kept = config.num_layers * config.num_kv_heads, window.sink + window.recent
    shape = (config.num_layers, config.num_kv_heads)
    decoder = BatchDecoder(model, batch, length, window)

    def show(name: str, count: int, results: list[Accuracy]) -> None:
        mean = Accuracy(
            *(
                sum(values) / len(values)
                for values in zip(*((r.passkey, r.thought, r.answer) for r in results))
            )
        )
        share = (count * length + (num_heads - count) * kept) / (num_heads * length)
        log(f"{name:14s} k={count:2d} kv={share:.3f}  {mean}")

    for name, count in (("full", num_heads), ("all-streaming", 0)):
        show(name, count, [generation_accuracy(decoder, tasks, torch.full(shape, count > 0))])
    for count in num_retrieval:
        for name, scores in rankings.items():
            show(name, count, [generation_accuracy(decoder, tasks, top_heads(scores, count))])
        draws = [
            torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)
        ]
        show(
            "random",
            count,
            [generation_accuracy(decoder, tasks, top_heads(draw, count)) for draw in draws],
        )
