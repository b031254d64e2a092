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

from rlprune import fidelity
from rlprune.config import load_config
from rlprune.fidelity_table import markdown

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
STUDIES = {
    "digits-50": Study("digits", (), 30),
    "digits-30": Study("digits", ("budget.target=0.3",), 30),
    "tiny_llama": Study("tiny_llama", (*_TUNED, "finish.batch_size=16"), 24),
    "fashion_mnist_resnet20": Study("fashion_mnist_resnet20", (), 12),
    "cifar10_resnet20": Study("cifar10_resnet20", (), 30, "a GPU and CIFAR-10"),
    "cifar10_resnet56": Study("cifar10_resnet56", (), 30, "a GPU, CIFAR-10 and a trained ResNet-56"),
    "image_folder_mobilenet_v2": Study(
        "image_folder_mobilenet_v2", ("data.root=images",), 30, "a GPU and images of yours"
    ),
    "smollm2_135m": Study("smollm2_135m", _TUNED, 30, "a GPU, the model and the texts"),
}


def section(study: Study, content: dict[str, Any]) -> str:
    """Heading, command, machine and tables of a finished study; the verdict is in the text of the table."""
    hardware = content["hardware"]
    share = f"{100 * float(content['budget']):.0f}% of the {content['metric']}"
    seconds = sum(point["final_seconds"] for point in content["points"])
    return (
        f"## {study.config}, {share}\n\n```sh\n{study.command}\n```\n\n"
        f"{hardware['processor']}, {hardware['threads']} thread(s), torch {hardware['libraries']['torch']}; the "
        f"fine-tunes took {seconds / 60:.0f} min.\n\n{markdown(content)}\n"
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
calibration data of `bn` and the batches of the gradient steps.

{lines}

A shipped default is changed where it is significantly below the best. These are random plans: a search that pushes the
score to its end leaves this range, see [negative-results.md](negative-results.md).

{parts}
## Open

Not measured on the machine of this page:

```sh
{commands}
```
"""

if __name__ == "__main__":
    sys.exit(main())
