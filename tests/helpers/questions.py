"""Made-up files of multiple-choice questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from rlprune.language.zeroshot import Question

WORDS = "the cat sat on a mat while rain fell over green hills and Question Answer : ? 1 2".split()

plain_text = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=30).map(
    lambda text: " ".join(text.split())
)


def instruction(text: str, choices: tuple[str, ...], word: str = "Answer") -> str:
    listed = " ".join(f"{word}{i}: {choice}" for i, choice in enumerate(choices, 1))
    labels = "/".join(f"{word.lower()}{i}" for i in range(1, len(choices) + 1))
    return f"Please choose the correct {word.lower()} to the question: {text}\n\n{listed}\n\nAnswer format: {labels}"


def write(path: Path, questions: list[Question]) -> Path:
    entries = [
        {"instruction": instruction(q.text, q.choices), "input": "", "answer": f"answer{q.answer + 1}"}
        for q in questions
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def made_up(count: int, seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)

    def phrase(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    questions = []
    for _ in range(count):
        choices = tuple(f"{phrase(1, 6)} {{{{{i}}}}}" for i in range(rng.integers(2, 6)))
        questions.append(Question(phrase(3, 9) + "?", choices, int(rng.integers(len(choices)))))
    return questions


choices = st.lists(plain_text.filter(lambda t: t and ":" not in t and "/" not in t), min_size=2, max_size=5)
