"""What each runtime allows of a language model, in the space, in plans and at the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.language_workload import Sentences
from helpers.lm import tiny_lm, tokens
from helpers.lm_folder import write_config, write_folder
from helpers.lm_types import type_model
from rlprune.cli import main as cli
from rlprune.config.names import RUNTIMES
from rlprune.errors import ConfigError
from rlprune.language.files.nemotron_nas import block_configs
from rlprune.language.files.uniform import plain_form, plain_obstacle
from rlprune.language.space import fitting_multiple
from rlprune.report.results import read_results
from rlprune.rules import rules_for
from rlprune.rules.context import rule_widths

RNG = np.random.default_rng(0)
FAMILIES = (
    "llama",
    "llama-mha-tied",
    "qwen2",
    "gpt2",
    "phi3",
    "gemma2",
    "opt",
    "falcon",
    "gpt_neox",
)


def trace(name: str, runtime: str, **options: Any) -> rlprune.PruningSpace:
    return rlprune.trace(tiny_lm(name), tokens(), verify=False, runtime=runtime, **options)


def anything(space: rlprune.PruningSpace) -> rlprune.Plan:
    """A random plan of the space: any width that its steps allow; its first part stays, so that something is left."""
    widths = [RNG.choice(sorted({g.minimum, *range(g.step, g.width, g.step), g.width})) for g in space.groups]
    widths[0] = space.groups[0].width
    importance = [RNG.random(g.width) for g in space.groups]
    return rlprune.make_plan(space, importance=importance, widths=np.array(widths))


@pytest.mark.filterwarnings("ignore::rlprune.pruning.NarrowSpaceWarning")
class TestUniform:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_plan_is_a_plain_model_of_transformers(self, name: str) -> None:
        space = trace(name, "uniform")
        model = tiny_lm(name)
        low = space.lowest("params")
        importance = [RNG.random(g.width) for g in space.groups]
        for budget in (low, (1 + low) / 2, 0.97):
            plan = rlprune.make_plan(
                space,
                importance=importance,
                distribution=RNG.random(len(space.groups)),
                budget=budget,
                metric="params",
            )
            for kind in ("ffn", "attention"):
                found = [w for g, w in zip(space.groups, plan.widths, strict=True) if g.kind == kind]
                assert len(set(found)) <= 1
            slim = rlprune.prune(model, plan)
            assert plain_obstacle(slim) == ""
            form = plain_form(slim)
            assert "per_layer_config" not in form.config

    def test_each_block_keeps_its_own_best_units_and_the_cut_is_exact(self) -> None:
        model = tiny_lm("llama").double()
        space = rlprune.trace(model, tokens(), runtime="uniform")
        importance = [RNG.random(g.width) for g in space.groups]
        plan = rlprune.make_plan(
            space, importance=importance, distribution=np.ones(6), budget=0.6, metric="params"
        )
        kept = [k.tolist() for g, k in zip(space.groups, plan.kept, strict=True) if g.kind == "ffn"]
        assert len({len(k) for k in kept}) == 1 and len({tuple(k) for k in kept}) == 3
        ids = torch.randint(0, 90, (2, 7))
        with torch.no_grad():
            got, wanted = (f(model, plan)(input_ids=ids).logits for f in (rlprune.prune, rlprune.masked))
        assert torch.allclose(got, wanted, atol=1e-9)

    def test_only_numbers_of_heads_that_the_config_takes(self) -> None:
        """A hidden size of 64: 8 and 4 heads divide it, 7 to 5 do not."""
        model = tiny_lm("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
        space = rlprune.trace(model, tokens(), verify=False, runtime="uniform")
        assert {(g.step, g.minimum) for g in space.groups if g.kind == "attention"} == {(4, 4)}

    def test_bloom_has_nothing_that_could_be_cut(self) -> None:
        with pytest.raises(rlprune.GraphError, match="the classes of 'bloom' fix the number of neurons"):
            trace("bloom", "uniform")

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match=r"prune\.drop: 'uniform' loads no model in which single parts"):
            trace("llama", "uniform", drop=True)
        with pytest.raises(ConfigError, match=r"prune\.hidden: not with the runtime 'uniform'"):
            trace("llama", "uniform", hidden=True)
        with pytest.raises(
            ConfigError, match=r"all blocks alike, and 'model\.layers\.1\.mlp' stays as it is"
        ):
            trace("llama", "uniform", ignore=("model.layers.1.mlp",))


@pytest.mark.filterwarnings("ignore::rlprune.pruning.NarrowSpaceWarning")
class TestVllm:
    def test_heads_stay_and_whole_attentions_go_but_the_first(self) -> None:
        space = trace("llama", "vllm")
        assert {g.kind for g in space.groups} == {"ffn"} and len(space.groups) == 3
        assert "all blocks have one number of query heads" in space.protected["model.layers.1.self_attn"]
        space = trace("llama", "vllm", drop=True)
        heads = {g.block: (g.width, g.minimum, g.step) for g in space.groups if g.kind == "attention"}
        assert heads == {1: (3, 0, 3), 2: (3, 0, 3)}
        assert "begins the residual stream" in space.protected["model.layers.0.self_attn"]
        plans = space.project(RNG.random((200, len(space.groups))), 0.6, "params")
        found = {w for row in plans for g, w in zip(space.groups, row, strict=True) if g.kind == "attention"}
        assert found == {0, 3}

    def test_every_plan_maps(self) -> None:
        model = tiny_lm("llama")
        space = rlprune.trace(model, tokens(), verify=False, drop=True, runtime="vllm")
        for _ in range(10):
            assert len(block_configs(rlprune.prune(model, anything(space)))) == 3

    def test_a_probe_that_takes_a_whole_attention(self) -> None:
        """`sensitivity` goes on beyond its last probe in proportion to share / (1 - share), which has no end at 1."""
        model = tiny_lm("llama")
        workload = Sentences(model)
        space = rlprune.trace(model, workload.example_inputs, verify=False, drop=True, runtime="vllm")
        importance = rlprune.importance.magnitude(model, space)
        losses = iter(np.linspace(1.0, 2.0, 50))
        context = rlprune.Context(
            space, model, importance, 0.6, "params", workload, lambda widths: next(losses)
        )
        widths = rule_widths(rules_for(space)["sensitivity"], context)
        assert space.cost(widths, "params") <= space.target(0.6, "params")

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("gpt2", "reads blocks of different sizes of llama, mistral, and this model is of type 'gpt2'"),
            ("mistral", "reads no sliding window, and this model has one of 8"),
        ],
    )
    def test_models_that_it_does_not_read(self, name: str, line: str) -> None:
        with pytest.raises(ConfigError, match=line):
            trace(name, "vllm")


def test_what_is_allowed_instead_is_what_reads_the_model() -> None:
    mixture = type_model("mixtral", torch.float32)
    for runtime in ("vllm", "llama.cpp"):
        with pytest.raises(ConfigError, match=r"is of type 'mixtral'; allowed here: any$"):
            rlprune.trace(mixture, tokens(), verify=False, runtime=runtime)
    with pytest.raises(ConfigError, match=r"experts are in the place of .* part; allowed here: any$"):
        rlprune.trace(mixture, tokens(), verify=False, runtime="uniform")


class TestLlamaCpp:
    def test_everything_goes_that_can_be_cut_at_all(self) -> None:
        for drop in (False, True):
            free, own = (trace("llama", runtime, drop=drop) for runtime in ("any", "llama.cpp"))
            assert free.groups == own.groups

    @pytest.mark.parametrize(
        "name", ["llama", "llama-biases", "llama-mqa", "mistral", "ministral", "qwen2", "qwen3"]
    )
    def test_every_plan_has_an_architecture(self, name: str) -> None:
        pytest.importorskip("gguf")
        from rlprune.language.files.gguf_layout import layout_of

        model = tiny_lm(name, tie_word_embeddings=True)
        space = rlprune.trace(model, tokens(), verify=False, drop=True, runtime="llama.cpp")
        for _ in range(3):
            assert layout_of(rlprune.prune(model, anything(space))).neurons

    @pytest.mark.parametrize(
        ("name", "settings", "line"),
        [
            ("qwen3", {}, "only where its output layer is the embedding, and this model has one of its own"),
            ("llama", {"hidden_act": "gelu"}, "computes silu, swish, and this model's hidden_act is 'gelu'"),
        ],
    )
    def test_what_its_architectures_do_not_compute(
        self, name: str, settings: dict[str, Any], line: str
    ) -> None:
        with pytest.raises(ConfigError, match=line):
            rlprune.trace(tiny_lm(name, **settings), tokens(), verify=False, runtime="llama.cpp")

    def test_qwen3_has_no_block_without_attention(self) -> None:
        model = tiny_lm("qwen3", tie_word_embeddings=True)
        space = rlprune.trace(model, tokens(), verify=False, runtime="llama.cpp", drop=True)
        assert {(g.kind, g.minimum) for g in space.groups} == {("attention", 1), ("ffn", 0)}

    def test_gemma_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'llama\.cpp' reads .* of type 'gemma2'; allowed here: any, uniform"
        ):
            trace("gemma2", "llama.cpp")


class TestRounding:
    @pytest.mark.parametrize(
        ("width", "multiple"), [(1536, 32), (256, 32), (255, 1), (128, 16), (96, 8), (40, 4), (24, 2), (7, 1)]
    )
    def test_32_or_what_leaves_eight_steps(self, width: int, multiple: int) -> None:
        assert fitting_multiple(width) == multiple

    def test_rules_project_in_steps(self) -> None:
        """Every rule under the default of 32: within the budget, and no step more fits."""
        model = tiny_lm("llama", intermediate_size=512)
        workload = Sentences(model)
        space = rlprune.trace(model, workload.example_inputs, verify=False)
        assert set(space.steps[[g.kind == "ffn" for g in space.groups]]) == {32}
        importance = rlprune.importance.magnitude(model, space)
        context = rlprune.Context(space, model, importance, 0.7, "params", workload)
        ffn = np.array([g.kind == "ffn" for g in space.groups])
        for name, rule in rules_for(space).items():
            if rule.probes:
                continue
            widths, target = rule_widths(rule, context), space.target(0.7, "params")
            assert space.cost(widths, "params") <= target, name
            assert (widths[ffn] % 32 == 0).all(), name
            sets = [ffn] if name == "ffn_uniform" else [np.arange(6) == g for g in range(6)]
            for members in sets:
                more = np.where(members, space.limits.above(widths), widths)
                assert (more == widths).all() or space.cost(more, "params") > target, name
            if name == "ffn_uniform":
                assert len(set(widths[ffn])) == 1 and (widths[~ffn] == space.widths[~ffn]).all()

    def test_what_is_no_multiple_is_refused(self) -> None:
        with pytest.raises(
            rlprune.BudgetError, match="'lots' is no whole number of 1 and more; allowed: one, or auto"
        ):
            rlprune.trace(tiny_lm(), tokens(), round_to="lots")
        with pytest.raises(ConfigError, match=r"prune\.round_to: 'lots' is no whole number"):
            rlprune.load_config("tiny_llama", ["prune.round_to=lots"])
        with pytest.raises(ConfigError, match=r"prune\.round_to: must be at least 1, got 0"):
            rlprune.load_config("tiny_llama", ["prune.round_to=0"])
        assert rlprune.load_config("tiny_llama").prune.round_to == "auto"
        assert rlprune.load_config("tiny_llama", ["prune.round_to=256"]).prune.round_to == 256


def test_a_runtime_of_ones_own() -> None:
    @rlprune.runtime("a board that keeps the last block", name="board")
    def board(model: Any) -> rlprune.language.Restriction:
        return rlprune.language.Restriction(stays={"model.layers.2.mlp": "the board's own"})

    try:
        space = trace("llama", "board")
        assert "model.layers.2.mlp" not in [g.name for g in space.groups]
        assert space.protected["model.layers.2.mlp"] == "the board's own"
        assert rlprune.load_config("tiny_llama", ["prune.runtime=board"]).prune.runtime == "board"
        with pytest.raises(ConfigError, match="the name 'vllm' is taken"):
            rlprune.runtime("again", name="vllm")(board)
    finally:
        del RUNTIMES["board"]
    with pytest.raises(ConfigError, match=r"'board' is not one of any, llama\.cpp, vllm, uniform"):
        trace("llama", "board")


def test_images_have_no_runtime() -> None:
    from rlprune.vision.zoo import build_model

    model = build_model("cifar_resnet20", 10, arguments={"width": 8})
    with pytest.raises(
        ConfigError, match=r"prune\.runtime: 'vllm' is for language models, .*; allowed here: any"
    ):
        rlprune.trace(model, torch.zeros(1, 3, 16, 16), runtime="vllm")


# Through the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("runtimes") / "model")


def test_a_search_for_stock_transformers_ends_in_a_plain_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    config, out = write_config(tmp_path / "tiny.yaml", folder), str(tmp_path / "run")
    assert cli.main(["train", str(config), "--set", "prune.runtime=uniform", "--out", out]) == 0
    assert cli.main(["export", out, "--to", "hf", "--out", str(tmp_path / "plain")]) == 0
    assert "loads with transformers alone" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    plan = json.loads((tmp_path / "run" / "pruned" / "plan.json").read_text())
    assert plan["cost"]["params"] <= 0.8 * plan["dense_cost"]["params"]
    assert plain.config.intermediate_size in plan["widths"] and plain.config.intermediate_size % 4 == 0
    rows = {row["method"]: row for row in read_results(tmp_path / "run")["rows"]}
    for widths in (row["widths"] for row in rows.values() if row.get("widths")):
        assert len(set(widths[::2])) == len(set(widths[1::2])) == 1


def test_ffn_uniform_ends_in_a_plain_folder(folder: Path, tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "tiny.yaml", folder), tmp_path / "pruned"
    words = ["prune", str(config), "--rule", "ffn_uniform", "--budget", "70%", "--out", str(out)]
    assert cli.main(words) == 0
    assert cli.main(["export", str(out), "--to", "hf", "--out", str(tmp_path / "plain")]) == 0
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_inspect_says_what_each_runtime_allows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml", folder)
    assert cli.main(["inspect", str(config), "--set", "prune.drop=true"]) == 0
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "neurons (3 widths, in steps of 4, 3 may go whole)" in lines["runtime any"]
    assert "heads (2 widths, kept whole or dropped)" in lines["runtime vllm"]
    assert "not for this model: prune.drop: 'uniform'" in lines["runtime uniform"]
    assert "of the units go in steps of 4, not one by one" in lines["rounding"]
    assert cli.main(["inspect", str(config), "--set", "prune.runtime=uniform"]) == 0
    text = capsys.readouterr().out
    assert (
        "neurons (one width for all blocks, in steps of 4)"
        in text.partition("runtime uniform")[2].splitlines()[0]
    )
    assert text.index("runtime uniform") < text.index("runtime any")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ["prune.runtime=vlm"],
            "prune.runtime: 'vlm' is not one of any, llama.cpp, vllm, uniform (did you mean 'vllm'?)",
        ),
        (
            ["prune.runtime=uniform", "prune.drop=true"],
            "prune.drop: 'uniform' loads no model in which single parts",
        ),
        (["prune.runtime=vllm", "budget.target=0.2"], "is below the feasible minimum"),
        (
            ["prune.round_to=lots"],
            "prune.round_to: 'lots' is no whole number of 1 and more; allowed: one, or auto",
        ),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line(
    settings: list[str], line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path / "tiny.yaml", folder), tmp_path / "run"
    assert cli.main(["train", str(config), "--set", *settings, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert line in error[-1] and error[-1].startswith("rlprune: error: ")
    assert not (out / "results.json").exists()
