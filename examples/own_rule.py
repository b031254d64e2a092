"""A rule of your own compared with uniform pruning and LAMP, under one protocol.

    python examples/own_rule.py

The same file is a plugin: `rlprune prune digits --plugin examples/own_rule.py --rule late_layers --budget 50%`.
"""

import numpy as np

import rlprune


@rlprune.rule("takes more from groups far from the input")
def late_layers(context: rlprune.Context) -> np.ndarray:
    """Shares that rise linearly with the group's place in the network."""
    return np.linspace(0.2, 1.0, len(context.space.groups))


def main() -> None:
    config = rlprune.load_config(
        "digits",
        ["model.arguments.width=8", "model.train.epochs=8", "finish.epochs=2", "search.evaluations=20"],
    )
    methods = ["late_layers", "uniform", "lamp"]
    compared = rlprune.benchmark(config, methods, seeds=2, out="runs/own-rule")
    for entry in compared["summary"]:
        tuned = entry["test_finetuned"]
        print(
            f"{entry['method']:<12} score {entry['score']['mean']:.3f}, fine-tuned accuracy {tuned['mean']:.3f}"
        )
    best = max(compared["summary"], key=lambda entry: entry["test_finetuned"]["mean"])
    print(f"best after the fine-tune: {best['method']}; report: runs/own-rule/report.html")


if __name__ == "__main__":
    main()
