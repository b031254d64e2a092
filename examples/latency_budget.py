"""A budget in milliseconds: what 80% of the time costs in accuracy, and how many MACs that is.

    python examples/latency_budget.py

The table of times is measured first, on this machine. Run it where nothing else does.
"""

import rlprune


def main() -> None:
    config = rlprune.load_config(
        "digits",
        [
            "model.train.epochs=8",
            "budget.metric=latency",
            "budget.target=80%",
            "budget.batch_size=64",
            "search.evaluations=30",
            "search.baselines=[]",
            "finish.rules=false",
            "finish.epochs=2",
        ],
    )
    result = rlprune.train(config, "runs/latency-budget", resume=True)
    print(result)
    rows = {row["method"]: row for row in result.table}
    dense, ours = rows["dense"], rows["ppo"]
    print(
        f"{ours['latency'] / dense['latency']:.0%} of the time by the table with {ours['macs'] / dense['macs']:.0%} of "
        f"the MACs, test accuracy {ours['test_finetuned']:.3f} (dense {dense['test_finetuned']:.3f})"
    )


if __name__ == "__main__":
    main()
