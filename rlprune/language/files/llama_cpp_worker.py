"""Runs in a process of its own: ``python llama_cpp_worker.py JOB.npz ANSWER.npz`` asks llama.cpp about one GGUF file.

llama.cpp ends the whole process where a file breaks its assertions, so nothing else may live in it. This file
imports nothing of rlprune.

The job holds ``path`` and ``threads``, ``blocks`` (N, L) of token ids, ``prompt`` (P,), how many tokens to
``generate``, ``keep``, and ``text``. The answer holds ``losses`` (N, L - 1) in nats, with ``keep`` the ``logits``
(N, L, V), ``tokens`` as generated greedily after the prompt, ``text_ids`` (the text as the file's vocabulary has it),
``prefill`` and ``decode`` in tokens a second, and llama-cpp-python's ``version``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np


def main(job_path: str, answer_path: str) -> None:
    import llama_cpp

    job = dict(np.load(job_path))
    blocks, prompt = job["blocks"], job["prompt"]
    count, keep = int(job["generate"]), bool(job["keep"])
    longest = max(blocks.shape[1], len(prompt) + count, 1)
    model: Any = llama_cpp.Llama(
        str(job["path"]), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False,
        n_threads=int(job["threads"]), n_threads_batch=int(job["threads"]), use_mmap=True,
    )  # fmt: skip
    answer: dict[str, Any] = {"version": llama_cpp.__version__}
    losses, logits = [], []
    started, seconds = 0.0, 0.0
    for block in blocks:
        model.reset()
        started = time.perf_counter()
        model.eval(block.tolist())
        seconds += time.perf_counter() - started
        found = np.array(model.scores[: len(block)], dtype=np.float32)
        losses.append(_losses(found, block))
        if keep:
            logits.append(found)
    answer["losses"] = np.array(losses)
    answer["prefill"] = blocks.size / seconds if seconds else 0.0
    if keep:
        answer["logits"] = np.array(logits)
    if len(prompt):
        answer["tokens"], answer["decode"] = _greedy(model, prompt.tolist(), count)
    if str(job["text"]):
        answer["text_ids"] = np.array(
            model.tokenize(str(job["text"]).encode(), add_bos=False), dtype=np.int64
        )
    np.savez(answer_path, **answer)


def _losses(logits: np.ndarray[Any, Any], block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The loss (L - 1,) of every token but the first, in nats."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(axis=1, keepdims=True)
    whole = np.log(np.exp(rows - top).sum(axis=1)) + top[:, 0]
    found: np.ndarray[Any, Any] = whole - rows[np.arange(len(rows)), block[1:]]
    return found


def _greedy(model: Any, prompt: list[int], count: int) -> tuple[np.ndarray[Any, Any], float]:
    """The likeliest tokens after a prompt, one by one, and tokens a second."""
    model.reset()
    model.eval(prompt)
    tokens, place = [], len(prompt)
    started = time.perf_counter()
    for _ in range(count):
        tokens.append(int(np.argmax(model.scores[place - 1])))
        model.eval(tokens[-1:])
        place += 1
    seconds = time.perf_counter() - started
    return np.array(tokens, dtype=np.int64), count / seconds if count else 0.0


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules have the names of packages
    main(*sys.argv[1:])
