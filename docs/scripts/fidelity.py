"""Does the score of the shipped configs predict the quality after the fine-tune? -> docs/fidelity.md.

    python docs/scripts/fidelity.py [--studies digits-50 tiny_llama ...] [--out runs/fidelity] [--threads 1]

Runs the studies that are named (all that need neither a GPU nor files of yours by default), then writes the page from
every study that is finished in --out; the others are listed with their command. A stopped study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprune import load_config
from rlprune.experiments import fidelity, fidelity_table

DOCS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Study:
    """One table: a shipped config, what is set on top of it, and the number of plans."""

    config: str
    settings: tuple[str, ...]
    candidates: int
    needs: str = ""

    @property
    def command(self) -> str:
        settings = f" --set {' '.join(self.settings)}" if self.settings else ""
        return f"rlprune fidelity {self.config}{settings} --candidates {self.candidates}"


_TUNED = ("finish.method=full", "finish.steps=100")
_LORA = ("data.validation=32", "finish.method=lora", "finish.steps=10", "finish.batch_size=4")
_SMOLLM2 = (
    "model.name=hf:SmolLM2-135M-Instruct.Q4_1.gguf",
    "data.files.calibration=wikitext2_valid.txt",
    "data.files.test=wikitext2_test.txt",
    "data.calibration=64",
    "data.sequence_length=128",
)
_CIFAR10 = ("data.root=cifar10-jpeg", "model.train.lr=0.01")
# What a CPU fine-tunes within minutes: fewer images, and one epoch after the cut.
_SMALL_CIFAR10 = (
    *_CIFAR10,
    "data.train=3000",
    "data.calibration=128",
    "data.validation=1000",
    "finish.epochs=1",
)
_RESNET20 = "model.checkpoint=resnet20_cifar10.safetensors"
# No published weights without a download: trained from scratch on the images of CIFAR-10, enlarged.
_FOLDER = (
    *("data.root=cifar10-jpeg", "data.image_size=64", "data.train=4000", "data.validation=1000"),
    *("data.calibration=256", "model.weights=null", "model.train.epochs=10", "model.train.lr=0.05"),
    *("finish.epochs=1", "finish.lr=0.02"),
)
STUDIES = {
    "digits-50": Study("digits", (), 30),
    "digits-30": Study("digits", ("budget.target=0.3",), 30),
    "digits_finetuned_reward": Study("digits_finetuned_reward", (), 30),
    "tiny_llama": Study("tiny_llama", (*_TUNED, "finish.batch_size=16"), 24),
    "fashion_mnist_resnet20": Study("fashion_mnist_resnet20", (), 12),
    "cifar10_resnet20": Study(
        "cifar10_resnet20", (*_SMALL_CIFAR10, _RESNET20, "model.train.epochs=6"), 16, "CIFAR-10 and weights"
    ),
    "cifar10_resnet56": Study(
        "cifar10_resnet56", (*_SMALL_CIFAR10, "model.train.epochs=2"), 8, "CIFAR-10 and weights"
    ),
    "image_folder_mobilenet_v2": Study("image_folder_mobilenet_v2", _FOLDER, 12, "an image folder"),
    "smollm2_135m": Study("smollm2_135m", (*_SMOLLM2, *_LORA), 8, "the model and the texts"),
    "cifar10_resnet20-full": Study("cifar10_resnet20", (*_CIFAR10, _RESNET20), 30, "a GPU and CIFAR-10"),
    "cifar10_resnet56-full": Study("cifar10_resnet56", _CIFAR10, 30, "a GPU and CIFAR-10"),
    "cifar10_resnet56_finetuned_reward": Study(
        "cifar10_resnet56_finetuned_reward", _CIFAR10, 30, "a GPU and CIFAR-10"
    ),
    "image_folder_mobilenet_v2-full": Study("image_folder_mobilenet_v2", (), 30, "a GPU and ImageNet"),
    "smollm2_135m-full": Study("smollm2_135m", (*_SMOLLM2, *_TUNED), 30, "a GPU, the model and the texts"),
}


def section(study: Study, content: dict[str, Any]) -> str:
    """Heading, command, machine and tables of a finished study; the verdict is in the text of the table."""
    hardware = content["hardware"]
    share = f"{100 * float(content['budget']):.0f}% of the {content['metric']}"
    seconds = sum(point["final_seconds"] for point in content["points"])
    return (
        f"## {study.config}, {share}\n\n```sh\n{study.command}\n```\n\n"
        f"{hardware['processor']}, {hardware['threads']} thread(s), torch {hardware['libraries']['torch']}; the "
        f"fine-tunes took {seconds / 60:.0f} min.\n\n{fidelity_table.markdown(content)}\n"
    )


def page(finished: dict[str, dict[str, Any]]) -> str:
    """The whole document: a summary line for each finished study, their tables, and what is open."""
    lines = []
    for name, content in finished.items():
        own = next(row for row in content["rows"] if row["used"])
        below = own["difference_high"] < 0
        lines.append(
            f"- `{STUDIES[name].config}` at {content['budget']}: `{own['recovery']}` in use, Spearman "
            f"{own['spearman']:.2f} ({own['low']:.2f} to {own['high']:.2f}); significantly below the "
            f"best (`{content['best']}`): {'**yes**' if below else 'no'}; the fastest that is not: "
            f"`{content['recommended']}`"
        )
    parts = [section(STUDIES[name], content) for name, content in finished.items()]
    unfinished = [study for name, study in STUDIES.items() if name not in finished]
    commands = [f"{study.command}   # needs {study.needs or 'time'}" for study in unfinished]
    return PAGE.format(
        lines="\n".join(lines), parts="\n".join(parts), commands="\n".join(commands) or "# none"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = [name for name, study in STUDIES.items() if not study.needs]
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=default, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    arguments = parser.parse_args()
    for name in arguments.studies:
        study = STUDIES[name]
        config = load_config(study.config, [*study.settings, f"threads={arguments.threads}"])
        print(fidelity.run(config, study.candidates, arguments.out / name), flush=True)
    files = {name: arguments.out / name / "fidelity.json" for name in STUDIES}
    finished = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    (DOCS / "fidelity.md").write_text(page(finished), encoding="utf-8")
    return 0


PAGE = """# Fidelity of the score

Does the score before the fine-tune predict the quality after it? Written by `python docs/scripts/fidelity.py`.

Random plans are scored under each recovery and fine-tuned as a winner would be, starting from the recovery in use. The
test split is not read, because a default that is chosen here is the outcome of a search. The validation split is
halved: scores on one half are compared with the losses on the other, and the reverse; Spearman is the mean of both.
Intervals are bootstraps over the plans (2,000 draws, 95%); the difference to the best is taken within each
draw. "Half to half" is the rank correlation of a tier's own scores on both halves: how far the images decide it.
The best is picked from the same table, so its own interval is optimistic. The time of a candidate is processor time (on
a GPU, time on the wall) of the fastest plan, statistics of the dense model not counted; what is read includes the
calibration data of `bn` and the batches of the gradient steps. The image folder holds the images of CIFAR-10, enlarged
to 64 pixels, and its MobileNetV2 is trained from scratch on 4,000 of them: published weights would be a download.

{lines}

A shipped default is changed where it is significantly below the best. It is not always the fastest that is not:
`reconstruct + bn` stays where `reconstruct` alone ranks plans as well, because the recovery is also all that a pruned
model gets without a fine-tune (`rlprune prune`, `rlprune apply`), and there the new batch-norm statistics are worth
most of it ([negative-results.md](negative-results.md), "Recovery"), for a fifth to two thirds more time a candidate.
These are random plans: a search that pushes the score to its end leaves this range, see there.

{parts}
## Open

Not measured on the machine of this page:

```sh
{commands}
```
"""

if __name__ == "__main__":
    sys.exit(main())
