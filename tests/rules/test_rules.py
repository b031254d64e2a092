"""Every rule keeps one contract; each also does what its formula says."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.workloads import Noise
from rlprune import rules
from rlprune.api import trace
from rlprune.errors import BudgetError, ConfigError, DataError, GraphError
from rlprune.importance import importance
from rlprune.pruning.space import PruningSpace
from rlprune.rules import RULES, Context
from rlprune.rules.context import rule
from rlprune.rules.lamp import _scores
from rlprune.rules.threshold import threshold_distribution
from rlprune.vision.zoo import build_model


@pytest.fixture(scope="module")
def context() -> Context:
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 6})
    workload = Noise(model)
    space = trace(model, workload.example_inputs)
    scores = importance.taylor(model, space, workload.batches("calibration"), workload.loss)
    return Context(space, model, scores, 0.5, workload=workload)


def widths_of(context: Context, name: str) -> np.ndarray:
    return context.space.project(RULES[name].function(context), context.budget, context.metric)


class TestContract:
    """What every rule promises; a new rule is tested by being registered."""

    pytestmark = pytest.mark.parametrize("name", sorted(n for n, r in RULES.items() if r.wing != "language"))

    @pytest.mark.parametrize(
        ("budget", "metric"), [(0.8, "macs"), (0.5, "params"), ("25%", "macs"), (1.0, "macs")]
    )
    def test_distribution(self, context: Context, name: str, budget: object, metric: str) -> None:
        here = replace(context, budget=budget, metric=metric)
        distribution = RULES[name].function(here)
        assert distribution.shape == (len(context.space.groups),)
        assert distribution.dtype == np.float64
        assert np.isfinite(distribution).all()
        assert (distribution >= 0).all()
        assert distribution.any()
        widths = context.space.project(distribution, budget, metric)
        assert context.space.cost(widths, metric) <= context.space.target(budget, metric)

    def test_deterministic_and_without_effect_on_the_model(self, context: Context, name: str) -> None:
        before = {n: t.clone() for n, t in context.model.state_dict().items()}
        first = RULES[name].function(context)
        torch.manual_seed(123)
        np.random.seed(5)
        assert np.array_equal(first, RULES[name].function(context))
        assert all(torch.equal(before[n], t) for n, t in context.model.state_dict().items())
        assert not context.model.training

    def test_rounding_and_minimum(self, context: Context, name: str) -> None:
        space = context.space.with_rounding(round_to=4, minimum=2)
        widths = widths_of(replace(context, space=space), name)
        assert ((widths % space.steps == 0) | (widths == space.widths) | (widths == space.minimums)).all()
        assert (widths >= space.minimums).all()

    def test_tightest_budget_and_an_impossible_one(self, context: Context, name: str) -> None:
        lowest = context.space.feasible()[0]
        widths = widths_of(replace(context, budget=lowest), name)
        assert np.array_equal(widths, context.space.minimums)
        if name in ("uniform", "shallow", "deep"):
            return  # their shares do not depend on the budget; the projection refuses it
        with pytest.raises(BudgetError, match="feasible"):
            RULES[name].function(replace(context, budget=0.5 * lowest / context.space.dense_cost()))

    def test_reachable_by_name_and_described(self, name: str) -> None:
        assert getattr(rules, name) is RULES[name].function
        assert RULES[name].name == name
        assert RULES[name].summary
        assert RULES[name].function.__doc__

    def test_without_a_workload(self, context: Context, name: str) -> None:
        bare = replace(context, workload=None)
        if RULES[name].needs_workload:
            with pytest.raises(DataError, match=name):
                RULES[name].function(bare)
        else:
            assert np.array_equal(RULES[name].function(bare), RULES[name].function(context))


def test_the_rules_of_the_yardstick_are_there() -> None:
    wanted = {"uniform", "shallow", "deep", "erk", "lamp", "global_magnitude", "global_taylor", "sensitivity"}
    assert wanted <= set(RULES)
    with pytest.raises(AttributeError, match="did you mean 'uniform'"):
        rules.unifrom  # noqa: B018


def test_rules_for_language_models_stay_out(context: Context) -> None:
    allowed = rules.rules_for(context.space)
    assert "uniform" in allowed
    assert "flap" not in allowed
    with pytest.raises(ConfigError, match="'flap' is for language models; allowed here: .*uniform"):
        rules.flap(context)


def test_probes_are_counted(context: Context) -> None:
    probed: list[np.ndarray] = []

    def probe(widths: np.ndarray) -> float:
        probed.append(widths)
        return 1.0

    for name in rules.rules_for(context.space):
        probed.clear()
        RULES[name].function(replace(context, probe=probe))
        assert len(probed) <= RULES[name].probe_count(context.space)
        assert RULES[name].probes == bool(probed)


def test_a_new_rule_is_one_function(context: Context) -> None:
    @rule("only the first group")
    def first_only(context: Context) -> np.ndarray:
        return np.eye(len(context.space.groups))[0]

    try:
        assert RULES["first_only"].function(context)[0] == 1
    finally:
        del RULES["first_only"]


def test_shallow_and_deep_follow_the_depth(context: Context) -> None:
    depth = np.array([g.depth for g in context.space.groups])
    order = np.argsort(depth, kind="stable")
    assert (np.diff(rules.deep(context)[order]) >= 0).all()
    assert (np.diff(rules.shallow(context)[order]) <= 0).all()
    assert rules.deep(context)[order[-1]] > 2 * rules.deep(context)[order[0]]


def plain_net() -> tuple[nn.Module, PruningSpace]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    return model, trace(model, torch.zeros(1, 1, 8, 8))


def test_erk_keeps_in_proportion_to_the_formula() -> None:
    model, space = plain_net()
    distribution = rules.erk(Context(space, model, [], 0.1))
    kept = 1 - distribution
    # (c_in + c_out + k + k) / (c_in c_out k k) of the three convolutions
    ratio = np.array([15 / 72, 46 / 2304, 50 / 512])
    free = kept < 1
    assert free.sum() >= 2
    assert np.allclose(kept[free] / ratio[free], (kept[free] / ratio[free])[0])
    assert space.cost(kept * space.widths) == pytest.approx(space.target(0.1), rel=1e-6)


def test_lamp_scores_are_those_of_the_paper() -> None:
    scores = _scores(np.array([3.0, 1.0, 2.0]))
    assert np.allclose(scores, [1 / 14, 4 / 13, 1.0])
    assert np.allclose(_scores(np.zeros(3)), 0.0)


def test_lamp_does_not_care_for_the_scale_of_a_group(context: Context) -> None:
    scaled = [s * 10.0**i for i, s in enumerate(context.importance)]
    assert np.array_equal(rules.lamp(context), rules.lamp(replace(context, importance=scaled)))


def test_the_threshold_cuts_exactly_the_lowest_units() -> None:
    model, space = plain_net()
    random = np.random.default_rng(3)
    scores = [random.random(w) for w in space.widths]
    for budget in (0.7, 0.4, 0.1):
        cut = threshold_distribution(Context(space, model, [], budget), scores)
        widths = np.round((1 - cut) * space.widths).astype(int)
        assert space.cost(widths) <= space.target(budget)
        removed = [np.sort(s)[: len(s) - w] for s, w in zip(scores, widths, strict=True)]
        kept = [np.sort(s)[len(s) - w :] for s, w in zip(scores, widths, strict=True)]
        free = widths > space.minimums
        threshold = max(r.max() for r in removed if len(r))
        assert all(k.min() > threshold for k, f in zip(kept, free, strict=True) if f)
        # One unit fewer cut would miss the budget.
        last = int(np.argmax([r.max() if len(r) else -1 for r in removed]))
        assert space.cost(widths + np.eye(len(widths), dtype=int)[last]) > space.target(budget)


def test_global_magnitude_spares_groups_whose_units_are_alike() -> None:
    model, space = plain_net()
    with torch.no_grad():
        model[0].weight[4:] *= 0.01  # half of the first group is next to nothing
    distribution = rules.global_magnitude(Context(space, model, [], 0.5))
    assert distribution[0] == 0.5
    assert distribution[1:].max() < 0.3


def test_depgraph_is_what_torch_pruning_really_prunes() -> None:
    model, space = plain_net()
    for budget in (0.7, 0.3):
        cut = rules.depgraph(Context(space, model, [], budget))
        ours = np.round((1 - cut) * space.widths).astype(int).tolist()
        for ratio in np.linspace(0.01, 0.95, 95):  # finer than one channel of the net
            twin = copy.deepcopy(model)
            tp.pruner.BasePruner(
                twin,
                torch.zeros(1, 1, 8, 8),
                tp.importance.GroupMagnitudeImportance(),
                global_pruning=True,
                pruning_ratio=float(ratio),
                ignored_layers=[twin[8]],
                in_channel_groups={},
                out_channel_groups={},
            ).step()
            widths = [twin[i].out_channels for i in (0, 2, 4)]
            if space.cost(np.array(widths)) <= space.target(budget):
                break
        assert ours == widths, "the lowest ratio that meets the budget"


def test_depgraph_is_external_and_no_start(context: Context) -> None:
    assert "depgraph" not in rules.rules_for(context.space)
    assert "depgraph" in rules.rules_for(context.space, external=True)
    words = replace(context.space, wing="language")
    assert "depgraph" not in rules.rules_for(words, external=True)
    with pytest.raises(ConfigError, match="^rule: 'depgraph' is for models of images; allowed here: "):
        rules.depgraph(replace(context, space=words))


def test_depgraph_says_in_a_line_that_it_cannot_follow_a_model(context: Context) -> None:
    class Opaque(type(context.model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not\nthis way")

    model = copy.deepcopy(context.model)
    model.__class__ = Opaque
    with pytest.raises(GraphError, match=r"^depgraph: pruning Opaque .* \(ValueError: not\)$"):
        rules.depgraph(replace(context, model=model, calibration=None))


def test_sensitivity_probes_each_group_alone_and_equalises_the_loss(context: Context) -> None:
    groups = len(context.space.groups)
    weights = np.linspace(1.0, 3.0, groups)  # added loss of an emptied group
    probed: list[np.ndarray] = []

    def probe(widths: np.ndarray) -> float:
        probed.append(widths)
        return 0.25 + float((weights * (1 - widths / context.space.widths)).sum())

    distribution = rules.sensitivity(replace(context, probe=probe, workload=None))
    assert len(probed) == 1 + 2 * groups
    assert all((widths != context.space.widths).sum() <= 1 for widths in probed)
    # Losses linear in the share: within the probed range, share * weight is the same for all.
    inside = distribution < 0.5
    assert inside.sum() > 2
    products = (distribution * weights)[inside]
    assert products.max() == pytest.approx(products.min(), rel=1e-6)


def test_sensitivity_survives_collapsed_and_free_groups(context: Context) -> None:
    space = context.space

    def probe(widths: np.ndarray) -> float:
        if widths[0] < space.widths[0]:
            return float("nan")
        return 1.0 + float(widths[2] < space.widths[2]) - 0.1 * float(widths[3] < space.widths[3])

    distribution = rules.sensitivity(replace(context, probe=probe))
    assert np.isfinite(distribution).all()
    assert distribution[0] < distribution[2] < distribution[3]


@pytest.mark.parametrize(
    ("name", "importance"),
    [("tp_taylor", tp.importance.GroupTaylorImportance), ("tp_bn_scale", tp.importance.BNScaleImportance)],
)
def test_its_other_pruners_are_what_torch_pruning_really_prunes(name: str, importance: type) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.1, 2.0)
    workload = Noise(model)
    space = trace(model, workload.example_inputs)
    found = RULES[name]
    assert found.external and name not in rules.rules_for(space)
    cut = found.function(Context(space, model, [], 0.4, workload=workload))
    ours = np.round((1 - cut) * space.widths).astype(int).tolist()
    for ratio in np.linspace(0.01, 0.95, 95):
        twin = copy.deepcopy(model)
        for inputs, targets in workload.batches("calibration"):
            torch.nn.functional.cross_entropy(twin(inputs), targets, reduction="sum").backward()
        tp.pruner.BasePruner(
            twin,
            torch.zeros(1, 1, 8, 8),
            importance(),
            global_pruning=True,
            pruning_ratio=float(ratio),
            ignored_layers=[twin[-1]],
            in_channel_groups={},
            out_channel_groups={},
        ).step()
        widths = [twin[i].out_channels for i in (0, 3, 6)]
        if space.cost(np.array(widths)) <= space.target(0.4):
            break
    assert ours == widths and found.needs_workload == (name == "tp_taylor")
