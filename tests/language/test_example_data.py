"""Conversations and instructions: how files are recognised, which tokens are answers, how sequences are made."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.errors import ConfigError, DataError, RlpruneError
from rlprune.language.data.answers import Tokens, tokenise
from rlprune.language.data.blocks import make_blocks
from rlprune.language.data.formats import document_of
from rlprune.language.data.mixing import apportioned, in_turns, largest_total
from rlprune.language.data.request import Example, Examples, Text, TextRequest
from rlprune.language.data.splits import IGNORED, TextData
from rlprune.language.loading import encoder, help_tokenizer
from rlprune.language.text import load_text
from rlprune.workloads import SPLITS

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
SAID = "{{ m['content'] + '<|im_end|>' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = f"{{% for m in messages %}}{TURN}{SAID}{{{{ '\\n' }}}}{{% endfor %}}{ASKED}"
MARKED = (
    f"{{% for m in messages %}}{TURN}{{% if m['role'] == 'assistant' %}}{{% generation %}}{SAID}{{% endgeneration %}}"
    f"{{% else %}}{SAID}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{ASKED}"
)
# As Qwen3's: thoughts are shown in the last turn only.
THINKING = (
    "{% for m in messages %}"
    + TURN
    + "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    + SAID
    + "{{ '\\n' }}{% endfor %}"
    + ASKED
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of objects."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "The same, but fixed."},
]


def tokenizer_of(template: str | None = PLAIN) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=help_tokenizer(400)._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    made.chat_template = template
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def chat(*messages: dict[str, str]) -> Examples:
    return Examples("a.jsonl", "chat", (Example("line 1", tuple(messages or CHAT)),))


def answers(found: Tokens, tokenizer: Any) -> list[str]:
    """The runs of tokens that count as answers, as text."""
    runs: list[list[int]] = [[]]
    for token, scored in zip(found.ids.tolist(), found.answer.tolist(), strict=True):
        if scored:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


class TestAnswers:
    def test_answers_of_a_chat_are_the_assistants_turns_and_what_ends_them(self):
        tokenizer = tokenizer_of()
        (found,) = tokenise(chat(), tokenizer, True)
        assert answers(found, tokenizer) == ["A row of objects.<|im_end|>", "The same, but fixed.<|im_end|>"]
        assert found.ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.tuples(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30)),
            min_size=1,
            max_size=4,
        )
    )
    def test_prefixes_find_what_the_templates_own_marks_say(self, turns):
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        (marked,), (found,) = (
            tokenise(chat(*messages), tokenizer_of(template), True) for template in (MARKED, PLAIN)
        )
        assert torch.equal(marked.ids, found.ids) and torch.equal(marked.answer, found.answer)

    def test_turns_that_are_written_anew_later_are_found_by_their_words(self):
        tokenizer = tokenizer_of(THINKING)
        (found,) = tokenise(chat(), tokenizer, True)
        assert answers(found, tokenizer) == [
            "A row of objects.<|im_end|>", "<think></think>The same, but fixed.<|im_end|>",
        ]  # fmt: skip

    def test_prompts_with_completions_are_written_as_they_stand(self):
        tokenizer = tokenizer_of(None)
        rows = (
            Example("line 1", prompt="2 + 2 = ", answer="4"),
            Example("line 2", prompt="2 + 2 = ", answer="4"),
        )
        (found,) = tokenise(Examples("a", "instruction", rows), tokenizer, True)
        assert tokenizer.decode(found.ids) == "2 + 2 = 4<|endoftext|>"
        assert answers(found, tokenizer) == ["4<|endoftext|>"]

    def test_instructions_go_through_the_chat_template_or_under_headings(self):
        rows = document_of(
            "a", [("line 1", {"instruction": "Add.", "input": "1, 2", "output": "3"})], TextRequest()
        )
        with_chat, plain = tokenizer_of(), tokenizer_of(None)
        (one,), (other,) = tokenise(rows, with_chat, True), tokenise(rows, plain, True)
        assert with_chat.decode(one.ids).startswith("<|im_start|>user\nAdd.\n\n1, 2<|im_end|>")
        assert answers(one, with_chat) == ["3<|im_end|>"]
        assert plain.decode(other.ids) == "### Instruction:\nAdd.\n\n1, 2\n\n### Response:\n3<|endoftext|>"
        assert answers(other, plain) == ["3<|endoftext|>"]

    def test_all_tokens_count_where_that_is_asked_for(self):
        (found,) = tokenise(chat(), tokenizer_of(), False)
        assert bool(found.answer.all())

    def test_tokenizers_that_do_not_tell_letters(self, monkeypatch):
        tokenizer = tokenizer_of()
        (wanted,) = tokenise(chat(), tokenizer, True)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        (found,) = tokenise(chat(), tokenizer, True)
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.answer, wanted.answer)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (None, "a.jsonl: holds conversations, and the model's tokenizer has no chat template"),
            (
                "{{ raise_exception('no system role') }}",
                "line 1: the tokenizer's chat template refuses it .*no system",
            ),
            ("{{ messages[", "line 1: the tokenizer's chat template refuses it .TemplateSyntaxError"),
            (
                "{{ messages|length }}{{ messages[-1]['content'] }}",
                "line 1: the chat template writes earlier turns",
            ),
        ],
    )
    def test_templates_that_cannot_be_used(self, template, expected):
        with pytest.raises(DataError, match=expected) as caught:
            tokenise(chat(), tokenizer_of(template), True)
        assert "\n" not in str(caught.value)


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "wanted"),
        [
            ({"messages": CHAT}, "chat"),
            ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "chat"),
            ({"instruction": "a", "output": "b"}, "instruction"),
            ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
            ({"prompt": "a", "completion": "b"}, "instruction"),
            ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, "instruction"),
            ({"question": "a", "answer": "b"}, "instruction"),
            ({"text": "a", "messages": CHAT}, "text"),
        ],
    )
    def test_formats_are_known_by_their_fields(self, row, wanted):
        found = document_of("a", [("line 1", row)], TextRequest())
        assert (found.format if isinstance(found, Examples) else "text") == wanted

    def test_a_format_and_a_column_can_be_stated(self):
        row = {"text": "a", "talk": CHAT, "instruction": "b", "output": "c"}
        stated = {
            form: document_of("a", [("line 1", row)], TextRequest(format=form))
            for form in ("text", "instruction")
        }
        assert isinstance(stated["text"], Text) and stated["instruction"].format == "instruction"
        found = document_of("a", [("line 1", row)], TextRequest(format="chat", column="talk"))
        assert [m["role"] for m in found.rows[0].messages] == [m["role"] for m in CHAT]

    def test_only_the_completion_of_a_conversation_is_an_answer(self):
        row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
        tokenizer = tokenizer_of()
        (found,) = tokenise(document_of("a", [("line 1", row)], TextRequest()), tokenizer, True)
        assert answers(found, tokenizer) == ["The same, but fixed.<|im_end|>"]

    @pytest.mark.parametrize(
        ("rows", "options", "expected"),
        [
            (
                [{"messages": [{"role": "usr", "content": "a"}]}],
                {},
                r"line 1: messages\[0\].role: 'usr' is not one of .*did you mean 'user'",
            ),
            (
                [{"messages": [{"role": "user"}]}],
                {},
                r"line 1: messages\[0\]: the field 'content' is missing",
            ),
            (
                [{"messages": [{"role": "user", "content": 3}]}],
                {},
                r"messages\[0\]: the field 'content' is not text but a number",
            ),
            (
                [{"messages": CHAT}, {"messages": []}],
                {},
                r"line 2: messages: must be a list of at least one message, got an empty list",
            ),
            (
                [{"messages": CHAT}, {"text": "a"}],
                {},
                r"line 2 has no field 'messages', which the file's first line has: chat \(messages\)",
            ),
            ([{"instruction": "a", "output": 3}], {}, r"line 1: the field 'output' is not text but a number"),
            ([{"instruction": "a", "output": " "}], {}, r"line 1: the answer 'output' is empty"),
            (
                [{"messages": "a"}],
                {"column": "messages", "format": "chat"},
                r"line 1: the field 'messages' is not a list of messages but a text",
            ),
            (
                [{"message": CHAT}],
                {"format": "chat"},
                r"no list of messages 'messages' or 'conversations'; it has message .did you mean",
            ),
            (
                [{"q": "a"}],
                {"format": "instruction"},
                r"line 1 has no instruction, prompt, question with one of .*; it has q",
            ),
            (
                [{"messages": CHAT}],
                {"column": "messages", "format": "text"},
                r"the field 'messages' is not text but a list of messages .data.format=chat.",
            ),
            (
                [{"body": None}],
                {"column": "body"},
                r"data.column: a: line 1: the field 'body' is not text but null",
            ),
            (
                [{"conversations": [{"from": "bot", "value": "a"}]}],
                {},
                r"conversations\[0\].from: 'bot' is not one of human, ",
            ),
        ],
    )
    def test_rows_that_cannot_be_read(self, rows, options, expected):
        numbered = [(f"line {number}", row) for number, row in enumerate(rows, start=1)]
        with pytest.raises(DataError, match=expected) as caught:
            document_of("a", numbered, TextRequest(**options))
        assert "\n" not in str(caught.value)


examples_drawn = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 8)).map(
        lambda p: Tokens(torch.arange(p[0]) + 1, torch.arange(p[0]) >= p[1])
    ),
    min_size=1,
    max_size=20,
)


class TestBlocks:
    @settings(max_examples=80, deadline=None)
    @given(examples=examples_drawn, length=st.integers(4, 24), packing=st.booleans())
    def test_every_answer_stands_once_behind_its_own_prompt(self, examples, length, packing):
        """Whatever is scored is a token of one example, behind all of that example that comes before it."""
        numbered = [Tokens(e.ids + 100 * n, e.answer) for n, e in enumerate(examples, start=1)]
        found = make_blocks(numbered, length, packing)
        scored: Counter[int] = Counter()
        assert len(found.tokens) == len(found.scored) == len(found) * length
        for block, mask in zip(found.tokens.view(-1, length), found.scored.view(-1, length), strict=True):
            assert not bool(mask[0])
            for place in mask.nonzero().flatten().tolist():
                token = int(block[place])
                scored[token] += 1
                before = token % 100 - 1
                assert block[place - before : place].tolist() == list(range(token - before, token))
        wanted = Counter(
            int(token)
            for example in numbered
            for token, answer in list(zip(example.ids, example.answer, strict=True))[1:length]
            if answer
        )
        assert scored == wanted
        assert found.examples + found.dropped == len(examples)
        if not packing:
            assert len(found) == found.examples

    def test_packing_wastes_less(self):
        examples = [Tokens(torch.arange(n), torch.arange(n) > 0) for n in (3, 5, 7, 4, 8, 6, 2, 5) * 5]
        assert len(make_blocks(examples, 16, False)) == 40
        packed = make_blocks(examples, 16, True)
        assert len(packed) == -(-sum(len(e.ids) for e in examples) // 16), "200 tokens in 13 sequences"
        assert packed.examples == 40

    def test_what_fills_a_sequence_is_seen_by_nothing_that_is_scored(self):
        found = make_blocks([Tokens(torch.arange(1, 5), torch.arange(4) > 1)] * 2, 10, False)
        assert found.scored.view(2, 10).int().tolist() == [[0, 0, 1, 1] + [0] * 6] * 2


class TestMixing:
    @settings(max_examples=100, deadline=None)
    @given(total=st.integers(0, 400), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
    def test_shares_are_whole_and_near_the_weights(self, total, weights):
        counts = apportioned(total, weights)
        assert sum(counts) == total and min(counts) >= 0
        if total >= len(weights):
            assert min(counts) >= 1
        exact = [total * w / sum(weights) for w in weights]
        assert all(abs(c - e) <= max(1, len(weights)) for c, e in zip(counts, exact, strict=True))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 9)), min_size=1, max_size=5))
    def test_the_largest_total_fits_and_the_next_one_does_not(self, pairs):
        have, weights = zip(*pairs, strict=True)
        total = largest_total(have, weights)
        assert all(c <= h for c, h in zip(apportioned(total, weights), have, strict=True))

    def test_every_beginning_is_mixed(self):
        order = [document for document, _ in in_turns([30, 10])]
        assert [order[:n].count(1) for n in (4, 8, 20, 40)] == [1, 2, 5, 10]


WORDS = "the quick brown fox jumps over the lazy dog while every good boy does fine "


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def asked(number: int) -> dict[str, str]:
    return {"instruction": f"What is {number} and one?", "output": f"It is {number + 1}."}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(WORDS * 200)
    (tmp_path / "ask.jsonl").write_text(lines([asked(n) for n in range(120)]))
    (tmp_path / "alpaca.json").write_text(json.dumps([asked(n) for n in range(500, 560)]))
    (tmp_path / "chat.jsonl").write_text(
        lines([{"messages": [*CHAT[1:2], {"role": "assistant", "content": f"No. {n}"}]} for n in range(60)])
    )
    return tmp_path


def load(data: Path, files: dict[str, Any], template: str | None = PLAIN, **options: Any) -> TextData:
    tokenizer = tokenizer_of(template)
    request = TextRequest(files=files, root=data, **({"length": 48} | options))
    return load_text("text", request, encoder(tokenizer), tokenizer)


class TestFiles:
    def test_only_answers_are_targets_and_splits_share_no_example(self, data):
        found = load(data, {"calibration": "ask.jsonl"}, sizes=(None, 20, 20, 20))
        tokenizer = tokenizer_of()
        said: list[str] = []
        for split in SPLITS:
            part = found.splits[split]
            ids, targets = part.window(0, len(part))
            assert ids.shape == (len(part), 48) and part.scores == "answers only"
            assert int((targets[:, 1:] != IGNORED).sum()) == part.scored
            said += [tokenizer.decode(row[row != IGNORED]) for row in targets]
        assert sorted(said) == sorted(f"It is {n + 1}.<|im_end|>" for n in range(120))
        assert len(found.splits["test"]) == 20 and len(found.splits["train"]) == 60

    def test_the_test_split_is_the_head_of_the_file_and_never_packed(self, data):
        found = load(data, {"calibration": "alpaca.json"}, sizes=(None, 4, 4, 5), length=128, packing=True)
        assert (
            found.splits["test"].scored
            == load(data, {"calibration": "alpaca.json"}, sizes=(None, 4, 4, 5), length=128)
            .splits["test"]
            .scored
        )
        text = tokenizer_of().decode(found.splits["test"].window(0, 1)[0][0])
        assert text.startswith("<|im_start|>user\nWhat is 500 and one?")
        packed, alone = (
            found.splits["train"],
            load(data, {"calibration": "alpaca.json"}, sizes=(None, 4, 4, 5)).splits["train"],
        )
        assert packed.scored / len(packed) > 2 * alone.scored / len(alone)
        assert packed.examples["packed"] and not found.splits["test"].examples["packed"]

    def test_files_are_mixed_by_weight_in_every_beginning(self, data):
        mix = [{"path": "text.txt", "weight": 3}, {"path": "ask.jsonl"}, {"path": "chat.jsonl", "weight": 2}]
        found = load(data, {"train": mix}, sizes=(60, 12, 12, 6))
        for split, count in (("train", 60), ("calibration", 12), ("validation", 12), ("test", 6)):
            part = found.splits[split]
            assert len(part) == count
            _, targets = part.window(0, count)
            whole = (targets[:, 1:] != IGNORED).all(dim=1)
            assert int(whole.sum()) == count // 2, "half of it is running text"
            if count >= 12:
                assert int(whole[:12].sum()) == 6
            assert ", ".join(p.rpartition("/")[2] for p in part.source.split(", ")) == (
                "text.txt (weight 3), ask.jsonl (weight 1), chat.jsonl (weight 2)"
            )

    def test_without_a_size_the_scarcest_file_decides(self, data):
        mix = [{"path": "text.txt", "weight": 1}, {"path": "chat.jsonl", "weight": 1}]
        files = {"train": mix, "calibration": "ask.jsonl", "validation": "ask.jsonl", "test": "alpaca.json"}
        found = load(data, files, sizes=(None, 5, 5, 5))
        assert len(found.splits["train"]) == 2 * 60

    def test_one_text_alone_is_split_as_ever(self, data):
        alone = load(data, {"train": "text.txt"}, sizes=(9, 4, 5, 3))
        listed = load(data, {"train": [{"path": "text.txt", "weight": 7}]}, sizes=(9, 4, 5, 3))
        for split in SPLITS:
            assert alone.splits[split].starts == listed.splits[split].starts
            assert alone.splits[split].scored == len(alone.splits[split]) * 47

    @pytest.mark.parametrize(
        ("files", "options", "expected"),
        [
            ({"train": []}, {}, "data.files.train: an empty list"),
            (
                {"train": [{"path": "ask.jsonl", "weight": 0}]},
                {},
                r"data.files.train\[0\].weight: must be a number above 0, got 0",
            ),
            (
                {"train": [{"path": "ask.jsonl", "weight": "2"}]},
                {},
                r"weight: must be a number above 0, got '2'",
            ),
            (
                {"train": [{"path": "ask.jsonl", "wieght": 2}]},
                {},
                r"data.files.train\[0\].wieght: unknown .did you mean 'weight'",
            ),
            ({"train": [{"weight": 2}]}, {}, r"data.files.train\[0\]: expected a path"),
            ({"train": ["ask.jsonl", "./ask.jsonl"]}, {}, "ask.jsonl stands there twice"),
            (
                {"train": {"path": "ask.jsonl", "format": "chats"}},
                {},
                "data.files.train.format: 'chats' is not one of .*did you mean 'chat'",
            ),
            (
                {"train": "ask.jsonl", "test": {"path": "ask.jsonl", "format": "chat"}},
                {},
                "is given twice, with another format",
            ),
            (
                {"train": "text.txt"},
                {"format": "chat"},
                "data.format: .*text.txt is running text; 'chat' is read from",
            ),
            ({"train": "text.txt"}, {"packing": True}, "data.packing: is for conversations and instructions"),
            ({"train": "text.txt"}, {"answers_only": False}, "data.answers_only: is for conversations"),
            ({"train": "ask.jsonl"}, {"stride": 8}, "data.stride: .*ask.jsonl holds examples"),
            (
                {"train": "text.txt", "test": ["ask.jsonl", "text.txt"]},
                {"stride": 8},
                "data.stride: windows overlap in one text only",
            ),
            (
                {"train": "ask.jsonl"},
                {"length": 8},
                "data.test: 1 examples asked for, .* has 0 with an answer in the first 8 tokens",
            ),
            (
                {"train": "ask.jsonl"},
                {"sizes": (None, 200, 5, 5)},
                r"data.calibration: 1 train \+ 200 calibration \+ 5 validation sequences of examples do not fit",
            ),
            (
                {"train": "ask.jsonl"},
                {"sizes": (None, 2, 5, 500)},
                "data.test: 500 examples asked for, but .* has 120 with",
            ),
        ],
    )
    def test_settings_that_do_not_fit(self, data, files, options, expected):
        with pytest.raises(RlpruneError, match=expected) as caught:
            load(data, files, **options)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, (ConfigError, DataError))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{}", "a .json file must hold a list of objects"),
            ("[{", "truncated or not JSON"),
            ("[]", "holds no text"),
            ("[3]", "entry 1 has no fields; it is no object"),
        ],
    )
    def test_json_files(self, data, content, expected):
        (data / "a.json").write_text(content)
        with pytest.raises(DataError, match=expected):
            load(data, {"train": "a.json"})


def test_hub_data_sets_of_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt_id": n, "messages": [CHAT[1], {"role": "assistant", "content": f"No. {n}"}]}
        for n in range(40)
    ]
    parts = {"train": rows, "test": rows[:1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: parts)
    tokenizer = tokenizer_of()
    request = TextRequest(download=True, length=64, sizes=(None, 3, 3, 1))
    found = load_text("hub:org/chats", request, encoder(tokenizer), tokenizer)
    assert found.splits["test"].scores == "answers only" and len(found.splits["train"]) == 34
    monkeypatch.setitem(parts, "train", [*rows, {"prompt_id": 3}])
    with pytest.raises(DataError, match="hub:org/chats train: row 41 has no field 'messages'"):
        load_text("hub:org/chats", request, encoder(tokenizer), tokenizer)
