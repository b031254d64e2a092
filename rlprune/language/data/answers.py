"""Examples as token ids, and which of the tokens are answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import DataError, described
from .request import Example, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that say themselves what the assistant wrote (transformers' generation marks).
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stanford Alpaca's headings, for a tokenizer without a chat template.
_PLAIN = "### Instruction:\n{}\n\n### Response:\n"

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """One example: ``ids`` (T,) int64, and ``answer`` (T,) bool, which tokens an answer is made of."""

    ids: Tensor = field(repr=False)
    answer: Tensor = field(repr=False)


def tokenise(examples: Examples, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> list[Tokens]:
    """Every example once: repeated ones would stand in several splits.

    Conversations go through the tokenizer's chat template. Where that has generation marks they say what the assistant
    wrote; else a turn's answer is what its conversation's text has more than the one that ends before it and asks for
    it. The answer includes what ends the turn. A prompt with its answer is written as it stands, with the end token
    behind it.

    Raises DataError naming the file and the row: no template, one that refuses the row, answers that cannot be found.
    """
    found: dict[tuple[int, ...], Tokens] = {}
    for example in examples.rows:
        where = f"data.files: {examples.source}: {example.line}"
        if example.messages and examples.format == "chat":
            _need_template(tokenizer, examples)
        whole = _tokens(example, tokenizer, where)
        if not answers_only:
            whole = Tokens(whole.ids, torch.ones_like(whole.answer))
        found.setdefault(tuple(whole.ids.tolist()), whole)
    return list(found.values())


def _need_template(tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"data.files: {examples.source}: holds conversations, and the model's tokenizer has no chat template; give "
            "a chat model, or instruction and output as fields"
        )


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    if not example.messages:
        return _joined(tokenizer, example.prompt, example.answer)
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        asked = "\n\n".join(m["content"] for m in example.messages[:-1])
        return _joined(tokenizer, _PLAIN.format(asked), example.messages[-1]["content"])
    if isinstance(template, str) and _MARKS.search(template) and not example.first:
        return _marked(tokenizer, example.messages, where)
    text, spans = _rendered(tokenizer, example, where)
    return _masked(tokenizer, text, spans, special=False)


def _joined(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Tokens:
    """Prompt and answer as one text, the end token behind it."""
    end = tokenizer.eos_token_id
    found = _masked(tokenizer, prompt + answer, [(len(prompt), len(prompt) + len(answer))], special=True)
    if end is None:
        return found
    if len(found.ids) and int(found.ids[-1]) == end:  # the tokenizer's own habit
        found.answer[-1] = True
        return found
    return Tokens(
        torch.cat([found.ids, torch.tensor([end])]), torch.cat([found.answer, torch.tensor([True])])
    )


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], where: str) -> Tokens:
    found: Any = _applied(
        tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = torch.tensor(found["input_ids"], dtype=torch.int64).flatten()
    return Tokens(ids, torch.tensor(found["assistant_masks"]).flatten().bool())


def _rendered(tokenizer: PreTrainedTokenizerBase, example: Example, where: str) -> tuple[str, list[Span]]:
    """The conversation as text, and where in it the assistant's turns stand."""
    messages = example.messages
    text: str = _applied(tokenizer, messages, where, tokenize=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < example.first:
            continue
        asked = ""
        if number:
            asked = _applied(tokenizer, messages[:number], where, tokenize=False, add_generation_prompt=True)
        said = _applied(tokenizer, messages[: number + 1], where, tokenize=False)
        end = _end(text, said, len(asked), message["content"].strip())
        if end is None or not text.startswith(asked):
            raise DataError(
                f"{where}: the chat template writes earlier turns anew when later ones follow, so that the answers "
                "cannot be told apart; give data.answers_only=false"
            )
        spans.append((len(asked), len(text[:end].rstrip())))
    return text, spans


def _end(text: str, said: str, start: int, content: str) -> int | None:
    """Where a turn ends that begins at ``start``; ``said`` is the conversation up to its end."""
    if text.startswith(said):
        return len(said)
    # Templates that leave out the thoughts of earlier turns: the turn by its words, then what closes a turn.
    at, last = text.find(content, start), said.rfind(content)
    if at < 0 or last < 0:
        return None
    closing = said[last + len(content) :]
    end = at + len(content)
    return end + len(closing) if text.startswith(closing, end) else None


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], where: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except Exception as error:  # templates are programs: whatever they raise, they refuse
        raise DataError(f"{where}: the tokenizer's chat template refuses it ({described(error)})") from error


def _masked(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], special: bool) -> Tokens:
    """The ids of a text, and which tokens lie in, or reach into, one of the spans of its letters."""
    options = {"add_special_tokens": special, "verbose": False}
    if not tokenizer.is_fast:
        return _by_prefixes(tokenizer, text, spans, options)
    found = tokenizer(text, return_offsets_mapping=True, **options)
    answer = [
        any(start < stop and start < end and stop > begin for begin, end in spans)
        for start, stop in found["offset_mapping"]
    ]
    return Tokens(torch.tensor(found["input_ids"], dtype=torch.int64), torch.tensor(answer, dtype=torch.bool))


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], options: Mapping[str, bool]
) -> Tokens:
    """The same where a tokenizer does not say which letters a token stands for: by the lengths of prefixes."""
    ids = tokenizer(text, **options)["input_ids"]
    answer = torch.zeros(len(ids), dtype=torch.bool)
    for span in spans:
        start, stop = (len(tokenizer(text[:edge], **options)["input_ids"]) for edge in span)
        answer[start:stop] = True
    return Tokens(torch.tensor(ids, dtype=torch.int64), answer)
