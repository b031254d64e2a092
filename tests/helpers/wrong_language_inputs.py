"""Wrong inputs of language models: their files, texts and exports, and the very line that each prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.wrong_inputs import Wrong, both, dense, put, text


def rows(file: str, *given: dict[str, Any], times: int = 60) -> Callable[[Path], object]:
    """A file of JSON lines; with {n} in a text the row's number."""
    lines = [json.dumps(row) for row in given] * times
    return text(file, "".join(line.replace("{n}", str(n)) + "\n" for n, line in enumerate(lines)))


def template(words: str) -> Callable[[Path], object]:
    return text("dense/chat_template.jinja", words)


def reads(files: str, *sets: str) -> str:
    """A training on files of text."""
    every = ("data.name=text", f"'data.files={files}'", "data.sequence_length=32", *sets)
    return "train dense.yaml" + "".join(f" --set {word}" for word in every) + " --out new"


CHAT = {"messages": [{"role": "user", "content": "q {n}"}, {"role": "assistant", "content": "a {n}"}]}
ASKED = {"messages": [{"role": "user", "content": "q {n}"}]}
ASK = {"instruction": "q {n}", "output": "a {n}"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
INSPECT, TRAIN = "inspect dense.yaml", "train dense.yaml --out new"
QUANTISED = "model.name 'hf:dense': its weights are quantised by {}; give the unquantised model"
FOUR_BITS = put(
    "dense/config.json", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}
)
GPTQ = put("dense/config.json", "quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128})
KINDS = "; running text, .jsonl and .json files are read"

LANGUAGE_CASES: dict[str, Wrong] = {
    "messages as a column of text": Wrong(
        reads("{train: a.jsonl}", "data.column=messages", "data.format=text"),
        "data.column: PLACE/a.jsonl: line 1: the field 'messages' is not text but a list of messages "
        "(data.format=chat)",
        both(dense, rows("a.jsonl", CHAT)),
    ),
    "a GPTQ checkpoint looked at": Wrong(INSPECT, QUANTISED.format("gptq"), both(dense, GPTQ)),
    "a GPTQ checkpoint searched": Wrong(TRAIN, QUANTISED.format("gptq"), both(dense, GPTQ)),
    "a bitsandbytes checkpoint looked at": Wrong(
        INSPECT, QUANTISED.format("bitsandbytes"), both(dense, FOUR_BITS)
    ),
    "a bitsandbytes checkpoint searched": Wrong(
        TRAIN, QUANTISED.format("bitsandbytes"), both(dense, FOUR_BITS)
    ),
    "a chat without a template": Wrong(
        reads("{train: a.jsonl}"),
        "data.files: PLACE/a.jsonl: holds conversations, and the model's tokenizer has no chat template; give a chat "
        "model, or instruction and output as fields",
        both(dense, rows("a.jsonl", CHAT)),
    ),
    "a template that refuses": Wrong(
        reads("{train: a.jsonl}"),
        "data.files: PLACE/a.jsonl: line 1: the tokenizer's chat template refuses it (TemplateError: no system turn)",
        both(dense, rows("a.jsonl", CHAT), template("{{ raise_exception('no system turn') }}")),
    ),
    "a chat without an assistant": Wrong(
        reads("{train: a.jsonl}"),
        "data.files: PLACE/a.jsonl: none of its 60 conversations has a turn of the assistant",
        both(dense, rows("a.jsonl", ASKED), template(PLAIN)),
    ),
    "an example again and again": Wrong(
        reads("{train: a.jsonl}"),
        "data.test: 5 examples asked for, but PLACE/a.jsonl has 1 (of 60; the others repeat them) with an answer in "
        "the first 32 tokens (data.test_length)",
        both(dense, rows("a.jsonl", {"instruction": "q", "output": "a"})),
    ),
    "prompts that fill every sequence": Wrong(
        reads("{train: a.jsonl}"),
        "data.test: 5 examples asked for, but PLACE/a.jsonl has 0 with an answer in the first 32 tokens "
        "(data.test_length)",
        both(dense, rows("a.jsonl", {"instruction": "why " * 200 + "{n}", "output": "a"})),
    ),
    "two formats in one file": Wrong(
        reads("{train: a.jsonl}"),
        "data.files: PLACE/a.jsonl: line 2 has no field 'instruction', which the file's first line has: instruction "
        "(instruction, output)",
        both(dense, rows("a.jsonl", ASK, CHAT)),
    ),
    "a negative weight": Wrong(
        reads("{train: [{path: a.jsonl, weight: -1}]}"),
        "data.files.train[0].weight: must be a number above 0, got -1",
        both(dense, rows("a.jsonl", ASK)),
    ),
    "a table as text": Wrong(
        reads("{train: a.csv}"),
        f"data.files: PLACE/a.csv: is a table{KINDS}",
        both(dense, text("a.csv", "instruction,output\n" + "a,b\n" * 400)),
    ),
    "a packed file as text": Wrong(
        reads("{train: a.jsonl.gz}"),
        f"data.files: PLACE/a.jsonl.gz: is packed{KINDS}",
        both(dense, rows("a.jsonl.gz", ASK)),
    ),
    "a text that is a pipe": Wrong(
        reads("{train: a.txt}"),
        "data.files: PLACE/a.txt: is a pipe, where a file is to be read",
        both(dense, lambda place: os.mkfifo(place / "a.txt")),
    ),
    "half of a character": Wrong(
        reads("{train: a.jsonl}"),
        "data.files: PLACE/a.jsonl: line 1: output: holds half of a character (a lone surrogate)",
        both(dense, rows("a.jsonl", {"instruction": "q {n}", "output": "\ud800"})),
    ),
    "packing of running text": Wrong(
        TRAIN.replace("--out", "--set data.packing=true --out"),
        "data.packing: is for conversations and instructions, and 'help_texts' gives running text; leave it out",
        dense,
    ),
    "a prompt beyond the positions": Wrong(
        TRAIN.replace("--out", f"--set data.prompt='{'so ' * 200}' --out"),
        "data.prompt: with it a sequence has 416 tokens, more than the model's 64 positions; lower "
        "data.sequence_length",
        dense,
    ),
    "a prompt of images": Wrong(
        "train digits --set data.prompt=hello --out new",
        "data.prompt: only for language models, so it is not used; 'cifar_resnet20' is none",
    ),
    "adapters of a full fine-tune": Wrong(
        "train tiny_llama --set finish.steps=1 finish.method=full finish.adapters=query_value --out new",
        "finish.adapters: finish.method is full, so it is not used; give another finish.method",
    ),
    "learned units beside rules": Wrong(
        TRAIN.replace("--out", "--set search.agent=compresso --out"),
        "search.starts: 'compresso' learns which units stay, so that no rule's plan is scored before; allowed: none",
        dense,
    ),
    "answers of images": Wrong(
        "train digits --set data.answers_only=false --out new",
        "data.answers_only: only for language models, so it is not used; 'cifar_resnet20' is none",
    ),
    "windows over examples": Wrong(
        reads("{train: a.jsonl}", "data.stride=8"),
        "data.stride: PLACE/a.jsonl holds examples, each of them scored once; only running text has windows that "
        "overlap",
        both(dense, rows("a.jsonl", ASK)),
    ),
    "a model of no positions": Wrong(
        INSPECT,
        "model.name 'hf:dense': its config's max_position_embeddings must be at least 1, got 0",
        both(dense, put("dense/config.json", "max_position_embeddings", 0)),
    ),
    "a hidden size of 0": Wrong(
        INSPECT,
        "model.name 'hf:dense': its config's hidden_size must be at least 1, got 0",
        both(dense, put("dense/config.json", "hidden_size", 0)),
    ),
    "an activation that nobody knows": Wrong(
        INSPECT,
        "model.name 'hf:dense': no llama model fits its config: hidden_act: unknown name 'nonsense'",
        both(dense, put("dense/config.json", "hidden_act", "nonsense")),
    ),
    "an adapter that is not merged": Wrong(
        TRAIN,
        "model.name 'hf:dense': holds a PEFT adapter (adapter_config.json); merge it into its model "
        "(merge_and_unload) and give that folder",
        both(dense, text("dense/adapter_config.json", "{}")),
    ),
    "a language model for torch.export": Wrong(
        "export lm --to torch-export --out new.pt2",
        "--to torch-export: not for language models; use --to onnx, or --to hf, a folder that other tools load",
    ),
    "ONNX in place of a folder": Wrong(
        "export lm --to onnx --out policy", "policy: is a folder, where a file is to be written"
    ),
}
