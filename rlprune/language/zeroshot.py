"""Zero-shot accuracy on multiple-choice tasks, by lm-evaluation-harness on the model in memory.

The harness (extra ``zeroshot``) does the scoring, so the figures are its own ``acc`` and ``acc_norm``. A task is one of
the harness's by name, with its own prompt, where its data is in the cache; or a local file of questions, asked with the
prompt of its ARC tasks. Nothing is fetched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigError, DataError, near_miss, one_line
from ..utils.reading import special_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = re.compile(r"Please choose the correct \w+ to [^:\n]*: ")
_FORMAT = re.compile(r"\s*Answer format:(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; ``answer`` is the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class _Asked:
    """A task as the harness runs it, its questions, and what guessing gives."""

    task: Any
    count: int
    chance: float


@dataclass(frozen=True)
class Accuracy:
    """A model's accuracy on the questions of one file, or of one task of the harness.

    ``acc`` takes the choice with the highest log-likelihood, ``acc_norm`` the one with the highest
    log-likelihood per character; ``chance`` is what guessing gives. The standard errors are those of a mean
    over the questions (NaN for a single one).
    """

    task: str
    questions: int
    chance: float
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str | Path],
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Accuracy]:
    """Accuracy of a causal language model on each task, without examples in the prompt.

    A task of the harness (a name such as ``arc_easy``) is asked as the harness asks it. A file's question is asked
    as ``Question: TEXT\\nAnswer:`` and each choice's text is scored as what follows, by EleutherAI's
    lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, task `arc_easy`).

    Args:
        model: a transformers causal LM, pruned or not; put into eval mode for the time, never changed.
        tokenizer: its tokenizer; not changed.
        files: files of questions (see `read_questions`), and names of tasks (see `read_named`).
        limit: only the first ``limit`` questions of each; None for all.
        batch_size: sequences in a forward pass.

    Raises:
        ConfigError: lm-eval is not installed, or a number is out of range.
        DataError: a malformed file, or a tokenizer that does not fit the model.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: must be at least 1, got {number}")
    questions = _named(files, limit)
    prefix = _check_tokenizer(model, tokenizer)
    require_harness()
    training = model.training
    try:
        with _offline(), _quiet():
            tasks = {name: _asked(name, found, limit) for name, found in questions.items()}
            results = _harness(model, tokenizer, tasks, batch_size, prefix, limit)
    finally:
        model.train(training)
    return [_row(name, asked, results[name]) for name, asked in tasks.items()]


def is_task_name(task: str | Path) -> bool:
    """Whether a task is meant by its name in the harness: no file is there, and none would be called so."""
    path = Path(task)
    return path.name == str(task) and not path.suffix and not path.exists()


@functools.cache
def read_named(name: str) -> Any:
    """A task of the harness, with its data from the cache of `datasets`.

    Raises DataError: no task of that name, a group of tasks, one that is not multiple choice, or data that are not on
    this machine.
    """
    require_harness()
    with _offline(), _quiet():
        manager = _manager()
        if name in (*manager.all_groups, *manager.all_tags):
            raise DataError(f"tasks: {name}: is a group of tasks of lm-evaluation-harness; name single ones")
        if name not in manager.all_subtasks:
            miss = near_miss(name, manager.all_subtasks)
            raise DataError(f"tasks: {name}: no such file, and no task of lm-evaluation-harness{miss}")
        try:
            task = manager.load([name])["tasks"][name]
        except Exception as error:  # whatever the hub, the cache or a task's own code raises
            raise DataError(
                f"tasks: {name}: its data cannot be read, and nothing is fetched ({one_line(error, 160)}); load it "
                "once by `datasets`, or give a file of questions"
            ) from error
    if task.OUTPUT_TYPE != "multiple_choice":
        raise DataError(
            f"tasks: {name}: is of type {task.OUTPUT_TYPE}; only multiple-choice tasks are measured"
        )
    task.set_config(key="num_fewshot", value=0)
    return task


@functools.cache
def _manager() -> Any:
    """The index of the harness's tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON file: a list of objects with the fields ``instruction`` and ``answer``.

    The instruction holds question and choices, in the form of the LLM-Adapters files (Hu et al. 2023)::

        Please choose the correct answer to the question: TEXT

        Answer1: CHOICE Answer2: CHOICE

        Answer format: answer1/answer2

    Raises DataError naming the file, the number of the question (from 1) and what is allowed.
    """
    if (kind := special_kind(Path(path))) is not None:
        raise DataError(f"tasks: {path}: is a {kind}, where a file is to be read")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"tasks: {path}: no such file") from None
    except OSError as error:
        raise DataError(f"tasks: {path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise DataError(f"tasks: {path}: truncated or not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"tasks: {path}: must hold a list of at least one question")
    return [_question(entry, f"tasks: {path}: question {i}") for i, entry in enumerate(entries, 1)]


def table(results: Mapping[str, Sequence[Accuracy]]) -> list[str]:
    """Lines of text: for each task one line a model, with chance and the number of questions as well."""
    models = list(results)
    width = max([len(r.task) for rows in results.values() for r in rows] + [len("task")])
    lines = [f"{'task':<{width}}  {'model':<8} {'questions':>9} {'chance':>7}  {'acc':<16} acc_norm"]
    for rows in zip(*results.values(), strict=True):
        for name, r in zip(models, rows, strict=True):
            acc, norm = _with_error(r.acc, r.acc_stderr), _with_error(r.acc_norm, r.acc_norm_stderr)
            lines.append(f"{r.task:<{width}}  {name:<8} {r.questions:>9} {r.chance:>7.4f}  {acc:<16} {norm}")
    return lines


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _question(entry: object, where: str) -> Question:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object with the fields 'instruction' and 'answer'")
    for field in ("instruction", "answer"):
        if not isinstance(entry.get(field), str):
            state = "is missing" if field not in entry else "is not a text"
            raise DataError(f"{where}: the field {field!r} {state}{near_miss(field, entry)}")
    found = _FORMAT.search(entry["instruction"])
    if found is None:
        raise DataError(f"{where}: the instruction does not end in 'Answer format: answer1/answer2/...'")
    labels = [label.strip() for label in found[1].split("/")]
    if len(labels) < 2 or not all(labels) or len(set(labels)) != len(labels):
        raise DataError(
            f"{where}: 'Answer format:{found[1]}' must name two or more answers with / between them"
        )
    text, choices = _split(entry["instruction"][: found.start()], labels, where)
    if entry["answer"] not in labels:
        raise DataError(f"{where}: answer {entry['answer']!r}: allowed: {', '.join(labels)}")
    return Question(text, choices, labels.index(entry["answer"]))


def _split(body: str, labels: Sequence[str], where: str) -> tuple[str, tuple[str, ...]]:
    """Question and choices of ``QUESTION Label1: CHOICE Label2: CHOICE``."""
    # The choices are the last paragraph; a question's own text may hold the word "Answer1:".
    start = body.rfind("\n\n") + 2 if "\n\n" in body else 0
    marks = []
    for label in labels:
        mark = re.compile(rf"(?<!\S){re.escape(label)}:", re.IGNORECASE).search(body, start)
        if mark is None:
            raise DataError(f"{where}: the instruction has no choice '{label}: ...' after its question")
        marks.append(mark)
        start = mark.end()
    ends = [mark.start() for mark in marks[1:]] + [len(body)]
    choices = tuple(body[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
    for label, choice in zip(labels, choices, strict=True):
        if not choice:
            raise DataError(f"{where}: the choice {label!r} is empty")
    text = _PREFIX.sub("", body[: marks[0].start()].strip(), count=1)
    if not text:
        raise DataError(f"{where}: the instruction holds no question before its choices")
    return text, choices


def _named(files: Sequence[str | Path], limit: int | None) -> dict[str, list[Question] | None]:
    """The questions of each file; None for a task of the harness."""
    if isinstance(files, (str, Path)) or not files:
        raise ConfigError("tasks: give a list of at least one file")
    tasks: dict[str, list[Question] | None] = {}
    for file in files:
        name = Path(file).stem
        if name in tasks:
            raise ConfigError(f"tasks: two files are named {name!r}")
        tasks[name] = None if is_task_name(file) else read_questions(file)[:limit]
    return tasks


def _asked(name: str, questions: Sequence[Question] | None, limit: int | None) -> _Asked:
    """A task for the harness to run: its own, or one made of questions."""
    if questions is not None:
        from lm_eval.api.task import ConfigurableTask

        chance = sum(1 / len(q.choices) for q in questions) / len(questions)
        return _Asked(ConfigurableTask(config=_task(name, questions)), len(questions), chance)
    task = read_named(name)
    choices = [len(task.doc_to_choice(doc)) for doc in itertools.islice(task.eval_docs, limit)]
    return _Asked(task, len(choices), sum(1 / count for count in choices) / len(choices))


def _check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the harness takes for a text's start; refuses a tokenizer of another model."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None:
        raise DataError(f"tasks: {type(model).__name__} is not a transformers causal language model")
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise DataError(
            f"tokenizer: gives token ids up to {largest}, but the model embeds {rows} tokens: "
            "it is the tokenizer of another model"
        )
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return next((token for token in special if token is not None), 0)


def require_harness() -> None:
    """Raise ConfigError where lm-eval is not installed."""
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tasks: lm-eval is not installed ({error}); pip install 'rlprune[zeroshot]'"
        ) from error


def _harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, _Asked],
    batch_size: int,
    prefix: int,
    limit: int | None,
) -> dict[str, Any]:
    """The harness's own results: {task: {"acc,none": ..., "acc_stderr,none": ..., ...}}."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness may add a padding token to the tokenizer that it gets, hence the copy.
    language_model = HFLM(
        pretrained=model,  # type: ignore[arg-type]
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=prefix,
        softmax_dtype="float32",
    )
    built = {name: asked.task for name, asked in tasks.items()}
    results = evaluate(lm=language_model, task_dict=built, limit=limit, log_samples=False)
    assert results is not None  # only the further processes of a distributed run get none
    return dict(results["results"])


def _task(name: str, questions: Sequence[Question]) -> dict[str, Any]:
    """The harness's description of a task over questions in memory."""

    def dataset(**_: object) -> Any:
        from datasets import Dataset, DatasetDict

        rows = [{"text": q.text, "choices": list(q.choices), "answer": q.answer} for q in questions]
        return DatasetDict({"test": Dataset.from_list(rows)})

    metrics = ("acc", "acc_norm")
    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        # Functions, not templates: a question may hold braces.
        "doc_to_text": lambda doc: f"Question: {doc['text']}\nAnswer:",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["answer"],
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "num_fewshot": 0,
        "metadata": None,
    }


def _row(name: str, asked: _Asked, result: Mapping[str, object]) -> Accuracy:
    def number(key: str) -> float:
        value = result.get(f"{key},none")
        return float(value) if isinstance(value, (int, float)) else float("nan")

    values = [number(key) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")]
    return Accuracy(name, asked.count, asked.chance, *values)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched while active: neither by libraries imported already nor by those to come."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    flags = (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"))
    loaded = [(sys.modules[module], flag) for module, flag in flags if module in sys.modules]
    old = [getattr(module, flag, None) for module, flag in loaded]
    for module, flag in loaded:
        setattr(module, flag, True)
    try:
        yield
    finally:
        for (module, flag), value in zip(loaded, old, strict=True):
            setattr(module, flag, value)
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of every default it takes; its errors still come as exceptions."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
