"""What llama.cpp computes from a GGUF file, compared with what PyTorch computes from the same weights.

llama.cpp is asked through its Python package (llama-cpp-python), because that gives the logits of every token; its
programs print perplexities of their own protocol only. It is nothing that rlprune depends on: where it is not installed
nothing is compared, and the export says so.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llama_cpp"
INSTALL = "pip install llama-cpp-python"
_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_LIMIT_SECONDS = 3600
# How far apart the logits may be, as the root mean square of the difference over that of the centred logits. Float16
# arithmetic and a cache in float16 give up to 0.01; a wrong layout of the rotation gives about 1. What 8 bits cost is a
# matter of the model (0.04 of SmolLM2, more of one that pruning has broken): it is printed, for the user to judge.
_ALLOWED = {"f32": 0.05, "f16": 0.05, "bf16": 0.08, "q8_0": 0.5}


class WrongBuild(ArtifactError):
    """The installed llama.cpp uses instructions that this machine does not have; it says nothing of the file."""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp said of a file: mean loss in nats, greedy tokens, tokens a second, logits where they were kept."""

    losses: np.ndarray[Any, np.dtype[np.float64]]
    tokens: list[int]
    prefill: float
    decode: float
    version: str
    logits: Tensor | None = None
    text_ids: list[int] | None = None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True)
class Comparison:
    """llama.cpp compared with PyTorch on the same tokens."""

    ours: float
    theirs: float
    same: int
    generated: int
    apart: float
    scored: int
    version: str
    same_text: bool | None

    def line(self) -> str:
        text = (
            f"run in llama.cpp (llama-cpp-python {self.version}): loss {self.theirs:.4f}, PyTorch {self.ours:.4f} over "
            f"{self.scored} tokens; the first {self.same} of {self.generated} greedy tokens equal; logits apart by "
            f"{self.apart:.2%} of their spread"
        )
        if self.same_text is False:
            text += "; llama.cpp splits the text into other tokens than the folder's tokenizer"
        return text


def is_installed() -> bool:
    """Whether llama.cpp can be asked."""
    return importlib.util.find_spec(PACKAGE) is not None


def run_llama_cpp(
    path: Path,
    blocks: Sequence[Sequence[int]],
    prompt: Sequence[int] = (),
    generate: int = 0,
    *,
    keep: bool = False,
    text: str = "",
    threads: int = 1,
) -> Answer:
    """Let llama.cpp read ``blocks`` (N, L) of token ids and continue ``prompt``, in a process of its own.

    Raises ArtifactError: llama.cpp refuses the file, or ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.npz", Path(folder) / "answer.npz"
        np.savez(
            job, path=str(path), blocks=np.array(blocks, dtype=np.int64), prompt=np.array(prompt, dtype=np.int64),
            generate=generate, keep=keep, text=text, threads=threads,
        )  # fmt: skip
        command = [sys.executable, str(_WORKER), str(job), str(answer)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"{path}: llama.cpp does not answer within an hour") from error
        if done.returncode == -signal.SIGILL:
            raise WrongBuild("the installed llama.cpp was built for another processor than this one")
        if done.returncode or not answer.is_file():
            raise ArtifactError(f"{path}: llama.cpp cannot run it ({_reason(done.stderr, done.returncode)})")
        found = dict(np.load(answer))
    return Answer(
        found["losses"],
        found["tokens"].tolist() if "tokens" in found else [],
        float(found["prefill"]),
        float(found.get("decode", 0.0)),
        str(found["version"]),
        torch.from_numpy(found["logits"]) if keep else None,
        found["text_ids"].tolist() if "text_ids" in found else None,
    )


def _reason(text: str, code: int) -> str:
    """What llama.cpp said last of an error; the signal that ended it, where it said nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0 and not any("error" in line.lower() or "GGML_ASSERT" in line for line in lines):
        return f"ended by {signal.Signals(-code).name}"
    telling = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line] or lines
    return telling[-1][:200] if telling else f"exit code {code}"


def compare(
    slim: PreTrainedModel, path: Path, dtype: str, ids: Sequence[int], generate: int, text: str = ""
) -> Comparison:
    """Loss, logits and greedy tokens of a written file compared with the model's own on one sequence.

    Args:
        ids: the tokens that are read (L); the first half of them is the prompt that is continued.
        generate: how many tokens.
        text: what ``ids`` are the tokens of, where they are a text's.

    Raises ArtifactError: llama.cpp cannot run the file, or its logits are others.
    """
    half = max(1, len(ids) // 2)
    threads = torch.get_num_threads()
    answer = run_llama_cpp(path, [ids], ids[:half], generate, keep=True, text=text, threads=threads)
    with torch.no_grad():
        logits = slim(input_ids=torch.tensor([list(ids)])).logits[0].float()
    assert answer.logits is not None
    wanted = logits - logits.mean(dim=-1, keepdim=True)
    found = answer.logits[0] - answer.logits[0].mean(dim=-1, keepdim=True)
    apart = float((wanted - found).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-12))
    if not apart <= _ALLOWED[dtype]:
        raise ArtifactError(
            f"{path}: llama.cpp computes other logits than PyTorch (apart by {apart:.1%} of their spread, allowed "
            f"{_ALLOWED[dtype]:.0%})"
        )
    own = greedy_tokens(slim, ids[:half], generate)
    same = next((i for i, (a, b) in enumerate(zip(own, answer.tokens, strict=True)) if a != b), len(own))
    targets = torch.tensor(ids[1:])
    return Comparison(
        float(functional.cross_entropy(logits[:-1], targets)), answer.loss, same, len(own), apart, len(targets),
        answer.version, None if answer.text_ids is None else answer.text_ids == list(ids),
    )  # fmt: skip


def greedy_tokens(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest ``count`` tokens after a prompt, with the model's own cache; no token ends them."""
    tokens: list[int] = []
    given = torch.tensor([list(prompt)])
    cache: dict[str, Any] = {}
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=given, use_cache=True, **cache)
            name = "cache" if "cache" in out else "past_key_values"  # as versions of transformers have it
            cache = {name: out[name]}
            tokens.append(int(out.logits[0, -1].argmax()))
            given = torch.tensor([tokens[-1:]])
    return tokens
