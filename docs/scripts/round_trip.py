"""A pruned language model through other tools and back: PEFT, save_pretrained, export, a second pruning, quantisers.

    python docs/scripts/round_trip.py --model FILE.gguf --valid TEXT --test TEXT --doc docs/round-trip.md

Every step is the command of the page, in a process of its own; PEFT's part is in `tune`. One thread.
"""

from __future__ import annotations

import argparse
import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rlprune
from rlprune.report import markdown_table
from rlprune.utils import hardware, write_text_atomic

CONFIG = """\
name: round-trip
model: {{name: "hf:{model}"}}
data:
  name: text
  files: {{calibration: "{valid}", test: "{test}"}}
  sequence_length: 128
  calibration: 16
  validation: 8
  train: 16
  test_length: 256
  test: {sequences}
budget: {{target: 80%, metric: params}}
prune: {{importance: flap, drop: true, round_to: 1}}
recovery: {{steps: [reconstruct], shrink: 0.2}}
score: {{samples: 4, dtype: float32}}
device: cpu
threads: 1
"""


class Trip:
    """The folders of one run, and the rows of its table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.place: Path = args.out
        self.place.mkdir(parents=True, exist_ok=True)
        self.rows: list[list[str]] = []
        self.exported = ""
        (self.place / "my.yaml").write_text(
            CONFIG.format(model=args.model, valid=args.valid, test=args.test, sequences=args.sequences)
        )

    def rlprune(self, *words: str) -> str:
        """The output of a command."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "rlprune", *words],
            cwd=self.place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"rlprune {' '.join(words)}: {done.stderr.strip()[-800:]}")
        return done.stdout

    def step(self, *words: str) -> None:
        """A command that writes a folder as a row: it is evaluated. A folder of an earlier run is not made again."""
        out = words[words.index("--out") + 1]
        if not (self.place / out).exists():
            self.rlprune(*words)
        self.rows.append([f"`rlprune {' '.join(words)}`", *self.evaluated(out)])
        print(*self.rows[-1], sep=" | ", flush=True)

    def export(self, *words: str) -> None:
        """An export as a row; what it said of its checks stands below the table."""
        said = self.rlprune(*words)
        self.exported = "\n".join(line.strip() for line in said.splitlines() if line.strip())
        self.rows.append([f"`rlprune {' '.join(words)}`", "(below)", ""])
        print(self.exported, flush=True)

    def evaluated(self, folder: str) -> tuple[str, str]:
        """Perplexity on the test split and parameters, by `rlprune evaluate`."""
        table = self.rlprune("evaluate", folder, "my.yaml")
        perplexity, params = (
            next(line for line in table.splitlines() if line.startswith(start)).split()
            for start in ("test perplexity", "params (all")
        )
        if len(self.rows) == 0:
            self.rows.append(["the dense model", perplexity[-3], params[-3]])
        return perplexity[-2], params[-2]


def tune(folder: Path, out: Path, text: str, steps: int) -> float:
    """LoRA by PEFT on a pruned folder, as its documentation does it; merged, and saved by transformers."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    loss = torch.zeros(())
    for number in range(steps):
        batch = ids[number * 512 : (number + 1) * 512].reshape(4, 128)
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return float(loss.detach())


def quantisers() -> dict[str, Callable[[nn.Module, Path], nn.Module]]:
    """Name -> what quantises the linear layers of a model, or reads its folder quantised."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    def dynamic(model: nn.Module, folder: Path) -> nn.Module:
        found: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        return found

    def torchao(settings: Any) -> Callable[[nn.Module, Path], nn.Module]:
        def apply(model: nn.Module, folder: Path) -> nn.Module:
            quantize_(model, settings)
            return model

        return apply

    def bitsandbytes(model: nn.Module, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = BitsAndBytesConfig(load_in_8bit=True)
        found: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, quantization_config=settings, dtype=torch.float32
        )
        return found

    return {
        "as it is, float32": lambda model, folder: model,
        "torch dynamic int8": dynamic,
        "torchao int8, weights only": torchao(Int8WeightOnlyConfig()),
        "torchao int8, weights and activations": torchao(Int8DynamicActivationInt8WeightConfig()),
        "bitsandbytes 8-bit": bitsandbytes,
    }


def with_dropped_parts(trip: Trip, name: str) -> Path:
    """The plan of the first step with two attentions and one feed-forward part dropped whole, recovered and saved."""
    config = rlprune.load_config(str(trip.place / "my.yaml"))
    experiment = rlprune.experiments.prepare_experiment(config)
    widths = experiment.rule_widths("flap")
    groups = experiment.space.groups
    for kind, block in (("attention", 10), ("attention", 20), ("ffn", 15)):
        widths[next(i for i, g in enumerate(groups) if (g.kind, g.block) == (kind, block))] = 0
    plan = experiment.evaluator.plan(widths, {"method": "flap, three parts dropped"})
    experiment.workload.save(experiment.evaluator.build(widths), plan, trip.place / name)
    return trip.place / name


def compare(trip: Trip, folder: Path) -> list[list[str]]:
    """A row for each quantiser on the pruned model of a folder, and one on the dense model where it takes any model."""
    workload = rlprune.build_workload(rlprune.load_config(str(trip.place / "my.yaml")))
    ids = next(iter(workload.batches("validation", 4)))[0]
    rows = []
    for label, model in (("pruned", rlprune.load(folder)), ("dense", workload.model)):
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.log_softmax(-1)
        for name, quantise in quantisers().items():
            if label == "dense" and name.startswith("bitsandbytes"):  # which reads a folder
                continue
            found = quantise(copy.deepcopy(model), folder).eval()
            with torch.no_grad(), workload.test_opened():
                got = found(input_ids=ids).logits.float().log_softmax(-1)
                quality = workload.evaluate(found, "test")
            away = float((got - wanted).abs().max())
            kl = max(0.0, float((wanted.exp() * (wanted - got)).sum(-1).mean()))
            rows.append([label, name, f"{away:.3g}", f"{kl:.2g}", f"{quality.metric:.3f}"])
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def page(trip: Trip, rows: list[list[str]], args: argparse.Namespace, loss: float) -> str:
    steps = markdown_table(["step", "test perplexity", "parameters"], trip.rows)
    table = markdown_table(
        [
            "model",
            "format",
            "largest difference of a log-probability",
            "KL from ours, nats a token",
            "test perplexity",
        ],
        rows,
    )
    name = re.sub(r"[._]Q\d.*", "", Path(args.model).stem)
    facts = hardware()
    versions = facts["libraries"]
    return f"""# Through other tools and back

Written by `python docs/scripts/round_trip.py`, whose head has the command ({facts["processor"]}, one thread; torch
{versions["torch"]}, transformers {versions["transformers"]}; seed 0), on {name}. Calibration and fine-tune read
WikiText-2's validation text; the perplexity is over {args.sequences} windows of 256 tokens of its test text: few, so
that the page is made again in minutes. It shows that every step works and what it changes, not what the best plan would
give. `my.yaml` is at the head of the script.

## Pruned, fine-tuned, merged, exported, pruned again

{steps}

`merged` was written by PEFT and transformers alone ({args.steps} steps of LoRA on 512 tokens each, the last one's loss
{loss:.3f}): config.json, weights and code, no plan.json. 87.5% of its parameters are 70% of the dense model's, and the
plan in `twice` is one against the dense model. The export said:

```text
{trip.exported}
```

## Quantisers on dropped parts and unequal widths

The widths of the first step; the attentions of blocks 10 and 20 and the feed-forward part of block 15 are dropped
whole. Which linear layers are quantised is each tool's default. Differences are from the same model in float32, over
four sequences of 128 tokens. The dense model is shown as well, so that what a quantiser does to this model by itself
is not taken for the pruning's: bitsandbytes reads a folder, which the dense model (a GGUF file) is not.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct, a GGUF file or a folder")
    parser.add_argument("--valid", required=True, help="text to calibrate and to tune on")
    parser.add_argument("--test", required=True, help="text of the perplexity")
    parser.add_argument("--out", type=Path, default=Path("runs/round-trip"), help="folder of the models")
    parser.add_argument("--sequences", type=int, default=8, help="test windows of 256 tokens")
    parser.add_argument("--steps", type=int, default=6, help="LoRA steps")
    parser.add_argument("--doc", type=Path, help="the page to write")
    args = parser.parse_args()
    for name in ("model", "valid", "test"):
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trip = Trip(args)
    trip.step("prune", "my.yaml", "--rule", "flap", "--budget", "80%", "--out", "once")
    loss = tune(
        trip.place / "once",
        trip.place / "merged",
        Path(args.valid).read_text(encoding="utf-8")[:40_000],
        args.steps,
    )
    trip.rows.append(
        ['PEFT: LoRA, `merge_and_unload()`, `save_pretrained("merged")`', *trip.evaluated("merged")]
    )
    print(*trip.rows[-1], sep=" | ", flush=True)
    trip.export("export", "merged", "--to", "gguf", "--out", "merged.gguf")
    trip.step(
        *("prune", "my.yaml", "--set", "model.name=hf:merged", "--rule", "flap", "--budget", "87.5%"),
        "--out",
        "twice",
    )
    rows = compare(trip, with_dropped_parts(trip, "dropped"))
    if args.doc:
        write_text_atomic(args.doc, page(trip, rows, args, loss))


if __name__ == "__main__":
    main()
