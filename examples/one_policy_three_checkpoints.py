"""One search, three further networks: the learned policy prunes each of them without a search.

python examples/one_policy_three_checkpoints.py
"""

import rlprune

SETTINGS = ["model.arguments.width=8", "model.train.epochs=8", "search.evaluations=40", "search.baselines=[]"]


def main() -> None:
    config = rlprune.load_config("digits", [*SETTINGS, "finish.epochs=0", "budget.target=40%"])
    result = rlprune.search(
        rlprune.build_workload(config), budget="40%", evaluations=40,
        settings={"search": {"baselines": []}, "finish": {"rules": False}},
    )  # fmt: skip
    print(result)
    gains = []
    for seed in (1, 2, 3):
        other = rlprune.build_workload(config.override([f"model.seed={seed}"]))
        applied = rlprune.apply(result.policy, other, budget="40%")
        evaluator = rlprune.Evaluator(other)
        even = evaluator.space.project([1.0] * len(evaluator.space.groups), "40%")
        uniform = evaluator.evaluate(even)
        ours = evaluator.evaluate(applied.plan.widths)
        gains.append(ours.score - uniform.score)
        print(f"network {seed}: loss {ours.loss:.3f} by the policy, {uniform.loss:.3f} by uniform pruning")
    print(
        f"the policy is ahead of uniform pruning on {sum(g > 0 for g in gains)} of 3 networks, without a search"
    )


if __name__ == "__main__":
    main()
