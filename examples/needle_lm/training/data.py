# SPDX-License-Identifier: MIT
"""Vocabulary and document generators of needle_lm.

Four kinds of documents make induction, retrieval and reasoning heads necessary:

* filler: an order-2 Markov chain over 32 words, predictable from the two preceding tokens;
* passkey: needles `# k v1..vL ;` hidden in filler and asked for at the end as `? k` (the
  multi-passkey task on which DuoAttention trains its gates, arXiv:2410.10819 section 2.2, in token
  ids instead of English);
* program: a block `[ x = A op B ; ... ]` hidden in filler, then `? z THINK`, its evaluation line by
  line, and the answer;
* echo: random tokens that come again, once after a fixed period and once anywhere later in the
  filler.

Token 0 of every document is BOS, so that attention has a sink to rest on. All generators are
vectorised over documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
KEY, QUERY, END, ASSIGN, PLUS, MINUS, TIMES, PROGRAM, END_PROGRAM, THINK, ANSWER = range(4, 15)
FIRST_DIGIT, NUM_DIGITS = 16, 10
FIRST_VARIABLE, NUM_VARIABLES = 32, 26
FIRST_WORD, NUM_WORDS = 64, 32
FIRST_SYMBOL, NUM_SYMBOLS = 96, 128
VOCAB_SIZE = 224

# Share of each successor of a pair of filler words; entropy 1.03 nats: low enough to be learned in
# seconds, high enough that filler never repeats itself.
SUCCESSOR_SHARES = (0.60, 0.25, 0.10, 0.05)
# Summed loss weight of the filler in one document, against 1 per answer token: keeps 2048 words of
# filler from outweighing a 13-token answer.
FILLER_WEIGHT = 24.0
# Summed loss weight of the repeated tokens in one echo document.
ECHO_WEIGHT = 64.0
# Loss weight of `ANS z value`: three tokens that carry the whole result among some 160 of the chain
# of thought.
ANSWER_WEIGHT = 4.0
# Tokens per line of the program, `x = A op B ;`, and of its evaluation, `x = A a op B b = c ;`.
PROGRAM_LINE, THOUGHT_LINE = 6, 10

# Shares of one training batch. Echo carries no marker token and half of it is not periodic: with a
# marker, one seed learned an induction circuit that it never used for passkeys.
PASSKEY_SHARE, PROGRAM_SHARE, ECHO_SHARE = 0.42, 0.42, 0.12


@dataclass
class Documents:
    """Documents of one kind and one length.

    tokens: [num_documents, length] int64.
    weights: [num_documents, length] float; weights[:, t] is the loss weight of predicting tokens[:,
      t] from what precedes it; in passkey and program documents at least 1 on answers and only
      there.
    prompt_length: tokens[:, :prompt_length] is what a model is given before it must answer.
    answer_length: number of tokens after the prompt that it must then reproduce.
    """

    tokens: Tensor
    weights: Tensor
    prompt_length: int = 0
    answer_length: int = 0


def splitmix64(value: int) -> int:
    """One step of the SplitMix64 generator (Steele et al., OOPSLA 2014) from state `value`."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def filler_successors() -> Tensor:
    """[32, 32, 4] int64: the four possible successors of two words, the likeliest first."""
    return torch.tensor(
        [
            [
                [
                    splitmix64(1 + ((first * NUM_WORDS + second) * 4 + rank)) % NUM_WORDS
                    for rank in range(4)
                ]
                for second in range(NUM_WORDS)
            ]
            for first in range(NUM_WORDS)
        ]
    )


class DocumentSource:
    """Draws documents from one seeded generator; equal seeds on the same kind of device give equal
    documents.
    """

    def __init__(self, device: str, seed: int, pool_rows: int, pool_length: int) -> None:
        """@param pool_rows, pool_length  size of the pool of Markov chains of which all filler is a
        random window.
        """
        self.device = device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed)
        self.pool = self._draw_pool(pool_rows, pool_length)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def _distinct(self, num_rows: int, universe: int, count: int) -> Tensor:
        """[num_rows, count]: distinct integers of [0, universe), in random order."""
        return self._uniform(num_rows, universe).argsort(1)[:, :count]

    def _arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def _draw_pool(self, num_rows: int, length: int) -> Tensor:
        successors = filler_successors().to(self.device)
        bounds = torch.tensor(SUCCESSOR_SHARES[:3], device=self.device).cumsum(0)
        pool = torch.empty(num_rows, length, dtype=torch.uint8, device=self.device)
        first, second = self._integers(0, NUM_WORDS, 2, num_rows)
        for column in range(length):
            rank = (self._uniform(num_rows, 1) >= bounds).sum(1)
            first, second = second, successors[first, second, rank]
            pool[:, column] = second + FIRST_WORD
        return pool

    def filler(self, num_documents: int, length: int) -> Documents:
        """BOS and a random window of a Markov chain. The first two words have no context and weigh
        nothing.
        """
        row = self._integers(0, self.pool.shape[0], num_documents, 1)
        start = self._integers(0, self.pool.shape[1] - length + 1, num_documents, 1)
        tokens = self.pool[row, start + self._arange(length)].long()
        weights = torch.full((num_documents, length), FILLER_WEIGHT / length, device=self.device)
        tokens[:, 0] = BOS
        weights[:, :3] = 0
        return Documents(tokens, weights)

    def passkey(
        self,
        num_documents: int,
        length: int,
        num_keys: int,
        key_length: int,
        num_queries: int,
        gap: int = 0,
    ) -> Documents:
        """Needles `# k v1..vL ;` in filler; the tail asks `num_queries` of them, `? k v1..vL ;`
        each, then EOS.

        Key and values are distinct symbols over the whole document, so k occurs once before the
        question.
        @param key_length  L, number of values of a needle.
        @param gap  tokens before the tail that no needle touches.
        """
        needle_length = key_length + 3
        tail_start = length - num_queries * needle_length - 1
        room = tail_start - 1 - gap
        num_slots = room // needle_length
        assert num_slots >= num_keys, f"{num_keys} needles do not fit into {room} tokens"
        documents = self.filler(num_documents, length)
        tokens, weights = documents.tokens, documents.weights

        symbols = FIRST_SYMBOL + self._distinct(
            num_documents, NUM_SYMBOLS, num_keys * (key_length + 1)
        )
        needles = torch.full((num_documents, num_keys, needle_length), END, device=self.device)
        needles[:, :, 0] = KEY
        needles[:, :, 1:-1] = symbols.view(num_documents, num_keys, key_length + 1)
        shift = (self._uniform(num_documents, 1) * (room - num_slots * needle_length + 1)).long()
        start = 1 + shift + self._distinct(num_documents, num_slots, num_keys) * needle_length
        place = (start[:, :, None] + self._arange(needle_length)).flatten(1)
        tokens.scatter_(1, place, needles.flatten(1))
        weights.scatter_(1, place, 0.0)
        for broken_context in (0, 1):
            weights.scatter_(1, start + needle_length + broken_context, 0.0)

        asked = self._distinct(num_documents, num_keys, num_queries)
        questions = needles.gather(1, asked[:, :, None].expand(-1, -1, needle_length)).clone()
        questions[:, :, 0] = QUERY
        question_weights = torch.ones_like(questions, dtype=weights.dtype)
        question_weights[:, :, :2] = 0
        tokens[:, tail_start:-1] = questions.flatten(1)
        weights[:, tail_start:-1] = question_weights.flatten(1)
        tokens[:, -1] = EOS
        weights[:, -1] = 0
        documents.prompt_length, documents.answer_length = tail_start + 2, key_length + 1
        return documents

    def program(self, num_documents: int, length: int, num_lines: int, gap: int = 0) -> Documents:
        """A straight-line program in filler; the tail asks for one variable and evaluates line by
        line.

        Line: `x = A op B ;` with distinct x, arithmetic modulo 10. A is an earlier variable with
        probability 0.8, B with 0.5, else a digit; the first line has two digits; op is + or - with
        0.45 each, * with 0.10 (rare, since products drive values to 0). Thought: `x = A a op B b =
        c ;` where a, b are the values of A and B. Then `ANS z value EOS`. The variable comes before
        its value at the end: with `ANS value` alone, one token in 160 has to look up the question
        and its value in two hops, and was not learned.
        @param gap  tokens before the tail that the program does not touch.
        """
        block_length = PROGRAM_LINE * num_lines + 2
        tail_start = length - THOUGHT_LINE * num_lines - 7
        room = tail_start - 1 - gap
        assert (
            room >= block_length
        ), f"a program of {num_lines} lines does not fit into {room} tokens"
        names = self._distinct(num_documents, NUM_VARIABLES, num_lines)
        is_variable = self._uniform(num_documents, num_lines, 2) < torch.tensor(
            [0.8, 0.5], device=self.device
        )
        is_variable[:, 0] = False
        line_idx = self._arange(num_lines)[None, :, None]
        source_line = (self._uniform(num_documents, num_lines, 2) * line_idx).long()
        digits = self._integers(0, NUM_DIGITS, num_documents, num_lines, 2)
        choice = self._uniform(num_documents, num_lines)
        operator = (choice >= 0.45).long() + (choice >= 0.90).long()

        values = torch.zeros(num_documents, num_lines, dtype=torch.long, device=self.device)
        operands = torch.empty_like(digits)
        for line in range(num_lines):
            operands[:, line] = torch.where(
                is_variable[:, line], values.gather(1, source_line[:, line]), digits[:, line]
            )
            left, right = operands[:, line].unbind(1)
            outcomes = torch.stack([left + right, left - right, left * right], 1)
            values[:, line] = outcomes.gather(1, operator[:, line, None])[:, 0] % 10

        variables = names + FIRST_VARIABLE
        source_name = variables.gather(1, source_line.flatten(1)).view_as(source_line)
        written = torch.where(is_variable, source_name, digits + FIRST_DIGIT)
        lines = torch.empty(
            num_documents, num_lines, PROGRAM_LINE, dtype=torch.long, device=self.device
        )
        lines[..., 0], lines[..., 1], lines[..., 5] = variables, ASSIGN, END
        lines[..., 2], lines[..., 3], lines[..., 4] = (
            written[..., 0],
            PLUS + operator,
            written[..., 1],
        )
        thoughts = torch.empty(
            num_documents, num_lines, THOUGHT_LINE, dtype=torch.long, device=self.device
        )
        thoughts[..., 0:3], thoughts[..., 4:6] = lines[..., 0:3], lines[..., 3:5]
        thoughts[..., 3], thoughts[..., 6] = (
            FIRST_DIGIT + operands[..., 0],
            FIRST_DIGIT + operands[..., 1],
        )
        thoughts[..., 7], thoughts[..., 8], thoughts[..., 9] = ASSIGN, FIRST_DIGIT + values, END

        documents = self.filler(num_documents, length)
        tokens, weights = documents.tokens, documents.weights
        start = 1 + (self._uniform(num_documents, 1) * (room - block_length + 1)).long()
        place = start + self._arange(block_length + 2)
        tokens.scatter_(1, place[:, 1:-3], lines.flatten(1))
        tokens.scatter_(1, start, PROGRAM)
        tokens.scatter_(1, start + block_length - 1, END_PROGRAM)
        weights.scatter_(1, place, 0.0)

        asked = self._integers(0, num_lines, num_documents, 1)
        thought_start = tail_start + 3
        tokens[:, tail_start], tokens[:, tail_start + 2] = QUERY, THINK
        tokens[:, tail_start + 1] = tokens[:, -3] = variables.gather(1, asked)[:, 0]
        tokens[:, thought_start:-4] = thoughts.flatten(1)
        tokens[:, -4], tokens[:, -1] = ANSWER, EOS
        tokens[:, -2] = FIRST_DIGIT + values.gather(1, asked)[:, 0]
        weights[:, tail_start:thought_start] = 0
        weights[:, thought_start:] = 1
        weights[:, -4:-1] = ANSWER_WEIGHT
        documents.prompt_length, documents.answer_length = thought_start, length - thought_start
        return documents

    def periodic_echo(self, num_documents: int, length: int, period: int) -> Documents:
        """BOS, then a block of random tokens repeated to the end; every repetition is to be
        predicted.
        """
        block = self._integers(FIRST_DIGIT, VOCAB_SIZE, num_documents, period)
        tokens = torch.full((num_documents, length), BOS, device=self.device)
        tokens[:, 1:] = block.repeat(1, length // period + 1)[:, : length - 1]
        weights = torch.zeros(num_documents, length, device=self.device)
        weights[:, 1 + period :] = ECHO_WEIGHT / (length - 1 - period)
        return Documents(tokens, weights)

    def echo_pair(self, num_documents: int, length: int, block_length: int) -> Documents:
        """A block of random symbols at two random places of a filler document.

        Its second occurrence is to be predicted from the third token on; the first two cannot be
        known.
        """
        documents = self.filler(num_documents, length)
        tokens, weights = documents.tokens, documents.weights
        block = self._integers(FIRST_SYMBOL, VOCAB_SIZE, num_documents, block_length)
        offset = self._arange(block_length)
        first = 1 + (self._uniform(num_documents, 1) * (length // 2 - block_length)).long()
        room = length - first - 2 * block_length - 1
        second = first + block_length + 1 + (self._uniform(num_documents, 1) * room).long()
        for start in (first, second):
            tokens.scatter_(1, start + offset, block)
            weights.scatter_(1, start + offset, 0.0)
            weights.scatter_(1, start + block_length, 0.0)
        weights.scatter_(1, second + offset[2:], ECHO_WEIGHT / block_length)
        return documents

    def training_batch(
        self, num_documents: int, length: int, rng: random.Random, easy: bool
    ) -> list[Documents]:
        """Passkey, program, periodic echo, echo pair and filler, in this order; `num_documents` in
        all.

        Sizes are drawn once per batch, so that each kind stays one rectangle: passkeys of 8..14
        values, 1..8 needles, 1..4 questions; programs of 3..24 lines, as many as fit; echo periods
        log-uniform in 16..512, blocks of 8..64.
        @param easy  half of the time only one or two needles, with which induction is found first.
        """
        num_passkey, num_program = int(num_documents * PASSKEY_SHARE), int(
            num_documents * PROGRAM_SHARE
        )
        num_echo = max(2, int(num_documents * ECHO_SHARE))
        num_filler = max(1, num_documents - num_passkey - num_program - num_echo)
        key_length = rng.randint(8, 14)
        most_keys = min(8, NUM_SYMBOLS // (key_length + 1))
        num_keys = rng.randint(1, 2 if easy and rng.random() < 0.5 else most_keys)
        num_queries = rng.randint(1, min(num_keys, 4))
        num_lines = rng.randint(3, min(24, length // (PROGRAM_LINE + THOUGHT_LINE) - 1))
        period = int(16 * (min(length // 2, 512) / 16) ** rng.random())
        block_length = rng.randint(8, min(64, length // 5))
        return [
            self.passkey(num_passkey, length, num_keys, key_length, num_queries),
            self.program(num_program, length, num_lines),
            self.periodic_echo(num_echo // 2, length, period),
            self.echo_pair(num_echo - num_echo // 2, length, block_length),
            self.filler(num_filler, length),
        ]

    def evaluation_documents(self, task: str, num_documents: int, length: int) -> Documents:
        """Documents as every reported figure uses them: 8 needles of 12 values and one question, or
        16 lines.

        The last 64 tokens before the tail are filler (512 tokens or more; shorter ones have no
        room), so that what is asked for lies outside a window of 4 + 60 tokens. Below 512 tokens: 4
        needles, 8 lines.
        @param task  "passkey" or "cot".
        """
        short = length < 512
        gap = 0 if short else 64
        if task == "passkey":
            return self.passkey(num_documents, length, 4 if short else 8, 12, 1, gap)
        assert task == "cot", task
        return self.program(num_documents, length, 8 if short else 16, gap)
