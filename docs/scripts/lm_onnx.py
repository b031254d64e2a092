"""A pruned language model in onnxruntime against PyTorch: logits, greedy tokens, speed, size; writes docs/lm-onnx.md.

    python docs/scripts/lm_onnx.py --model SmolLM2-135M-Instruct.Q4_1.gguf --valid wikitext2_valid.txt \
        --test wikitext2_test.txt --out runs/lm-onnx

Prunes by a rule (`--rule`, to `--budget` of the parameters), exports, and compares on the head of the test text; the
oracle is transformers' own cache and `generate`. A folder that is there is used again. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoTokenizer

import rlprune
from rlprune.utils import hardware

PAGE = Path(__file__).parent.parent / "lm-onnx.md"
LENGTHS = (1, 17, 128, 512)
GREEDY = 32


def command(*words: str) -> str:
    """What a command of rlprune prints."""
    run = subprocess.run([sys.executable, "-m", "rlprune", *words], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return run.stdout.strip().splitlines()[-1]


class File:
    """The exported file, fed by hand."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.past = [e for e in self.session.get_inputs() if e.name.startswith("past_key_values")]

    def __call__(
        self, ids: np.ndarray, past: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        if past is None:
            past = [np.zeros((1, e.shape[1], 0, e.shape[3]), np.float32) for e in self.past]
        before, length = past[0].shape[2], ids.shape[1]
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": np.ones((1, before + length), np.int64),
            "position_ids": np.arange(before, before + length)[None],
        }
        given |= {entry.name: array for entry, array in zip(self.past, past, strict=True)}
        logits, *present = self.session.run(None, given)
        return logits, present

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        logits, past = self(ids)
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            logits, past = self(np.array([[found[-1]]]), past)
            found.append(int(logits[0, -1].argmax()))
        return found


def seconds(action: Any, rounds: int = 3) -> float:
    """Median seconds, the first time not counted."""
    action()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measured(model: Any, file: File, ids: torch.Tensor) -> list[str]:
    """Rows of the table."""
    rows = []
    for length in LENGTHS:
        part = ids[:, :length]
        with torch.no_grad():
            wanted = model(part, use_cache=False).logits.numpy()
            ours = seconds(lambda part=part: model(part, use_cache=False))
        found, _ = file(part.numpy())
        theirs = seconds(lambda part=part: file(part.numpy()))
        apart = np.abs(found - wanted).max()
        rows.append(
            f"| prompt of {length} | {apart:.1e} | {np.abs(wanted).max():.1f} | {ours:.2f} s | {theirs:.2f} s |"
        )
    with torch.no_grad():
        cache = model(ids[:, :64], use_cache=True)
        name = "cache" if "cache" in cache else "past_key_values"
        wanted = model(ids[:, 64:65], use_cache=True, **{name: cache[name]}).logits.numpy()
    _, past = file(ids[:, :64].numpy())
    found, _ = file(ids[:, 64:65].numpy(), past)
    rows.append(
        f"| one token after 64 | {np.abs(found - wanted).max():.1e} | {np.abs(wanted).max():.1f} | | |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rule", default="flap")
    parser.add_argument("--budget", default="80%")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pruned, target = args.out / "pruned", args.out / "small.onnx"
    sets = [
        f"model.name=hf:{args.model}", f"data.files.calibration={args.valid}", f"data.files.test={args.test}",
        "prune.importance=flap", "prune.round_to=1", "recovery.steps=[reconstruct]", "recovery.shrink=0.2",
        "data.calibration=16", "data.sequence_length=128", "threads=1",
    ]  # fmt: skip
    if not (pruned / "plan.json").is_file():
        words = ["prune", "smollm2_135m", "--rule", args.rule, "--budget", args.budget, "--out", str(pruned)]
        command(*words, *(word for text in sets for word in ("--set", text)))
    said = command("export", str(pruned), "--to", "onnx", "--out", str(target))
    model: Any = rlprune.load(pruned).float()  # the format of the exported file
    tokenizer = AutoTokenizer.from_pretrained(pruned, trust_remote_code=True)
    text = Path(args.test).read_text(encoding="utf-8")[:8000]
    ids = torch.tensor([tokenizer(text)["input_ids"][: max(LENGTHS)]])
    file = File(target)
    rows = measured(model, file, ids)
    prompt = ids[:, :64]
    with torch.no_grad():
        wanted = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None)[
            0, 64:
        ].tolist()
        ours = seconds(
            lambda: model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None), 1
        )
    found = file.greedy(prompt.numpy(), GREEDY)
    theirs = seconds(lambda: file.greedy(prompt.numpy(), GREEDY), 1)
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    heads = [entry.shape[1] for entry in file.past[::2]]
    sizes = {path.name: path.stat().st_size / 1e6 for path in (target, pruned / "model.safetensors")}
    lines = [
        "# Pruned language models in ONNX Runtime",
        "",
        "Written by `docs/scripts/lm_onnx.py`; the command is at its top. " + Path(args.model).name
        + f", rule `{args.rule}` at {args.budget} of the parameters, units ranked by FLAP, repaired in closed "
        "form; one thread, float32.",
        "",
        f"- The command said: {said.partition('(')[2].rstrip(')')}.",
        f"- Key-value heads of the blocks: {', '.join(map(str, heads))}; {len(heads)} blocks have a cache.",
        "- Sizes: " + ", ".join(f"`{name}` {size:,.0f} MB" for name, size in sizes.items()) + ".",
        f"- Greedy decoding after 64 tokens of the test text, {GREEDY} tokens: {same} of {GREEDY} equal to `generate`; "
        f"with its prompt {ours:.2f} s in PyTorch, {theirs:.2f} s in onnxruntime.",
        "",
        "| tokens | largest difference of a logit | largest logit | PyTorch | onnxruntime |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"{hardware()['processor']}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; medians of 3 "
        "while other work ran on the machine: times are for orientation.",
        "",
    ]  # fmt: skip
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
