"""Zero-shot accuracy: the harness's figures against a plain loop over log-probabilities; malformed files."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.questions import WORDS, choices, instruction, made_up, plain_text, write
from rlprune.errors import ConfigError, DataError, RlpruneError
from rlprune.language import zeroshot
from rlprune.language.zeroshot import Question, read_questions

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def tiny(vocabulary: int = 300) -> tuple[Any, Any]:
    """A random Llama and a byte-level tokenizer of 290 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.5,  # lively: choices must differ in likelihood
        )
    )
    return model, PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=None)


def plain_accuracy(model: Any, tokenizer: Any, questions: list[Question]) -> tuple[float, float]:
    """The same without the harness: one forward pass a choice, log-probabilities added up token by token."""
    right, right_norm = 0, 0
    for q in questions:
        context = tokenizer.encode(f"Question: {q.text}\nAnswer:")
        scores = []
        for choice in q.choices:
            whole = tokenizer.encode(f"Question: {q.text}\nAnswer: {choice}")
            with torch.no_grad():
                log = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            scores.append(sum(float(log[t - 1, whole[t]]) for t in range(len(context), len(whole))))
        lengths = [len(choice) for choice in q.choices]
        right += int(np.argmax(scores)) == q.answer
        right_norm += int(np.argmax(np.array(scores) / lengths)) == q.answer
    return right / len(questions), right_norm / len(questions)


def test_accuracy_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    model, tokenizer = tiny()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = made_up(30, 1), made_up(12, 2)
    files = [write(tmp_path / "first.json", first), write(tmp_path / "second.json", second)]
    rows = zeroshot.accuracy(model, tokenizer, files, batch_size=4)
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()
    assert [row.task for row in rows] == ["first", "second"]
    for row, questions in zip(rows, (first, second), strict=True):
        acc, norm = plain_accuracy(model, tokenizer, questions)
        assert (row.acc, row.acc_norm) == (pytest.approx(acc), pytest.approx(norm))
        assert row.questions == len(questions)
        assert row.chance == pytest.approx(np.mean([1 / len(q.choices) for q in questions]))
        # Standard error of a mean of zeros and ones.
        assert row.acc_stderr == pytest.approx(math.sqrt(acc * (1 - acc) / (len(questions) - 1)))
        assert row.acc_norm_stderr == pytest.approx(math.sqrt(norm * (1 - norm) / (len(questions) - 1)))
    few = zeroshot.accuracy(model, tokenizer, files, limit=5)
    assert few[0].questions == 5
    assert (few[0].acc, few[0].acc_norm) == pytest.approx(plain_accuracy(model, tokenizer, first[:5]))
    single = zeroshot.accuracy(model, tokenizer, files[1:], limit=1)[0]
    assert math.isnan(single.acc_stderr)
    lines = zeroshot.table({"dense": rows, "pruned": few})
    assert [line.split()[:3] for line in lines[1:]] == [
        ["first", "dense", "30"], ["first", "pruned", "5"], ["second", "dense", "12"], ["second", "pruned", "5"]
    ]  # fmt: skip
    assert f"{rows[0].chance:.4f}" in lines[1]


@given(plain_text.filter(bool), choices, st.integers(0, 4), st.sampled_from(["Answer", "Solution", "Ending"]))
def test_what_was_written_is_read(text: str, given_choices: list[str], answer: int, word: str) -> None:
    import tempfile

    answer %= len(given_choices)
    # A question's own paragraph may look like a choice.
    question = f"{text} Answer1: here?"
    entry = {
        "instruction": instruction(question, tuple(given_choices), word),
        "answer": f"{word.lower()}{answer + 1}",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q.json"
        path.write_text(json.dumps([entry]), encoding="utf-8")
        assert read_questions(path) == [Question(question, tuple(given_choices), answer)]


GOOD = {"instruction": instruction("Why?", ("so", "thus")), "answer": "answer1"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"instr', "truncated or not JSON"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
        (b"[" * 100_000, "truncated or not JSON"),
        ({"a": 1}, "must hold a list"),
        ([], "must hold a list"),
        ([GOOD, "text"], "question 2: must be an object"),
        ([{"instruktion": "x", "answer": "answer1"}], "'instruction' is missing"),
        ([GOOD, {**GOOD, "answer": 1}], "question 2: the field 'answer' is not a text"),
        ([{**GOOD, "answer": "answer3"}], "question 1: answer 'answer3': allowed: answer1, answer2"),
        ([{**GOOD, "instruction": "Why?\n\nAnswer1: so Answer2: thus"}], "does not end in 'Answer format:"),
        ([{**GOOD, "instruction": "Why?\n\nAnswer1: so\n\nAnswer format: answer1"}], "two or more"),
        ([{**GOOD, "instruction": "Why?\n\nAnswer format: true/false"}], "has no choice 'true: ...'"),
        ([{**GOOD, "instruction": GOOD["instruction"].replace(" thus", "")}], "'answer2' is empty"),
        ([{**GOOD, "instruction": instruction("", ("a", "b"))[52:]}], "no question before"),
    ],
)
def test_malformed_files(content: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny()
    file = write(tmp_path / "q.json", made_up(2, 0))

    def refused(call: Callable[[], object], kind: type[RlpruneError], expected: str) -> None:
        with pytest.raises(kind, match=expected):
            call()

    refused(lambda: zeroshot.accuracy(model, tokenizer, []), ConfigError, "at least one file")
    refused(lambda: zeroshot.accuracy(model, tokenizer, str(file)), ConfigError, "list")
    refused(lambda: zeroshot.accuracy(model, tokenizer, [file], limit=0), ConfigError, "limit")
    refused(lambda: zeroshot.accuracy(model, tokenizer, [file], batch_size=0), ConfigError, "batch_size")
    refused(lambda: zeroshot.accuracy(model, tokenizer, [file, file]), ConfigError, "two files")
    refused(lambda: zeroshot.accuracy(model, tokenizer, [tmp_path / "no.json"]), DataError, "no such file")
    refused(lambda: zeroshot.accuracy(model, tokenizer, [tmp_path]), DataError, "cannot be read")
    small, _ = tiny(vocabulary=200)
    refused(lambda: zeroshot.accuracy(small, tokenizer, [file]), DataError, "embeds 200 tokens")
    refused(lambda: zeroshot.accuracy(torch.nn.Linear(2, 2), tokenizer, [file]), DataError, "not a transf")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(lambda: zeroshot.accuracy(model, tokenizer, [file]), ConfigError, r"rlprune\[zeroshot\]")


class TestNamedTasks:
    """Tasks of the harness by name; its index of 13,000 tasks is not built here but for the slow test."""

    @pytest.fixture
    def index(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        pytest.importorskip("lm_eval")
        datasets = pytest.importorskip("datasets")
        from lm_eval.api.task import ConfigurableTask

        rows = [
            {
                "question": f"{word}?",
                "choices": {"text": list(words), "label": ["A", "B", "C"]},
                "answerKey": "B",
            }
            for word, words in zip(WORDS, zip(WORDS[1:], WORDS[2:], WORDS[3:], strict=False), strict=False)
        ]
        there = {"allenai/ai2_arc": datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})}

        def load(path: str, name: str | None = None, **options: object) -> Any:
            if path not in there:
                raise ConnectionError(f"Couldn't reach {path!r} on the Hub (OfflineModeIsEnabled)")
            return there[path]

        def made(kind: str, path: str) -> Any:
            return ConfigurableTask(
                config={
                    "task": "arc_easy", "dataset_path": path, "output_type": kind, "test_split": "test",
                    "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices.text}}",
                    "doc_to_target": "{{choices.label.index(answerKey)}}", "num_fewshot": 5,
                }
            )  # fmt: skip

        class Index:
            all_groups, all_tags = ("mmlu",), ("ai2_arc",)
            all_subtasks = ("arc_easy", "gsm8k", "piqa")

            def load(self, names: list[str]) -> Any:
                kind = "generate_until" if names == ["gsm8k"] else "multiple_choice"
                return {"tasks": {names[0]: made(kind, "piqa" if names == ["piqa"] else "allenai/ai2_arc")}}

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(zeroshot, "_manager", Index)
        zeroshot.read_named.cache_clear()
        yield rows
        zeroshot.read_named.cache_clear()

    def test_a_task_by_name_is_what_its_questions_in_a_file_are(self, index: Any, tmp_path: Path) -> None:
        model, tokenizer = tiny()
        questions = [Question(row["question"], tuple(row["choices"]["text"]), 1) for row in index]
        wanted = plain_accuracy(model, tokenizer, questions[:6])
        write(tmp_path / "mine.json", questions)
        named, mine = zeroshot.accuracy(model, tokenizer, ["arc_easy", tmp_path / "mine.json"], limit=6)
        assert (named.task, named.questions, named.chance) == ("arc_easy", 6, pytest.approx(1 / 3))
        assert (named.acc, named.acc_norm) == pytest.approx(wanted)
        assert (mine.acc, mine.acc_norm, mine.questions) == (named.acc, named.acc_norm, 6)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (
                "arc_esay",
                "tasks: arc_esay: no such file, and no task of lm-evaluation-harness .did you mean 'arc_easy'",
            ),
            ("mmlu", "tasks: mmlu: is a group of tasks of lm-evaluation-harness; name single ones"),
            ("gsm8k", "tasks: gsm8k: is of type generate_until; only multiple-choice tasks"),
            ("piqa", "tasks: piqa: its data cannot be read, and nothing is fetched .Couldn't reach 'piqa'"),
        ],
    )
    def test_tasks_that_cannot_be_asked(self, index: Any, name: str, expected: str) -> None:
        assert zeroshot.is_task_name(name)
        with pytest.raises(DataError, match=expected) as caught:
            zeroshot.read_named(name)
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_a_real_task_without_its_data(self) -> None:
        with pytest.raises(DataError, match="tasks: arc_easy: its data cannot be read, .*allenai/ai2_arc"):
            zeroshot.read_named("arc_easy")
