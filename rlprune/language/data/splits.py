"""Token sequences of the four splits: windows of texts, blocks of examples, and mixtures of both.

The test split is read in order from the beginning of its documents, with the strided windows of transformers'
perplexity guide where a stride is set; the others are drawn by a seed: calibration from one end of a document's
shuffled sequences, validation from the other, train from what is left between them, so that the size of one changes no
other. In a mixture every document gives its share of a split's sequences, and its sequences stand among the others' at
even distances.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ...workloads.base import SPLITS
from .answers import Tokens, tokenise
from .blocks import Blocks, make_blocks
from .mixing import apportioned, in_turns, largest_total
from .request import DRAWN, Document, Examples, Mixture, Text, TextRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Target of a token that is context only: the index that torch's cross-entropy leaves out."""
_DRAWN = ("calibration", "validation", "train")


@dataclass(frozen=True)
class TextSplit:
    """Windows of one token stream.

    ``tokens`` (T,) int64; window i is ``tokens[starts[i] : starts[i] + length]`` (the last one may be
    shorter where windows overlap); the first ``overlap`` tokens of every window but the first were scored
    in the window before and are context only. ``source`` names the text. ``answers`` (T,) bool says which tokens
    are scored, None where all are; ``examples`` what they were made of, for reports. ``prompt`` (P,) stands before
    every window, behind a token ``begin`` where the window starts with that; it is context only.
    """

    source: str
    tokens: Tensor
    starts: tuple[int, ...]
    length: int
    overlap: int = 0
    answers: Tensor | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    prompt: Tensor | None = None
    begin: int | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def prompted_length(self) -> int:
        """Tokens in a window with its prompt."""
        return self.length + (0 if self.prompt is None else len(self.prompt))

    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) and targets (B, L) of the windows ``start`` to ``stop``, all of one length."""
        ids, targets = self._window(start, stop)
        return (ids, targets) if self.prompt is None else self._prompted(self.prompt, ids, targets)

    def _prompted(self, prompt: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (B, L) with the prompt (P,) in front, (B, P + L)."""
        context = torch.full_like(prompt, IGNORED)
        rows = []
        for own, wanted in zip(ids, targets, strict=True):
            at = int(self.begin is not None and int(own[0]) == self.begin)
            rows.append(
                (torch.cat([own[:at], prompt, own[at:]]), torch.cat([wanted[:at], context, wanted[at:]]))
            )
        return torch.stack([row for row, _ in rows]), torch.stack([row for _, row in rows])

    def _window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        ids = torch.stack([self.tokens[s : s + self.length] for s in self.starts[start:stop]])
        if self.answers is not None:
            scored = torch.stack([self.answers[s : s + self.length] for s in self.starts[start:stop]])
            return ids, torch.where(scored, ids, IGNORED)
        if not self.overlap:
            return ids, ids
        targets = ids.clone()
        targets[1 if start == 0 else 0 :, : self.overlap] = IGNORED
        return ids, targets

    def cuts(self, size: int, stop: int | None = None) -> list[tuple[int, int]]:
        """The windows up to ``stop`` as batches (from, to) of at most ``size`` windows of one length each."""
        count = len(self) if stop is None else min(stop, len(self))
        short = self.starts[count - 1] + self.length > len(self.tokens) if count else False
        whole = count - 1 if short else count
        cuts = [(i, min(i + size, whole)) for i in range(0, whole, size)]
        return [*cuts, (whole, count)] if short else cuts

    @property
    def scored(self) -> int:
        """Number of tokens that a loss over all windows counts (a window's very first token has no context)."""
        if self.answers is not None:
            return sum(int(self.answers[s + 1 : s + self.length].sum()) for s in self.starts)
        seen = [min(s + self.length, len(self.tokens)) - s for s in self.starts]
        alone = int(self.prompt is None)
        return sum(n - (self.overlap if self.overlap and i else alone) for i, n in enumerate(seen))

    @property
    def scores(self) -> str:
        """What is scored, in words."""
        return "answers only" if self.examples.get("answers_only") else "all tokens"


@dataclass(frozen=True)
class TextData:
    """A tokenised text and its four disjoint splits."""

    name: str
    splits: dict[str, TextSplit]
    seed: int = 0

    def largest_id(self) -> int:
        """The largest token id of all splits."""
        own = [s.tokens for s in self.splits.values()] + [
            s.prompt for s in self.splits.values() if s.prompt is not None
        ]
        return max(int(tokens.max()) for tokens in own)


def split_text(
    name: str,
    texts: Mapping[str, Document | Mixture],
    request: TextRequest,
    encode: Callable[[str], list[int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TextData:
    """Tokenise every document whole and split it; DataError where it is too short for the splits.

    Args:
        texts: the document or the mixture of each split; splits may share some.
        encode: token ids of a text.
        tokenizer: needed for examples.
    """
    mixtures = {split: Mixture.of(texts[split]) for split in SPLITS}
    pools: dict[str, _Pool] = {}
    for split, mixture in mixtures.items():
        for document in mixture.documents:
            if document.source not in pools:
                pools[document.source] = _pool(document, request, encode, tokenizer)
            pools[document.source].users.append(split)
    sizes = _sizes(mixtures, pools, request)
    parts = {source: pool.parts(sizes[source], request) for source, pool in pools.items()}
    splits = {
        split: _joined(mixture, [parts[d.source][split] for d in mixture.documents])
        for split, mixture in mixtures.items()
    }
    if request.prompt is not None:
        splits["train"] = _with_prompt(splits["train"], request.prompt, encode, tokenizer)
    return TextData(name, splits, request.seed)


def _with_prompt(
    split: TextSplit,
    prompt: str,
    encode: Callable[[str], list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> TextSplit:
    """A split whose windows have a prompt in front of them; ConfigError for an empty one."""
    ids = encode(prompt) if tokenizer is None else tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not prompt.strip() or not len(ids):
        raise ConfigError("data.prompt: is empty; give some words, or leave it out")
    begin = None if tokenizer is None else tokenizer.bos_token_id
    return replace(split, prompt=torch.tensor(ids, dtype=torch.int64), begin=begin)


@dataclass
class _Pool(abc.ABC):
    """A tokenised document, and what is taken of it: the test split's head, then blocks that are drawn."""

    source: str
    users: list[str] = field(default_factory=list)
    left: int = 0

    @abc.abstractmethod
    def test_sequences(self, request: TextRequest) -> int:
        """Test sequences that it could give."""

    @abc.abstractmethod
    def cut(self, test: int, request: TextRequest) -> int:
        """Take the first ``test`` sequences for the test split; the number of sequences that are left to be drawn."""

    def parts(self, sizes: Mapping[str, int], request: TextRequest) -> dict[str, TextSplit]:
        """The splits, of ``sizes`` sequences each."""
        count = self.left
        order = torch.randperm(count, generator=torch.Generator().manual_seed(request.seed)).tolist()
        front, back = sizes.get("calibration", 0), count - sizes.get("validation", 0)
        middle = order[front:back]
        drawn = {
            "calibration": order[:front],
            "validation": order[back:],
            "train": middle[: sizes.get("train", 0)],
        }
        found = {split: self.drawn(drawn[split], request) for split in self.users if split in drawn}
        return found | ({"test": self.test(request)} if "test" in self.users else {})

    @abc.abstractmethod
    def drawn(self, blocks: Sequence[int], request: TextRequest) -> TextSplit:
        """Some of the sequences that are left, by their numbers."""

    @abc.abstractmethod
    def test(self, request: TextRequest) -> TextSplit:
        """The sequences that `cut` took."""

    @abc.abstractmethod
    def too_few_tests(self, wanted: int, request: TextRequest) -> str:
        """What is said where there are fewer test sequences than ``wanted``."""

    @abc.abstractmethod
    def too_few(self, asked: str, request: TextRequest) -> str:
        """What is said where fewer are left than ``asked`` in words."""


@dataclass
class _TextPool(_Pool):
    """Windows of running text."""

    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _starts: tuple[int, ...] = ()
    _end: int = 0

    def _windows(self, request: TextRequest) -> list[int]:
        length = request.test_length or request.length
        stride = request.stride or length
        if stride > length:
            raise ConfigError(f"data.stride: {stride} is more than the {length} tokens of a test sequence")
        starts = [s for s in range(0, len(self.tokens), stride) if s + length <= len(self.tokens)]
        # Overlapping windows end with a shorter one that reaches the last token; blocks leave the rest out.
        if stride < length and starts and starts[-1] + length < len(self.tokens):
            starts.append(starts[-1] + stride)
        return starts

    def test_sequences(self, request: TextRequest) -> int:
        return len(self._windows(request))

    def cut(self, test: int, request: TextRequest) -> int:
        if test:
            self._starts = tuple(self._windows(request)[:test])
            length = request.test_length or request.length
            self._end = min(self._starts[-1] + length, len(self.tokens))
        self.left = (len(self.tokens) - self._end) // request.length
        return self.left

    def drawn(self, blocks: Sequence[int], request: TextRequest) -> TextSplit:
        starts = tuple(self._end + request.length * block for block in blocks)
        return TextSplit(self.source, self.tokens, starts, request.length)

    def test(self, request: TextRequest) -> TextSplit:
        length = request.test_length or request.length
        return TextSplit(self.source, self.tokens, self._starts, length, length - (request.stride or length))

    def too_few_tests(self, wanted: int, request: TextRequest) -> str:
        length, found = request.test_length or request.length, self.test_sequences(request)
        return (
            f"data.test: {wanted} sequences of {length} tokens asked for, but {self.source} has only "
            f"{len(self.tokens)} tokens ({found} sequences)"
        )

    def too_few(self, asked: str, request: TextRequest) -> str:
        return (
            f"{asked} sequences of {request.length} tokens do not fit: {self.source} has "
            f"{len(self.tokens) - self._end} tokens ({self.left} sequences) for them"
        )


@dataclass
class _ExamplePool(_Pool):
    """Sequences that hold whole examples; in the test split every example stands alone."""

    examples: list[Tokens] = field(default_factory=list)
    given: int = 0
    """Examples in the file, those that stand there twice among them."""
    format: str = ""
    _test: Blocks | None = None
    _rest: Blocks | None = None

    def test_sequences(self, request: TextRequest) -> int:
        if request.stride is not None and "test" in self.users:
            raise ConfigError(
                f"data.stride: {self.source} holds examples, each of them scored once; only running text has windows "
                "that overlap"
            )
        return len(make_blocks(self.examples, request.test_length or request.length, packing=False))

    def cut(self, test: int, request: TextRequest) -> int:
        used = 0
        if test:
            self._test = make_blocks(
                self.examples, request.test_length or request.length, packing=False, limit=test
            )
            used = self._test.examples + self._test.dropped
        self._rest = make_blocks(self.examples[used:], request.length, request.packing)
        self.left = len(self._rest)
        return self.left

    def drawn(self, blocks: Sequence[int], request: TextRequest) -> TextSplit:
        assert self._rest is not None
        return self._split(self._rest, blocks, request, request.packing)

    def test(self, request: TextRequest) -> TextSplit:
        assert self._test is not None
        return self._split(self._test, range(len(self._test)), request, False)

    def _split(self, found: Blocks, blocks: Sequence[int], request: TextRequest, packed: bool) -> TextSplit:
        facts = {
            "format": self.format,
            "answers_only": request.answers_only,
            "packed": packed,
            "shortened": found.shortened,
            "without_an_answer": found.dropped,
        }
        starts = tuple(found.length * block for block in blocks)
        return TextSplit(
            self.source, found.tokens, starts, found.length, answers=found.scored, examples=facts
        )

    def too_few_tests(self, wanted: int, request: TextRequest) -> str:
        if not any(bool(example.answer.any()) for example in self.examples):
            return f"data.files: {self.source}: none of its {self.given} conversations has a turn of the assistant"
        length, found = request.test_length or request.length, self.test_sequences(request)
        twice = f" (of {self.given}; the others repeat them)" if len(self.examples) < self.given else ""
        return (
            f"data.test: {wanted} examples asked for, but {self.source} has {found}{twice} with an answer in the first "
            f"{length} tokens (data.test_length)"
        )

    def too_few(self, asked: str, request: TextRequest) -> str:
        return (
            f"{asked} sequences of examples do not fit: {self.source} has {self.left} for them (an answer has to begin "
            f"in the first {request.length} tokens, data.sequence_length)"
        )


def _pool(
    document: Document,
    request: TextRequest,
    encode: Callable[[str], list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> _Pool:
    if isinstance(document, Text):
        return _TextPool(document.source, tokens=torch.tensor(encode(document.text), dtype=torch.int64))
    assert isinstance(document, Examples) and tokenizer is not None
    examples = tokenise(document, tokenizer, request.answers_only)
    return _ExamplePool(document.source, examples=examples, given=len(document.rows), format=document.format)


def _sizes(
    mixtures: Mapping[str, Mixture], pools: Mapping[str, _Pool], request: TextRequest
) -> dict[str, dict[str, int]]:
    """How many sequences of each split every document gives."""
    sizes: dict[str, dict[str, int]] = {source: {} for source in pools}
    if request.stride is not None and len(mixtures["test"].documents) > 1:
        raise ConfigError(
            "data.stride: windows overlap in one text only; name one test file, or leave it out"
        )

    def spread(split: str, total: int | None, most: Callable[[_Pool], int], full: bool) -> None:
        """Share out a split; without a total as many as the documents have in the proportion of their weights, or
        `DRAWN` of them."""
        mixture = mixtures[split]
        here = [pools[document.source] for document in mixture.documents]
        if total is None:
            total = largest_total([most(pool) for pool in here], mixture.weights)
            total = max(len(here), total if full else min(DRAWN, total))
        for pool, count in zip(here, apportioned(total, mixture.weights), strict=True):
            sizes[pool.source][split] = count

    spread("test", request.size("test"), lambda pool: _default_tests(pool, request), True)
    for pool in pools.values():
        test = sizes[pool.source].get("test", 0)
        if test and test > pool.test_sequences(request):
            raise DataError(pool.too_few_tests(test, request))
        pool.cut(test, request)
    for split in ("calibration", "validation"):
        spread(split, request.size(split), _default_draws, False)
    spread("train", request.size("train") or len(mixtures["train"].documents), lambda pool: 1, True)
    for pool in pools.values():
        _check_fit(pool, sizes[pool.source], request)
    if request.size("train") is None:
        spread("train", None, lambda pool: pool.left - _taken(sizes[pool.source]), True)
    return sizes


def _default_tests(pool: _Pool, request: TextRequest) -> int:
    found = pool.test_sequences(request)
    return max(1, found // 10) if len(pool.users) > 1 else max(1, found)


def _default_draws(pool: _Pool) -> int:
    users = len([split for split in pool.users if split in _DRAWN])
    return max(1, min(DRAWN, pool.left // (2 * users)))


def _taken(sizes: Mapping[str, int]) -> int:
    return sizes.get("calibration", 0) + sizes.get("validation", 0)


def _check_fit(pool: _Pool, sizes: Mapping[str, int], request: TextRequest) -> None:
    wanted = {split: sizes[split] for split in ("train", "calibration", "validation") if split in pool.users}
    if sum(wanted.values()) > pool.left:
        asked = " + ".join(f"{n} {s}" for s, n in wanted.items())
        raise DataError(f"data.{max(wanted, key=lambda s: wanted[s])}: {pool.too_few(asked, request)}")


def _joined(mixture: Mixture, parts: Sequence[TextSplit]) -> TextSplit:
    """One split of several documents, their sequences in turns."""
    if len(parts) == 1:
        return parts[0]
    offsets = [0]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part.tokens))
    order = in_turns([len(part) for part in parts])
    starts = tuple(offsets[number] + parts[number].starts[place] for number, place in order)
    masks = [torch.ones(len(p.tokens), dtype=torch.bool) if p.answers is None else p.answers for p in parts]
    masked = any(part.answers is not None for part in parts)
    facts: dict[str, Any] = {}
    for part in parts:
        facts |= dict(part.examples)
    return TextSplit(
        mixture.name,
        torch.cat([part.tokens for part in parts]),
        starts,
        parts[0].length,
        answers=torch.cat(masks) if masked else None,
        examples=facts,
    )
