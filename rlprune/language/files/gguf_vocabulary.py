"""The vocabulary fields of a GGUF file: copied from the dense model's own file, or derived from a tokenizer's files.

llama.cpp splits text before it merges bytes, by a rule that the file names (``tokenizer.ggml.pre``; llama-vocab.cpp has
the patterns). The name is found here by the pre-tokenizer that tokenizer.json describes; one that is not known is
refused, because another rule gives other tokens without a word.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from ...errors import ArtifactError, described
from ...utils.files import read_json
from .tokenizers import has_tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits the text, and whether whole words of the vocabulary are taken before any merge -> llama.cpp's name.
_SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes by words",), False): "gpt-2",
    (("single digits", "bytes by words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_QWEN35, "bytes"), False): "qwen35",
    ((_TEKKEN, "bytes"), True): "tekken",
}
_TEMPLATE = "tokenizer.chat_template"
_WORD_MARK = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """Fields ``tokenizer.*`` of a file, as GGUFWriter's methods take them, and in words where they are from."""

    source: str
    fields: Mapping[str, gguf.GGUFValue]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        for key, value in self.fields.items():
            writer.add_key_value(key, value.value, value.type, value.sub_type)


def vocabulary_of(folder: Path, size: int, origin: Path | None) -> Vocabulary:
    """The vocabulary of a pruned model of ``size`` tokens.

    Args:
        folder: the pruned model's, with its tokenizer's files.
        origin: the GGUF file of the dense model, where there is one: its fields are copied if they fit.

    Raises ArtifactError: a tokenizer that llama.cpp has no name for.
    """
    if origin is not None:
        copied = _copied(origin, size)
        if copied is not None:
            return _with_own_template(copied, folder)
    if not has_tokenizer(folder):
        return _no_vocabulary()
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(
            f"--to gguf: {folder}: its tokenizer has no tokenizer.json; save it by transformers' fast class"
        )
    document = read_json(path)
    try:
        return _derived(folder, document, size)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"--to gguf: {path}: not a tokenizer ({described(error)})") from error


def _no_vocabulary() -> Vocabulary:
    writer = _Fields()
    writer.add_tokenizer_model("no_vocab")
    return Vocabulary("none in the folder, so that the file takes token ids only", writer.taken())


class _Fields(gguf.GGUFWriter):
    """A writer that is asked for its fields and never writes a file."""

    def __init__(self) -> None:
        super().__init__(None, "llama")

    def taken(self) -> dict[str, gguf.GGUFValue]:
        return {k: v for table in self.kv_data for k, v in table.items() if k.startswith("tokenizer.")}


def _copied(origin: Path, size: int) -> Vocabulary | None:
    """The fields of another file; None where it cannot be read or has another number of tokens."""
    try:
        reader = gguf.GGUFReader(origin)
        tokens = reader.get_field("tokenizer.ggml.tokens")
        if tokens is None or len(tokens.data) != size:
            return None
        fields = {
            name: gguf.GGUFValue(
                field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
            for name, field in reader.fields.items()
            if name.startswith("tokenizer.")
        }
    except (OSError, ValueError, IndexError):
        return None
    return Vocabulary(f"copied from {origin.name}", fields)


def _with_own_template(copied: Vocabulary, folder: Path) -> Vocabulary:
    """The copied fields, with the folder's chat template where that is another one."""
    with _quiet_gguf():
        own = gguf.SpecialVocab(folder).chat_template
    before = copied.fields.get(_TEMPLATE)
    if not isinstance(own, str) or (before is not None and before.value == own):
        return copied
    template = gguf.GGUFValue(own, gguf.GGUFValueType.STRING)
    return Vocabulary(
        f"{copied.source}, chat template from the folder", {**copied.fields, _TEMPLATE: template}
    )


def _derived(folder: Path, document: Any, size: int) -> Vocabulary:
    model = document["model"]
    if model["type"] != "BPE":
        raise ArtifactError(
            f"--to gguf: {folder / 'tokenizer.json'}: the tokenizer is a {model['type']}, llama.cpp's are "
            "byte-level BPE and SentencePiece BPE"
        )
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    rule = "default" if kind == "llama" else _split_name(folder, document)
    tokens, types = _tokens(document, size, kind)
    writer = _Fields()
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        _check_words(folder, document)
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_adds_space(document))
    with _quiet_gguf():
        special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=size)
        special.add_to_gguf(writer, quiet=True)
    if "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)  # some rules of llama.cpp put one otherwise
    return Vocabulary(f"from tokenizer.json ({kind}, {rule})", writer.taken())


def _split_name(folder: Path, document: Any) -> str:
    """llama.cpp's name of the rule by which text is split before bytes are merged."""
    normal = document.get("normalizer")
    steps = _steps(document.get("pre_tokenizer"))
    known = normal is None or normal["type"] == "NFC"  # which llama.cpp leaves to its caller
    found = _SPLITS.get((tuple(steps), bool(document["model"].get("ignore_merges"))))
    if found is None or not known:
        said = "; ".join(steps if known else [f"normalizer {normal['type']}"]) or "nothing"
        names = ", ".join(sorted(set(_SPLITS.values())))
        raise ArtifactError(
            f"--to gguf: {folder / 'tokenizer.json'}: llama.cpp's name for its pre-tokenizer ({said}) is not known; "
            f"known: {names}"
        )
    return found


def _steps(pre_tokenizer: Any) -> list[str]:
    """The steps of a pre-tokenizer in a word or pattern each."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ["bytes by words" if pre_tokenizer.get("use_regex", True) else "bytes"]
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["single digits"]
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert"):
        return [str(pre_tokenizer["pattern"].get("Regex", pre_tokenizer["pattern"].get("String")))]
    return [kind]


def _tokens(document: Any, size: int, kind: str) -> tuple[list[str], list[int]]:
    """Every id's text and type; ids without a token are filled up as llama.cpp's converter does."""
    texts: dict[int, str] = {number: text for text, number in document["model"]["vocab"].items()}
    types: dict[int, int] = {}
    unknown = document["model"].get("unk_token")
    if kind == "llama":
        for number, text in texts.items():
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                types[number] = gguf.TokenType.BYTE
            elif text == unknown:
                types[number] = gguf.TokenType.UNKNOWN
    for added in document.get("added_tokens") or ():
        number, text = added["id"], added["content"]
        own = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        texts[number] = text.replace(_WORD_MARK, " ") if own == gguf.TokenType.USER_DEFINED else text
        if types.get(number) != gguf.TokenType.UNKNOWN:
            types[number] = own
    above = [number for number in texts if number >= size]
    if above:
        raise ArtifactError(
            f"--to gguf: the tokenizer gives the id {max(above)}, but the model has {size} tokens"
        )
    return (
        [texts.get(i, f"[PAD{i}]") for i in range(size)],
        [
            int(types.get(i, gguf.TokenType.NORMAL if i in texts else gguf.TokenType.UNUSED))
            for i in range(size)
        ],
    )


def _scores(model: Any, tokens: Sequence[str]) -> list[float]:
    """SentencePiece's scores: a pair is merged the sooner the earlier its merge was learnt."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return [-float(ranks[text]) if text in ranks else -float(len(ranks)) for text in tokens]


def _check_words(folder: Path, document: Any) -> None:
    """SentencePiece's own way of marking spaces, in the two forms that transformers writes it."""
    replaced = _WORD_MARK in json.dumps(document.get("normalizer"), ensure_ascii=False)
    steps = _steps(document.get("pre_tokenizer"))
    if steps != ["Metaspace"] and (steps or not replaced):
        raise ArtifactError(
            f"--to gguf: {folder / 'tokenizer.json'}: spaces are not marked as SentencePiece marks them"
        )


def _adds_space(document: Any) -> bool:
    """Whether a space is put before the text."""
    pre = document.get("pre_tokenizer") or {}
    if pre.get("type") == "Metaspace":
        return pre.get("prepend_scheme", "always") != "never"
    normal = document.get("normalizer") or {}
    return any(each["type"] == "Prepend" for each in normal.get("normalizers", [normal] if normal else []))


@contextlib.contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Without the package's notes on standard error."""
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
