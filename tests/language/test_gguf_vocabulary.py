"""Vocabularies of GGUF files: derived from a tokenizer's files, or copied from the dense model's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.gguf_models import fields
from helpers.lm import tiny_lm
from helpers.pruned_lm import edit, error_of, tokenizer
from rlprune.language.loading import help_tokenizer

gguf = pytest.importorskip("gguf")
from rlprune.language.files import llama_cpp  # noqa: E402
from rlprune.language.files.gguf_file import write_gguf  # noqa: E402
from rlprune.language.files.gguf_vocabulary import vocabulary_of  # noqa: E402

TEXT = "def help(topic):\n    return 'a string of 1234 letters', it's\t{topic}  \u00e9\u4e2d"
SIZE = 300


def folder_of(path: Path, made: Any = None) -> Path:
    (made or help_tokenizer(SIZE)).save_pretrained(path)
    return path


def sentencepiece(path: Path, prepend: bool = True) -> Path:
    """A tokenizer as transformers writes Llama 2's: merges over characters, bytes for what is not known."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=SIZE + 40, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat and the hat"] * 20, trainer)
    document = json.loads(made.to_str())
    # Bytes are no special tokens; only the three marks are.
    document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        unk_token="<unk>", bos_token=AddedToken("<s>"), eos_token="</s>",
    )  # fmt: skip
    return folder_of(path, fast)


class TestDerived:
    def test_bytes(self, tmp_path):
        folder = folder_of(tmp_path)
        edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}"))
        found = {key: value.value for key, value in vocabulary_of(folder, SIZE + 4, None).fields.items()}
        assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
        own = help_tokenizer(SIZE)
        assert found["tokenizer.ggml.tokens"][:SIZE] == own.convert_ids_to_tokens(list(range(SIZE)))
        assert found["tokenizer.ggml.tokens"][SIZE:] == [f"[PAD{i}]" for i in range(SIZE, SIZE + 4)]
        kinds = found["tokenizer.ggml.token_type"]
        assert kinds[0] == gguf.TokenType.CONTROL and set(kinds[1:SIZE]) == {gguf.TokenType.NORMAL}
        assert set(kinds[SIZE:]) == {gguf.TokenType.UNUSED}
        assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 0
        assert found["tokenizer.ggml.add_bos_token"] is False
        assert found["tokenizer.chat_template"] == "{{ messages }}"
        merges = json.loads(own.backend_tokenizer.to_str())["model"]["merges"]
        assert len(found["tokenizer.ggml.merges"]) == len(merges)

    @pytest.mark.parametrize(
        ("steps", "ignore", "name"),
        [
            ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}], False,
             "smollm"),
            ([{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"}}, {"type": "ByteLevel", "use_regex": False}], True, "llama-bpe"),
            ([{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"}}, {"type": "ByteLevel", "use_regex": False}], False, "qwen2"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_how_text_is_split(self, tmp_path, steps, ignore, name):
        folder = folder_of(tmp_path)

        def change(document: Any) -> None:
            document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
            document["model"]["ignore_merges"] = ignore

        edit(folder / "tokenizer.json", change)
        assert vocabulary_of(folder, SIZE, None).fields["tokenizer.ggml.pre"].value == name

    def test_sentencepiece(self, tmp_path):
        folder = sentencepiece(tmp_path)
        fields_ = vocabulary_of(folder, SIZE + 40, None).fields
        found = {key: value.value for key, value in fields_.items()}
        assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
        kinds = found["tokenizer.ggml.token_type"]
        assert kinds[0] == gguf.TokenType.UNKNOWN and kinds[1] == kinds[2] == gguf.TokenType.CONTROL
        assert set(kinds[3:259]) == {gguf.TokenType.BYTE}
        scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        learnt = [scores["".join(pair)] for pair in merges]
        assert len(learnt) > 5 and learnt == sorted(learnt, reverse=True), (
            "what was learnt first is merged first"
        )
        assert found["tokenizer.ggml.add_space_prefix"] is True

    def test_no_tokenizer(self, tmp_path):
        found = vocabulary_of(tmp_path, SIZE, None)
        assert found.fields["tokenizer.ggml.model"].value == "no_vocab" and "token ids only" in found.source


class TestRefused:
    def test_unknown_rules_and_models(self, tmp_path):
        folder = folder_of(tmp_path / "a")
        edit(folder / "tokenizer.json", lambda d: d["pre_tokenizer"].update(add_prefix_space=True))
        text = error_of(lambda: vocabulary_of(folder, SIZE, None))
        assert "pre-tokenizer (ByteLevel) is not known; known: dbrx, gpt-2" in text
        words = folder_of(tmp_path / "b", tokenizer())
        assert "is a WordLevel" in error_of(lambda: vocabulary_of(words, 96, None))
        assert "gives the id 299, but the model has 200 tokens" in error_of(
            lambda: vocabulary_of(folder_of(tmp_path / "c"), 200, None)
        )
        (folder / "tokenizer.json").unlink()
        assert "has no tokenizer.json" in error_of(lambda: vocabulary_of(folder, SIZE, None))
        (folder / "tokenizer.json").write_text("[]")
        assert "not a tokenizer" in error_of(lambda: vocabulary_of(folder, SIZE, None))

    def test_a_normalizer(self, tmp_path):
        folder = folder_of(tmp_path)
        edit(folder / "tokenizer.json", lambda d: d.update(normalizer={"type": "Lowercase"}))
        assert "normalizer Lowercase" in error_of(lambda: vocabulary_of(folder, SIZE, None))


class TestCopied:
    def test_all_fields_of_the_dense_file(self, tmp_path):
        model = tiny_lm("llama-mha-tied", vocab_size=SIZE)
        folder = folder_of(tmp_path / "a")
        edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ one }}"))
        first = write_gguf(model, tmp_path / "first.gguf", "f32", folder).path
        second = write_gguf(model, tmp_path / "second.gguf", "f32", folder, origin=first)
        assert second.notes[0].endswith("vocabulary copied from first.gguf")
        was, now = (
            {k: v for k, v in fields(path).items() if k.startswith("tokenizer.")}
            for path in (first, second.path)
        )
        assert was == now and now["tokenizer.chat_template"] == "{{ one }}"

    def test_a_chat_template_of_the_folders_own(self, tmp_path):
        model = tiny_lm("llama-mha-tied", vocab_size=SIZE)
        folder = folder_of(tmp_path / "a")
        first = write_gguf(model, tmp_path / "first.gguf", "f32", folder).path
        (folder / "chat_template.jinja").write_text("{{ two }}")
        found = vocabulary_of(folder, SIZE, first)
        assert found.source == "copied from first.gguf, chat template from the folder"
        assert found.fields["tokenizer.chat_template"].value == "{{ two }}"

    def test_a_file_that_does_not_fit_is_passed_over(self, tmp_path):
        other = write_gguf(tiny_lm("llama-mha-tied"), tmp_path / "other.gguf", "f32", tmp_path).path
        (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
        folder = folder_of(tmp_path / "a")
        for path in (other, tmp_path / "broken.gguf", tmp_path / "gone.gguf"):
            assert "from tokenizer.json" in vocabulary_of(folder, SIZE, path).source


@pytest.mark.skipif(not llama_cpp.is_installed(), reason=f"llama.cpp is not installed: {llama_cpp.INSTALL}")
class TestLlamaCpp:
    @pytest.mark.parametrize("prepend", [True, False])
    def test_sentencepiece_gives_the_same_tokens(self, tmp_path, prepend):
        from transformers import AutoTokenizer

        folder = sentencepiece(tmp_path / "a", prepend)
        model = tiny_lm("llama-mha-tied", vocab_size=SIZE + 40)
        path = write_gguf(model, tmp_path / "m.gguf", "f32", folder).path
        text = "the cat and the hat sat on a mat\u00e9"
        wanted = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        assert llama_cpp.run_llama_cpp(path, [[1, 2]], text=text).text_ids == wanted

    def test_bytes_give_the_same_tokens(self, tmp_path):
        model = tiny_lm("llama-mha-tied", vocab_size=SIZE)
        path = write_gguf(model, tmp_path / "m.gguf", "f32", folder_of(tmp_path / "a")).path
        assert (
            llama_cpp.run_llama_cpp(path, [[1, 2]], text=TEXT).text_ids
            == help_tokenizer(SIZE)(TEXT)["input_ids"]
        )
