"""Scores with and without training samples, under the same searches -> docs/training-samples.md.

    rlprune benchmark digits --methods ppo,evopress,cma_es,random --budgets 0.5 0.3 --seeds 5 --checkpoints 5 \\
        --evaluations 100 --set score.unlabelled=0 --out runs/digits-0
    rlprune benchmark digits ... --set score.unlabelled=auto --out runs/digits-auto
    python docs/scripts/training_samples.py runs/digits-0:runs/digits-auto

Nothing is measured here: each argument names two runs of one workload that differ in `score.unlabelled` alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pairs import read, section, summary

from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
SETTING = "score.unlabelled"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN:RUN")
    pairs = [*map(read, parser.parse_args().runs)]
    machine = hardware()
    text = PAGE.format(
        processor=machine["processor"],
        torch=machine["libraries"]["torch"],
        summary="\n".join(summary(pair, SETTING) for pair in pairs),
        parts="\n".join(section(pair, SETTING) for pair in pairs),
    )
    (DOCS / "training-samples.md").write_text(text, encoding="utf-8")


PAGE = """# Scores on training samples

Written by `python docs/scripts/training_samples.py` from runs of `rlprune benchmark` (the commands are at its head):
one thread of an {processor}, no GPU, torch {torch}, other programs on the cores.

A search compares hundreds of plans on one validation split. Where that is small, its best plan is in part the one that
suits these samples. A divergence from the dense model needs no label, so that training samples can be scored as well:
`score.unlabelled` says how many (`auto`: as many as make 1,000 with the validation split). Loss and metric of a
candidate stay those of the validation split, and the test split is read as before, at the end.

Scores of the two columns are means over different samples and do not compare. Losses are those of the test split before
and after the same fine-tune. Differences are paired by seed, with training samples minus without (lower is better),
with a 95% BCa interval and the seeds on which the search with them is lower. Rows of one seed share a dense model, so
that intervals over all rows are narrower than they should be.

{summary}

{parts}
The default was chosen by these losses of the test split: for the choice between the two they are no held-out figures.

Not measured: other workloads (with 1,000 validation samples and more, or with `score.samples`, `auto` adds none),
longer searches, and seconds. A forward pass reads so many more samples: of digits 1,000 instead of 400.
"""

if __name__ == "__main__":
    main()
