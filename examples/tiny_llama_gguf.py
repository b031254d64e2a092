"""A language model from search to llama.cpp: a tiny Llama, trained on the spot, ends as a GGUF file.

    python examples/tiny_llama_gguf.py [FOLDER]

Needs the extra `language`. For a real model: `model.name=hf:FOLDER` and texts of yours (docs/to-llama-cpp.md).
"""

import sys
from pathlib import Path

import gguf
import torch

import rlprune
from rlprune.experiments import export

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-llama")


def main() -> None:
    config = rlprune.load_config(
        "tiny_llama",
        [
            "model.train.epochs=2",
            "data.train=400",
            "prune.runtime=llama.cpp",  # only what llama.cpp loads is cut
            "budget.target=60%",
            "search.evaluations=30",
            "search.baselines=[]",
            "finish.rules=false",
        ],
    )
    result = rlprune.train(config, FOLDER, resume=True)
    print(result)
    written = export.export(FOLDER, "gguf", force=True)
    for note in written.notes:
        print(f"  {note}")
    reader = gguf.GGUFReader(str(written.path))
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    tokens = torch.tensor([[1, 5, 9, 13]])
    text = result.model.generate(tokens, max_new_tokens=8, do_sample=False)
    print(f"greedy tokens in PyTorch: {text[0].tolist()}")
    kilobytes = Path(written.path).stat().st_size / 1e3
    print(f"{written.path}: {len(reader.tensors)} tensors, {parameters:,} parameters, {kilobytes:,.0f} kB")


if __name__ == "__main__":
    main()
