"""Texts and their splits: what each split reads, and what is said of texts that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.errors import ConfigError, DataError, RlpruneError
from rlprune.language.text import TextRequest, help_texts, load_text
from rlprune.workloads import SPLITS

WORDS = "the quick brown fox jumps over the lazy dog while every good boy does fine "


def numbers(text: str) -> list[int]:
    """A tokenizer for tests: a token is a character, its id below 96."""
    return [ord(c) % 96 for c in text]


def positions(split) -> list[int]:
    """Every position of the token stream that a split reads."""
    return [p for s in split.starts for p in range(s, min(s + split.length, len(split.tokens)))]


class TestSplits:
    @settings(max_examples=60, deadline=None)
    @given(
        tokens=st.integers(200, 900),
        length=st.integers(8, 24),
        test_length=st.one_of(st.none(), st.integers(8, 40)),
        overlap=st.integers(0, 7),
        seed=st.integers(0, 99),
        sizes=st.tuples(*[st.one_of(st.none(), st.integers(1, 4))] * 4),
    )
    def test_parts_of_one_text_are_disjoint(self, tokens, length, test_length, overlap, seed, sizes):
        stride = (test_length or length) - overlap
        request = TextRequest(length=length, test_length=test_length, stride=stride, sizes=sizes, seed=seed)
        try:
            data = load_text("help_texts", request, lambda text: list(range(tokens)))
        except DataError as error:
            assert "sequences" in str(error)
            return
        read = {split: positions(data.splits[split]) for split in SPLITS}
        for split in SPLITS:
            assert read[split] and max(read[split]) < tokens
            if split != "test":
                assert len(set(read[split])) == len(read[split])  # no token twice
            if (wanted := request.size(split)) is not None:
                assert len(data.splits[split]) == wanted
        together = [set(read[split]) for split in SPLITS]
        assert sum(len(s) for s in together) == len(set.union(*together))
        assert min(read["test"]) == 0 and sorted(data.splits["test"].starts) == list(
            data.splits["test"].starts
        )

    def test_the_size_of_one_split_changes_no_other(self):
        def starts(sizes):
            data = load_text("help_texts", TextRequest(length=16, sizes=sizes), lambda _: list(range(4000)))
            return {split: data.splits[split].starts for split in SPLITS}

        few, many = starts((3, 4, 5, 6)), starts((3, 4, 60, 6))
        assert few["calibration"] == many["calibration"] and few["test"] == many["test"]
        assert few["validation"] == many["validation"][-5:]
        assert starts((3, 40, 5, 6))["validation"] == few["validation"]
        assert starts((None, 4, 5, 6))["train"][:3] == few["train"]

    def test_seed_decides_what_is_drawn_and_not_the_test_split(self):
        one, same, other = (
            load_text("help_texts", TextRequest(length=16, seed=s, sizes=(5, 5, 5, 5)), numbers)
            for s in (1, 1, 2)
        )
        for split in SPLITS:
            assert one.splits[split].starts == same.splits[split].starts
        assert one.splits["calibration"].starts != other.splits["calibration"].starts
        assert one.splits["test"].starts == other.splits["test"].starts

    def test_test_split_of_its_own_file_is_its_first_blocks_in_order(self, tmp_path):
        (tmp_path / "valid.txt").write_text(WORDS * 40)
        (tmp_path / "test.txt").write_text(WORDS * 20)
        request = TextRequest(
            files={"calibration": "valid.txt", "test": "test.txt"},
            root=tmp_path,
            length=16,
            test_length=64,
            sizes=(None, 8, 9, 7),
        )
        data = load_text("text", request, numbers)
        assert data.splits["test"].starts == tuple(range(0, 7 * 64, 64))
        ids, targets = data.splits["test"].window(0, 7)
        assert ids.flatten().tolist() == numbers((WORDS * 20)[: 7 * 64]) and targets is ids
        parts = [set(positions(data.splits[s])) for s in ("calibration", "validation", "train")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(WORDS) * 40 // 16 * 16

    def test_one_file_under_two_names_is_one_text(self, tmp_path):
        (tmp_path / "a.txt").write_text(WORDS * 40)
        (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
        files = {"calibration": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")}
        data = load_text("text", TextRequest(files=files, length=16, sizes=(None, 4, 4, 5)), numbers)
        assert not set(positions(data.splits["test"])) & set(positions(data.splits["calibration"]))

    def test_jsonl_documents_are_joined_by_blank_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"body": WORDS, "n": i}) for i in range(30)) + "\n\n")
        seen = []
        request = TextRequest(files={"train": str(path)}, column="body", length=16)
        load_text("text", request, lambda text: seen.append(text) or numbers(text))
        assert seen == ["\n\n".join([WORDS] * 30)]

    def test_help_texts_are_plenty(self):
        assert len(help_texts()) > 200_000 and help_texts() == help_texts()


class TestPrompt:
    """`data.prompt`: before every sequence of the train split, read and not learned."""

    def test_stands_before_the_train_sequences_alone(self):
        plain = load_text("help_texts", TextRequest(length=16, sizes=(5, 5, 5, 5)), numbers)
        asked = TextRequest(length=16, sizes=(5, 5, 5, 5), prompt="be brief ")
        data = load_text("help_texts", asked, numbers)
        for split in ("calibration", "validation", "test"):
            assert data.splits[split].window(0, 5)[0].equal(plain.splits[split].window(0, 5)[0])
        (ids, targets), (own, _) = (d.splits["train"].window(1, 3) for d in (data, plain))
        assert ids[:, :9].tolist() == [numbers("be brief ")] * 2 and ids[:, 9:].equal(own)
        assert (targets[:, :9] == -100).all() and targets[:, 9:].equal(own)
        assert data.splits["train"].prompted_length == 25
        # The first token of a sequence has a context now.
        assert (data.splits["train"].scored, plain.splits["train"].scored) == (5 * 16, 5 * 15)

    def test_a_beginning_of_a_sequence_stays_in_front(self):
        split = load_text("help_texts", TextRequest(length=8, sizes=(4, 4, 4, 4), prompt="ab"), numbers)
        train = split.splits["train"]
        first = int(train.window(0, 1)[0][0, 2])
        begun = replace(train, begin=first)
        assert begun.window(0, 1)[0][0, :3].tolist() == [first, *numbers("ab")]
        assert begun.window(0, 1)[1][0, :3].tolist() == [first, -100, -100]

    def test_an_empty_one_is_refused(self):
        with pytest.raises(ConfigError, match=r"data\.prompt: is empty; give some words"):
            load_text("help_texts", TextRequest(length=8, sizes=(4, 4, 4, 4), prompt="  "), numbers)


class TestTextErrors:
    def request(self, tmp_path, text: str | bytes = WORDS * 40, name="a.txt", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return TextRequest(files={"calibration": str(path)}, length=16, **options)

    @pytest.mark.parametrize(
        ("text", "name", "expected"),
        [
            ("", "a.txt", "holds no text"),
            (" \n\n\t", "a.txt", "holds no text"),
            (b"\xff\xfe\x00 a", "a.txt", "not UTF-8 text .byte 0."),
            ("{}\n", "a.jsonl", "line 1 has no text field 'text'"),
            ('{"txet": "a"}\n', "a.jsonl", "did you mean 'txet'"),
            ('{"text": 3}\n', "a.jsonl", "line 1: the field 'text' is not text but a number"),
            ('{"text": "a"}\nnonsense\n', "a.jsonl", "line 2 is not JSON"),
            ("[1]\n", "a.jsonl", "it is no object"),
            ("", "a.jsonl", "holds no text"),
        ],
    )
    def test_files(self, tmp_path, text, name, expected):
        with pytest.raises(DataError, match=expected) as caught:
            load_text("text", self.request(tmp_path, text, name), numbers)
        assert "\n" not in str(caught.value)

    def test_too_little_text_for_the_splits(self, tmp_path):
        request = self.request(tmp_path, WORDS, sizes=(None, 2, 2, 1))
        with pytest.raises(
            DataError, match=r"2 calibration \+ 2 validation sequences of 16 tokens do not fit"
        ):
            load_text("text", request, numbers)
        with pytest.raises(DataError, match="9 sequences of 16 tokens asked for, but .* has only 75 tokens"):
            load_text("text", self.request(tmp_path, WORDS, sizes=(None, None, None, 9)), numbers)
        with pytest.raises(DataError, match="1 sequences of 16 tokens"):
            load_text("text", self.request(tmp_path, "short"), numbers)

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, "data.files: required"),
            ({"test": "a.txt"}, "not for the test split alone"),
            ({"valid": "a.txt"}, "data.files.valid: unknown split.*did you mean 'validation'"),
            ({"train": 3}, "data.files.train: expected a path"),
            ({"train": "absent.txt"}, "absent.txt: no such file"),
            ({"train": "."}, "is a folder"),
        ],
    )
    def test_names_of_files(self, files, expected):
        with pytest.raises(RlpruneError, match=expected):
            load_text("text", TextRequest(files=files), numbers)

    def test_names_of_data(self):
        with pytest.raises(ConfigError, match="did you mean 'help_texts'"):
            load_text("help_text", TextRequest(), numbers)
        with pytest.raises(ConfigError, match="only data.name 'text' reads files"):
            load_text("help_texts", TextRequest(files={"train": "a"}), numbers)
        with pytest.raises(ConfigError, match=r"data.stride: 20 is more than the 16 tokens"):
            load_text("help_texts", TextRequest(length=16, stride=20), numbers)

    def test_hub_data_sets_need_leave_and_a_package(self, monkeypatch):
        with pytest.raises(DataError, match="data.download=true"):
            load_text("hub:Salesforce/wikitext", TextRequest(), numbers)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"pip install 'rlprune\[language\]'"):
            load_text("hub:Salesforce/wikitext", TextRequest(download=True), numbers)

    def test_hub_data_sets_that_cannot_be_fetched(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def refuse(*args, **options):
            raise ConnectionError("Couldn't reach the hub\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(DataError, match="cannot be fetched: ConnectionError: Couldn't reach") as caught:
            load_text("hub:Salesforce/wikitext:raw", TextRequest(download=True), numbers)
        assert "\n" not in str(caught.value)

    def test_hub_data_sets_give_their_own_splits(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        parts = {n: [{"text": f"{n} {WORDS}"}] * 30 for n in ("train", "validation", "test")}
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or parts)
        request = TextRequest(download=True, length=16, sizes=(None, 3, 3, 3))
        data = load_text("hub:org/name:raw", request, numbers)
        assert asked == [(("org/name", "raw"), {"streaming": True})]
        sources = {s: data.splits[s].source.rpartition(" ")[2] for s in SPLITS}
        assert sources == {
            "train": "train",
            "calibration": "validation",
            "validation": "validation",
            "test": "test",
        }
        with pytest.raises(DataError, match="no text field 'body'; it has text"):
            load_text("hub:org/name", TextRequest(download=True, column="body"), numbers)
