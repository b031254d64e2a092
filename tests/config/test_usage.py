"""Settings that are given and not used, as a person types them: one line, exit code 2, nothing begun."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from helpers.pages import EACH_PAGE, command_lines
from rlprune.agents import AGENTS, Entry
from rlprune.cli import main as cli
from rlprune.cli.options import read_config
from rlprune.config.config import Config, load_config, settings_reference, shipped_configs
from rlprune.config.search import PPOConfig
from rlprune.errors import ConfigError
from rlprune.experiments.build import expected_adapter
from rlprune.experiments.usage import RULES, check_usage

COMMANDS = ("inspect", "train", "apply", "apply --refine", "prune", "prune --stages", "prune --steps", "benchmark",
            "fidelity", "evaluate")  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    return tmp_path


def line(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 400
    return err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # What the command does not do.
        ("prune digits --rule uniform --set finish.epochs=3", "finish.epochs: 'rlprune prune' does no fine-tune"),
        ("prune digits --rule uniform --set search.evaluations=5", "'rlprune prune' does no search"),
        ("prune digits --rule uniform --stages 2 --set score.samples=8", "'rlprune prune --stages' scores no"),
        ("prune digits --rule uniform --stages 2 --set finish.epochs=3", "finish.epochs: rounds are trained by steps"),
        ("prune digits --rule uniform --stages 2 --steps 5 --set finish.steps=9", "--steps is the number of steps"),
        ("prune digits --rule uniform --stages 2 --set finish.rules=false", "'rlprune prune --stages' does not look"),
        ("inspect digits --set search.evaluations=5", "'rlprune inspect' does no search, so it is not used"),
        ("inspect digits --set finish.lr=0.1", "'rlprune inspect' does no fine-tune"),
        ("inspect digits --set recovery.steps=[none]", "'rlprune inspect' recovers nothing"),
        ("inspect digits --set score.kind=loss", "'rlprune inspect' scores no candidate"),
        ("inspect digits --set prune.importance=l2", "'rlprune inspect' ranks no units"),
        ("inspect digits --set model.train.lr=0.2", "'rlprune inspect' trains nothing"),
        ("evaluate folder digits --set search.agent=random", "'rlprune evaluate' does no search"),
        ("evaluate folder digits --set budget.target=0.3", "'rlprune evaluate' has no budget"),
        ("evaluate folder digits --set prune.round_to=8", "'rlprune evaluate' cuts nothing"),
        ("apply folder digits --set search.batch=5", "apply' does no search, so it is not used; `rlprune train`"),
        ("apply folder digits --set finish.epochs=2", "'rlprune apply' does no fine-tune"),
        ("apply folder digits --refine 5 --set search.evaluations=5", "--refine is the number of evaluations"),
        ("apply folder digits --refine 5 --set search.base_rule=erk", "the policy's own base rule is taken"),
        ("apply folder digits --refine 5 --set search.baselines=[tpe]", "'rlprune apply --refine' does not look at it"),
        ("fidelity digits --set search.evaluations=5", "'rlprune fidelity' does no search"),
        ("fidelity digits --set finish.candidates=2", "'rlprune fidelity' chooses no winner"),
        ("fidelity digits --set score.rungs=[10]", "'rlprune fidelity' does no search"),
        ("benchmark digits --set search.model_seeds=[1]", "'rlprune benchmark' does not look at it"),
        ("benchmark digits --set finish.rules=false", "'rlprune benchmark' does not look at it"),
        ("benchmark digits --methods lamp,tpe --set search.ppo.hidden=8", "the agents here are tpe, so it is not used"),
        ("benchmark digits --methods lamp,erk --set search.ppo.hidden=8", "search.ppo.hidden: no agent searches here"),
        # Agents that do not search.
        ("train digits --set search.cma_es.bound=0.2", "so it is not used; give search.agent=cma_es"),
        ("train digits --set search.agent=random search.batch=5", "search.batch: the agents here are random, so"),
        ("train digits --set search.sb3.arguments.tau=0.1", "search.sb3.arguments: the agents here are ppo, random"),
        # What the other settings leave of use.
        ("train digits --set search.stages=3", "only the agent ppo in search.mode=direct prunes in stages"),
        ("train digits --set search.agent=evopress search.stages=3", "search.stages: only the agent ppo"),
        ("train digits --set search.ppo.n_steps=8", "search.ppo.n_steps: search.mode is surrogate, so it is not used"),
        ("train digits --set search.mode=direct search.ppo.surrogate_steps=8", "search.mode is direct"),
        ("train digits --set search.mode=direct search.batch=8", "search.batch: search.mode is direct"),
        ("train digits --set recovery.finetune_lr=0.1", "finetune_lr: recovery.steps is without finetune"),
        ("train digits --set recovery.distill=false", "distill: recovery.steps is without finetune"),
        ("train digits --set recovery.steps=[bn] recovery.ridge=1 prune.importance=l2", "ridge: recovery.steps is"),
        ("train digits --set budget.batch_size=8", "budget.batch_size: budget.metric is not latency"),
        ("train digits --set budget.table=t.json", "budget.table: budget.metric is not latency"),
        ("train digits --set model.train.epochs=0 model.train.lr=0.2", "model.train.lr: model.train.epochs is 0"),
        ("train digits --set finish.epochs=0 finish.lr=0.2", "finish.lr: the final fine-tune has no length"),
        ("train digits --set finish.distill=false finish.temperature=3", "temperature: finish.distill is false"),
        ("train tiny_llama --set finish.steps=9 finish.method=full finish.rank=4", "rank: finish.method is full"),
        ("train tiny_llama --set finish.steps=9 finish.method=spp finish.dropout=0.1", "dropout: finish.method is not"),
        # What only one kind of model has.
        ("train digits --set finish.steps=9", "finish.steps: 'cifar_resnet20' is fine-tuned by epochs"),
        ("train digits --set finish.method=full", "finish.method: only for language models, so it is not used"),
        ("train digits --set finish.rank=4", "'cifar_resnet20' is none"),
        ("train digits --set score.top_k=64", "score.top_k: only for language models"),
        ("train digits --set recovery.shrink=0.1", "recovery.shrink: only for language models"),
        ("train digits --set model.dtype=bfloat16", "model.dtype: only for language models"),
        ("train digits --set data.sequence_length=64", "data.sequence_length: only for language models"),
        ("train digits --set data.files.train=a.txt", "data.files: only for language models"),
        ("inspect digits --set prune.drop=true", "prune.drop: only for language models"),
        ("inspect digits --set prune.hidden=true", "prune.hidden: only for language models"),
        ("train tiny_llama --set finish.epochs=2", "finish.epochs: 'tiny_llama' is a language model"),
        ("train tiny_llama --set finish.steps=5 finish.momentum=0.5", "trained by AdamW, so it is not used; only SGD"),
        ("train tiny_llama --set model.train.momentum=0.5", "model.train.momentum: 'tiny_llama' is a language model"),
        ("train tiny_llama --set model.train.label_smoothing=0.1", "'tiny_llama' is a language model"),
        ("train tiny_llama --set data.image_size=32", "data.image_size: 'tiny_llama' is a language model"),
        ("train tiny_llama --set data.augment=false", "data.augment: 'tiny_llama' is a language model"),
    ],
)  # fmt: skip
def test_typed_and_not_used(
    words: str, expected: str, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    text = line(capsys, words)
    assert expected in text
    assert ", so it is not used; " in text
    assert [path.name for path in place.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("command", "name", "overrides"),
    [
        ("train", "digits", "search.mode=direct search.ppo.n_steps=8 search.stages=2 finish.epochs=2"),
        ("train", "digits", "search.agent=ppo_stages search.ppo.n_steps=8 search.ppo_stages.stages=3"),
        ("train", "digits", "search.baselines=[cma_es] search.cma_es.bound=0.2"),
        ("train", "digits", "budget.metric=latency budget.batch_size=8"),
        ("train", "digits", "recovery.steps=[finetune] recovery.finetune_steps=2 recovery.finetune_lr=0.1"),
        ("train", "tiny_llama", "finish.steps=9 finish.dropout=0.1 finish.rank=4 finish.temperature=3"),
        ("train", "tiny_llama", "recovery.steps=[none] recovery.ridge=0.1"),  # obs_fisher takes it
        ("train", "digits", "recovery.steps=[bn] recovery.ridge=0.1"),  # which auto may be
        ("benchmark", "digits", "search.cma_es.bound=0.2 search.ppo.n_steps=8 search.ppo.surrogate_steps=9"),
        ("apply --refine", "digits", "search.batch=5 search.ppo.kappa=0.1"),
        ("prune --stages", "digits", "finish.steps=9 finish.lr=0.1"),
        ("prune --steps", "tiny_llama", "finish.method=full finish.lr=0.1"),
        ("fidelity", "digits", "finish.epochs=2 recovery.finetune_lr=0.1 recovery.distill=false"),
        ("inspect", "tiny_llama", "prune.drop=true budget.target=0.3"),
        ("tune", "tiny_llama", "finish.steps=9 finish.batch_size=4"),
        # The default is never refused.
        ("prune", "digits", "finish.epochs=0 search.evaluations=300 prune.drop=false"),
        # A file's settings are not to blame for what is typed beside it.
        ("train", "tiny_llama", "model.name=cifar_resnet20 data.name=digits"),
        ("train", "digits", "model.train.epochs=0"),
    ],
)
def test_typed_and_used(command: str, name: str, overrides: str) -> None:
    words = overrides.split()
    check_usage(load_config(name, words), command, words)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_files_serve_every_command(command: str, name: str) -> None:
    check_usage(load_config(name), command)


def written(place: Path, text: str) -> None:
    values = {"model": {"name": "cifar_resnet20"}, "data": {"name": "digits"}} | yaml.safe_load(text)
    (place / "mine.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search: {agent: random, stages: 3}", "search.stages: only the agent ppo"),
        ("search: {ppo: {n_steps: 8}}", "search.ppo.n_steps: search.mode is surrogate"),
        (
            "search: {mode: direct, ppo: {surrogate_steps: 8}}",
            "search.ppo.surrogate_steps: search.mode is direct",
        ),
        ("search: {mode: direct, batch: 8}", "search.batch: search.mode is direct"),
        ("recovery: {finetune_lr: 0.1}", "recovery.finetune_lr: recovery.steps is without finetune"),
        (
            "{recovery: {steps: [bn], ridge: 0.1}, prune: {importance: l2}}",
            "recovery.ridge: recovery.steps is without reconstruct",
        ),
        ("budget: {table: t.json}", "budget.table: budget.metric is not latency"),
        ("score: {top_k: 9}", "score.top_k: only for language models"),
    ],
)
@pytest.mark.parametrize("words", ["inspect mine.yaml", "prune mine.yaml --rule lamp", "train mine.yaml"])
def test_of_no_use_in_a_file(
    text: str, expected: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(place, text)
    assert expected in line(capsys, words)


@pytest.mark.parametrize(
    "text",
    [
        "search: {evaluations: 9, cma_es: {bound: 0.2}, ppo: {hidden: 8}, model_seeds: [1]}",
        "search: {agent: random, ppo: {n_steps: 8, surrogate_steps: 9}, batch: 5}",
        "finish: {epochs: 2, lr: 0.1, candidates: 2, rules: false}",
        "finish: {lr: 0.1, batch_size: 16}",
        "{}",
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_serves_several_commands(text: str, command: str, place: Path) -> None:
    written(place, text)
    check_usage(load_config("mine.yaml"), command)


def test_what_a_run_wrote_down_is_not_given(place: Path) -> None:
    """RUN/config.yaml names every setting."""
    (place / "config.yaml").write_text(load_config("digits").to_yaml())
    for command in COMMANDS:
        check_usage(load_config("config.yaml"), command)


def test_settings_from_python_are_checked_as_a_file_is() -> None:
    config = load_config("digits")
    search = dataclasses.replace(config.search, ppo=PPOConfig(n_steps=8))
    with pytest.raises(
        ConfigError, match=r"search\.ppo\.n_steps: search\.mode is surrogate, so it is not used"
    ):
        check_usage(dataclasses.replace(config, search=search), "train")


def test_what_a_user_brings_may_read_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [
        "finish.steps=3",
        "data.sequence_length=64",
        "score.top_k=9",
        "data.augment=false",
        "finish.epochs=2",
    ]
    config = Config.from_dict({"workload": "mine:build"}).override(own)
    assert expected_adapter(config) is None
    check_usage(config, "train", own)
    monkeypatch.setitem(AGENTS, "curious", Entry("curious", "reads what it likes", "", lambda session: None))
    words = ["search.agent=curious", "search.ppo.n_steps=8", "search.stages=3", "search.cma_es.bound=0.2"]
    check_usage(load_config("digits", words), "train", words)


def test_the_table_names_settings_that_exist() -> None:
    from fnmatch import fnmatch

    paths = [setting.path for setting in settings_reference()]
    for rule in RULES:
        for pattern in rule.settings:
            assert any(fnmatch(path, pattern) for path in paths), pattern
        assert set(rule.choices or ()) <= set(paths)


@EACH_PAGE
def test_the_commands_of_the_pages_use_what_they_are_given(page: Path) -> None:
    for words in command_lines(page):
        if words[0] != "rlprune" or "--plugin" in words:
            continue
        args = cli.build_parser().parse_args(cli._separate_sets(words[1:]))
        if getattr(args, "config", None) in shipped_configs():
            read_config(args)


def test_what_was_overridden_in_python_may_leave_other_settings_without_use() -> None:
    """A file's `search.batch` is no mistake of whoever asks for the other mode on top of it."""
    file = load_config("digits").to_dict()
    file["search"]["batch"] = 4
    config = Config.from_dict(file)
    check_usage(config.override(["search.mode=direct"]), "train")
    check_usage(load_config("digits", ["search.mode=direct"]), "train")
    assert config.override(["search.mode=direct"]) == config.override(["search.mode=direct", "seed=0"])
    with pytest.raises(ConfigError, match=r"search\.batch: search\.mode is direct"):
        check_usage(config.override(["search.mode=direct", "search.batch=5"]), "train")
    file["search"]["mode"] = "direct"
    with pytest.raises(ConfigError, match=r"search\.batch: search\.mode is direct"):
        check_usage(Config.from_dict(file), "train")
