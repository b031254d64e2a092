"""Wrong inputs, and the very line that each prints (test_wrong_lines.py runs them)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.lm_folder import write_config
from helpers.small import SMALL_DIGITS

SETS = " ".join(f"--set {text}" for text in SMALL_DIGITS)
FOLDER = "name: must be the name of a folder, without / and \\ and of at most 100 bytes, got "
OWN = """
import sys
import torch
from torch import nn
import rlprune

class Exits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
    def forward(self, x):
        sys.exit(0)

class Stop(BaseException):
    pass

def model():
    return Exits()

def builder():
    raise Stop

class Own(rlprune.Workload):
    def __init__(self, where):
        self.where = where
        self.model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
        self.example_inputs = torch.zeros(1, 1, 8, 8)
    def batches(self, split, limit=None):
        yield torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    def loss(self, outputs, targets):
        if self.where == "loss":
            sys.exit(5)
        return nn.functional.cross_entropy(outputs, targets, reduction="none")
    def metric(self, outputs, targets):
        sys.exit("done")

def loss(config):
    return Own("loss")

def metric(config):
    return Own("metric")
"""


@dataclass(frozen=True)
class Wrong:
    """A command, the line that it prints, and what is done to the whole files before."""

    words: str
    line: str
    edit: Callable[[Path], object] | None = None


def put(file: str, path: str, value: Any) -> Callable[[Path], None]:
    """Another value at a dotted path of a JSON file; a | is a dot within a name."""

    def edit(place: Path) -> None:
        document = json.loads((place / file).read_text())
        owner = document
        *way, last = path.split(".")
        for key in (part.replace("|", ".") for part in way):
            owner = owner[int(key) if isinstance(owner, list) else key]
        last = last.replace("|", ".")
        owner[int(last) if isinstance(owner, list) else last] = value
        (place / file).write_text(json.dumps(document))

    return edit


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda place: (place / file).write_text(content)


def link(file: str) -> Callable[[Path], None]:
    """A file of a run becomes a symbolic link to one that must not change."""

    def edit(place: Path) -> None:
        (place / "precious").write_text("precious")
        (place / file).unlink(missing_ok=True)
        (place / file).symlink_to(place / "precious")

    return edit


def instead(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        (place / file).unlink(missing_ok=True)
        make(place / file)

    return edit


def both(*edits: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        for one in edits:
            one(place)

    return edit


def started(place: Path) -> None:
    """A run that was killed: its settings and a lock file."""
    from rlprune.config.config import load_config

    (place / "run" / "results.json").unlink()
    (place / "run" / ".rlprune.lock").write_text("")
    (place / "run" / "config.yaml").write_text(load_config("digits", SMALL_DIGITS).to_yaml())
    shutil.rmtree(place / "run" / "pruned")


def dense(place: Path) -> None:
    write_config(place / "dense.yaml", "dense")


def own(place: Path) -> None:
    (place / "own_exits.py").write_text(OWN)


def own_tokenizer(place: Path) -> None:
    """A tokenizer of code that leaves a mark where it runs."""
    settings = json.loads((place / "lm" / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own_tokenizer.Own", None]}, "tokenizer_class": "Own"}
    (place / "lm" / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "lm" / "own_tokenizer.py").write_text(
        f"open({str(place / 'ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )


def train(*sets: str) -> str:
    return f"train digits {SETS} " + " ".join(f"--set {word}" for word in sets) + " --out new"


RESUME = f"train digits {SETS} --resume --out run"
REPORT = "report run"
APPLY = f"apply policy digits {SETS} --out new"
EVALUATE = "evaluate pruned"
LM = "evaluate lm --tasks questions.json"
TABLE = "inspect digits --set budget.metric=latency --set budget.table=table.json"
BOMB = "a0: &a0 1\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 7))
NAN_WIDTHS = (
    '{"index": 0, "method": "ppo", "seed": 0, "task": "", "widths": [NaN], "cost": 1, "score": 1, "loss": 1, '
    '"metric": 1, "error": 0, "seconds": 1}\n'
)
CASES: dict[str, Wrong] = {
    "a name that leads out of runs": Wrong(
        "train digits --set name=../../evil",
        FOLDER + "'../../evil'",
        None,
    ),
    "an absolute name": Wrong(
        "train digits --set name=/tmp/evil",
        FOLDER + "'/tmp/evil'",
        None,
    ),
    "an empty name": Wrong(
        "train digits --set name=''",
        "name: expected text, got None",
        None,
    ),
    "a blank name": Wrong(
        "train digits --set name='\" \"'",
        FOLDER + "' '",
        None,
    ),
    "a name that is a folder above": Wrong(
        "train digits --set name=..",
        FOLDER + "'..'",
        None,
    ),
    "a name of two lines": Wrong(
        "train digits --set 'name=\"a\\nb\"'",
        FOLDER + "'a\\nb'",
        None,
    ),
    "a name with a zero byte": Wrong(
        "train digits --set 'name=\"a\\0b\"'",
        "name: holds a zero byte or half of a character, got 'a\\x00b'",
        None,
    ),
    "a long name": Wrong(
        "train digits --set name=" + "x" * 300,
        FOLDER + "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...",
        None,
    ),
    "a name of another benchmark": Wrong(
        "benchmark digits --set name=../evil",
        FOLDER + "'../evil'",
        None,
    ),
    "a seed above 2**63": Wrong(
        train("seed=9223372036854775808"),
        "seed: must be at most 9223372036854775807, got 9223372036854775808",
        None,
    ),
    "a seed below 0": Wrong(
        train("seed=-1"),
        "seed: must be at least 0, got -1",
        None,
    ),
    "a model's seed": Wrong(
        train("model.seed=1e30"),
        "model.seed: expected whole number, got 1e+30",
        None,
    ),
    "--seed above 2**63": Wrong(
        "train digits --seed 9223372036854775808",
        "seed: must be at most 9223372036854775807, got 9223372036854775808",
        None,
    ),
    "--seed below 0": Wrong(
        "train digits --seed -1",
        "argument --seed: must be a whole number of 0 and more, got '-1'; see rlprune train --help",
        None,
    ),
    "a budget of 0": Wrong(
        train("budget.target=0"),
        'budget.target: 0.0 is not a budget; allowed: a ratio in (0, 1] such as 0.5 or "50%", or an '
        'absolute cost such as "150M"',
        None,
    ),
    "a negative budget": Wrong(
        train("budget.target=-5"),
        'budget.target: -5.0 is not a budget; allowed: a ratio in (0, 1] such as 0.5 or "50%", or an '
        'absolute cost such as "150M"',
        None,
    ),
    "an endless budget": Wrong(
        train("budget.target=1e400"),
        "budget.target: must be a finite number, got inf",
        None,
    ),
    "a budget that is no number": Wrong(
        train("budget.target=nan"),
        "budget.target: 'nan' is not a budget; allowed: a ratio in (0, 1] such as 0.5 or \"50%\", or an "
        'absolute cost such as "150M"',
        None,
    ),
    "a budget of no unit": Wrong(
        train("budget.target=150MM"),
        "budget.target: '150MM' is not a budget; allowed: a ratio in (0, 1] such as 0.5 or \"50%\", or an "
        'absolute cost such as "150M"',
        None,
    ),
    "--budget of no unit": Wrong(
        "prune digits --rule erk --budget 150MM",
        "budget.target: '150MM' is not a budget; allowed: a ratio in (0, 1] such as 0.5 or \"50%\", or an "
        'absolute cost such as "150M"',
        None,
    ),
    "a number of text": Wrong(
        train("search.evaluations=1e308"),
        "search.evaluations: expected whole number, got 1e+308",
        None,
    ),
    "too many evaluations": Wrong(
        train("search.evaluations=100000000000000000000"),
        "search.evaluations: must be at most 1000000, got 100000000000000000000",
        None,
    ),
    "a rate of a million": Wrong(
        train("model.train.lr=1e308"),
        "model.train.lr: must be at most 10, got 1e+308",
        None,
    ),
    "a network of 17 GB": Wrong(
        train("search.ppo.hidden=65536"),
        "search.ppo.hidden: must be at most 4096, got 65536",
        None,
    ),
    "a path with a zero byte": Wrong(
        train("'data.root=\"\\0\"'"),
        "data.root: holds a zero byte or half of a character, got '\\x00'",
        None,
    ),
    "a list of lists": Wrong(
        train("model.arguments.width=" + "[" * 40 + "]" * 40),
        "model.arguments.width: nested too deeply",
        None,
    ),
    "an alias bomb": Wrong(
        "inspect bomb.yaml",
        "bomb.yaml: its aliases stand for over 500,000 values",
        text("bomb.yaml", BOMB),
    ),
    "an alias of itself": Wrong(
        "inspect self.yaml",
        "self.yaml: not valid YAML: an alias stands for what holds it",
        text("self.yaml", "model: &m {arguments: *m}\n"),
    ),
    "a deep YAML file": Wrong(
        "inspect deep.yaml",
        "deep.yaml: not valid YAML: nested too deeply",
        text("deep.yaml", "a: " + "[" * 20000),
    ),
    "a config that is a pipe": Wrong(
        "inspect pipe.yaml",
        "pipe.yaml: is a pipe, where a file is to be read",
        lambda place: os.mkfifo(place / "pipe.yaml"),
    ),
    "a policy's hidden size of text": Wrong(
        APPLY,
        "policy: hidden: must be a whole number from 1 to 65536, got '64'",
        put("policy/policy.json", "meta.hidden", "64"),
    ),
    "a policy's hidden size of 17 GB": Wrong(
        APPLY,
        "policy: tensor 'actor.0.bias' has shape (8,), not (65536,)",
        put("policy/policy.json", "meta.hidden", 65536),
    ),
    "a policy's hidden size beyond that": Wrong(
        APPLY,
        "policy: hidden: must be a whole number from 1 to 65536, got 1000000000000000000000000000000",
        put("policy/policy.json", "meta.hidden", 10**30),
    ),
    "a policy's metric": Wrong(
        APPLY,
        "policy: metric: must be a cost metric (`rlprune list metrics`), got 'joules'",
        put("policy/policy.json", "meta.metric", "joules"),
    ),
    "a policy's fingerprints": Wrong(
        APPLY,
        "policy: fingerprints: must be a list of texts, got 3",
        put("policy/policy.json", "meta.fingerprints", 3),
    ),
    "a policy's kinds": Wrong(
        APPLY,
        "policy: kinds: must be a list of texts, got 5",
        put("policy/policy.json", "meta.kinds", 5),
    ),
    "a policy's sensitivity": Wrong(
        APPLY,
        "policy: sensitivity: must be a list of two ratios, or an empty one, got 7",
        put("policy/policy.json", "meta.sensitivity", 7),
    ),
    "a policy's sensitivities": Wrong(
        APPLY,
        "policy: sensitivity: must be a list of two ratios, or an empty one, got [0.1]",
        put("policy/policy.json", "meta.sensitivity", [0.1]),
    ),
    "a policy's budgets": Wrong(
        APPLY,
        "policy: budgets: must be a list of pairs of ratios, got 1",
        put("policy/policy.json", "meta.budgets", 1),
    ),
    "a policy's stages": Wrong(
        APPLY,
        "policy: stages: must be a whole number from 1 to 1000, got 'x'",
        put("policy/policy.json", "meta.stages", "x"),
    ),
    "a policy's checkpoints": Wrong(
        APPLY,
        "policy: checkpoints: must be a whole number, got []",
        put("policy/policy.json", "meta.checkpoints", []),
    ),
    "a policy's reach": Wrong(
        APPLY,
        "policy: reach: must be a number above 0 and up to 10, got 1e+308",
        put("policy/policy.json", "meta.reach", 1e308),
    ),
    "a policy's base rule": Wrong(
        APPLY,
        "policy: base_rule: must be the name of a rule (`rlprune list rules`), got 4",
        put("policy/policy.json", "meta.base_rule", 4),
    ),
    "a policy's unknown base rule": Wrong(
        APPLY,
        "policy: base_rule: must be the name of a rule (`rlprune list rules`), got 'erkk'",
        put("policy/policy.json", "meta.base_rule", "erkk"),
    ),
    "a policy's features": Wrong(
        APPLY,
        "policy: its features are not those of version 1; train it again",
        put("policy/policy.json", "meta.features", 9),
    ),
    "a policy's feature version": Wrong(
        APPLY,
        "policy: saw features of version [1]; this program shows 1, 2, 3",
        put("policy/policy.json", "meta.feature_version", [1]),
    ),
    "a policy's tensors": Wrong(
        APPLY,
        "policy/policy.json: damaged: the field 'tensors' is not a dict",
        put("policy/policy.json", "tensors", 3),
    ),
    "a policy's tensor's shape": Wrong(
        APPLY,
        "policy/policy.safetensors: 'log_std' has shape [], the JSON says 9",
        put("policy/policy.json", "tensors.log_std", 9),
    ),
    "a policy of NaN": Wrong(
        APPLY,
        "policy/policy.json: truncated or not JSON (NaN is not allowed)",
        text("policy/policy.json", '{"format": NaN}'),
    ),
    "a policy nested deeply": Wrong(
        APPLY,
        "policy/policy.json: truncated or not JSON (nested too deeply)",
        text("policy/policy.json", '{"a":' * 50000),
    ),
    "a plan's cost without end": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: cost.macs: must be a finite number of 0 and more, got "
        "100000000000000000...0000000000000000000",
        put("pruned/plan.json", "cost.macs", 10**99),
    ),
    "a plan's cost of text": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: cost.macs: must be a finite number of 0 and more, got 'many'",
        put("pruned/plan.json", "cost.macs", "many"),
    ),
    "a plan's negative cost": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: dense_cost.params: must be a finite number of 0 and more, got -1",
        put("pruned/plan.json", "dense_cost.params", -1),
    ),
    "a plan's negative width": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: group 'conv1': needs whole-number widths and a list of kept units",
        put("pruned/plan.json", "widths.0", -4),
    ),
    "a plan's width of text": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: group 'conv1': needs whole-number widths and a list of kept units",
        put("pruned/plan.json", "groups.0.width", "16"),
    ),
    "a plan's group that is a number": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: a group has no name",
        put("pruned/plan.json", "groups.0", 3),
    ),
    "a plan's group's name": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: a group has no name",
        put("pruned/plan.json", "groups.0.name", 3),
    ),
    "a plan's groups alike": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: two groups are called 'layer1.1.conv1'",
        put("pruned/plan.json", "groups.0.name", "layer1.1.conv1"),
    ),
    "a plan's endless unit": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: group 'conv1': kept units must be ascending numbers below 4",
        put("pruned/plan.json", "groups.0.kept.0", 10**30),
    ),
    "a plan's attributes": Wrong(
        EVALUATE,
        "pruned/plan.json: attributes.conv1: must be a table of sizes, got [8]",
        put("pruned/plan.json", "attributes.conv1", [8]),
    ),
    "a plan's attribute": Wrong(
        EVALUATE,
        "pruned/plan.json: attributes: conv1.out_channels = '8' is not a size that may be set",
        put("pruned/plan.json", "attributes.conv1", {"out_channels": "8"}),
    ),
    "a plan's roots": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: the field 'roots' is not a dict",
        put("pruned/plan.json", "roots", []),
    ),
    "a plan's root": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: roots.conv1: must name a tensor, a dim and a per_unit, got {'tensor': 3}",
        put("pruned/plan.json", "roots.conv1", {"tensor": 3}),
    ),
    "a plan's root's dimension": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: roots.conv1: must name a tensor, a dim and a per_unit, got {'dim': "
        "-1, 'per_unit': 1, 'tensor': 'conv1.weight'}",
        put("pruned/plan.json", "roots.conv1.dim", -1),
    ),
    "a plan's root of no group": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: roots: there is no group 'layer9'",
        put("pruned/plan.json", "roots", {"layer9": {"tensor": "conv1.weight", "dim": 0, "per_unit": 1}}),
    ),
    "a plan's tensor's shape": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: tensors.conv1.weight: must be a shape, got '8x4'",
        put("pruned/plan.json", "tensors.conv1|weight", "8x4"),
    ),
    "a plan's version": Wrong(
        EVALUATE,
        "pruned/plan.json: version: must be a whole number of 1 and more, got True",
        put("pruned/plan.json", "version", True),
    ),
    "a plan's input": Wrong(
        EVALUATE,
        "pruned/plan.json: input: is no size of a sample: more than 268,435,456 numbers in a sample",
        put("pruned/plan.json", "input", [1, 1000000, 1000000, 4]),
    ),
    "a plan's metric": Wrong(
        EVALUATE,
        "pruned/plan.json: damaged: budget.metric: must be a text, got []",
        put("pruned/plan.json", "budget.metric", []),
    ),
    "an LM's config that is a list": Wrong(
        LM,
        "lm/config.json: not a configuration",
        text("lm/config.json", "[]"),
    ),
    "an LM's layers": Wrong(
        LM,
        "lm/config.json: per_layer_config: must be a table of layers",
        put("lm/config.json", "per_layer_config", [1]),
    ),
    "an LM's heads": Wrong(
        LM,
        "lm/config.json: num_attention_heads: is '4', plan.json says 6",
        put("lm/config.json", "num_attention_heads", "4"),
    ),
    "an LM's generation settings that are a list": Wrong(
        LM,
        "lm/generation_config.json: must be a table of settings, got [1, 2]",
        text("lm/generation_config.json", "[1, 2]"),
    ),
    "an LM's generation settings": Wrong(
        LM,
        "lm/generation_config.json: must be a table of settings, got 3",
        text("lm/generation_config.json", "3"),
    ),
    "an LM's broken generation settings": Wrong(
        LM,
        "lm/generation_config.json: truncated or not JSON (Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1))",
        text("lm/generation_config.json", "{"),
    ),
    "an LM's tokenizer's settings": Wrong(
        LM,
        "lm: holds no tokenizer that can be read (lm/tokenizer_config.json: must be a table of "
        "settings, got []); give CONFIG to take the dense model's",
        text("lm/tokenizer_config.json", "[]"),
    ),
    "a tokenizer of own code": Wrong(
        LM,
        "lm: holds no tokenizer that can be read (lm/tokenizer_config.json: auto_map: the tokenizer is "
        "code that comes with it, which is never run); give CONFIG to take the dense model's",
        own_tokenizer,
    ),
    "a dense LM's config": Wrong(
        "inspect dense.yaml",
        "model.name 'hf:dense': its config.json must be a table, got []",
        both(dense, text("dense/config.json", "[]")),
    ),
    "a dense LM's architectures": Wrong(
        "inspect dense.yaml",
        "model.name 'hf:dense': its config's architectures must be a list of names",
        both(dense, put("dense/config.json", "architectures", 3)),
    ),
    "a dense LM's generation": Wrong(
        "prune dense.yaml --rule uniform --out new",
        "model.name 'hf:dense': its generation_config.json must be a table, got [1]",
        both(dense, text("dense/generation_config.json", "[1]")),
    ),
    "report.html that is a link": Wrong(
        REPORT,
        "run/report.html: is a symbolic link, where a file is to be written; remove it or choose "
        "another place",
        link("run/report.html"),
    ),
    "report.html that is a folder": Wrong(
        REPORT,
        "run/report.html: is a folder, where a file is to be written; remove it or choose another place",
        lambda place: (place / "run" / "report.html").mkdir(),
    ),
    "report.html that is a pipe": Wrong(
        REPORT,
        "run/report.html: is a pipe, where a file is to be written; remove it or choose another place",
        lambda place: os.mkfifo(place / "run" / "report.html"),
    ),
    "results.json that is a pipe": Wrong(
        REPORT,
        "run/results.json: is a pipe, where a file is to be read",
        instead("run/results.json", os.mkfifo),
    ),
    "ledger.jsonl of a run that is a link": Wrong(
        RESUME,
        "run/ledger.jsonl: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/ledger.jsonl")),
    ),
    "results.json of a run that is a link": Wrong(
        RESUME,
        "run/results.json: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/results.json")),
    ),
    "run.log of a run that is a link": Wrong(
        RESUME,
        "run/run.log: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/run.log")),
    ),
    "config.yaml of a run that is a link": Wrong(
        RESUME,
        "run/config.yaml: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/config.yaml")),
    ),
    ".rlprune.lock of a run that is a link": Wrong(
        RESUME,
        "run/.rlprune.lock: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/.rlprune.lock")),
    ),
    "state of a run that is a link": Wrong(
        RESUME,
        "run/state: is a symbolic link that leads out of run; remove it or choose another --out",
        both(started, link("run/state")),
    ),
    "ledger.jsonl that is a pipe": Wrong(
        RESUME,
        "run/ledger.jsonl: is a pipe; remove it or choose another --out",
        both(started, instead("run/ledger.jsonl", os.mkfifo)),
    ),
    "a ledger line of text": Wrong(
        RESUME,
        "run/ledger.jsonl: line 1 is damaged (Expecting value: line 1 column 1 (char 0))",
        both(started, text("run/ledger.jsonl", "not json" + "\n")),
    ),
    "a ledger line of a list": Wrong(
        RESUME,
        "run/ledger.jsonl: line 1 is damaged (not a JSON object)",
        both(started, text("run/ledger.jsonl", "[]" + "\n")),
    ),
    "a ledger line of no widths": Wrong(
        RESUME,
        "run/ledger.jsonl: line 1 is damaged (method is missing)",
        both(started, text("run/ledger.jsonl", '{"index": 0}' + "\n")),
    ),
    "a ledger line of NaN widths": Wrong(
        RESUME,
        "run/ledger.jsonl: line 1 is damaged (widths cannot be [nan])",
        both(started, text("run/ledger.jsonl", NAN_WIDTHS)),
    ),
    "results' rows": Wrong(
        REPORT,
        "run/results.json: rows: need a list of objects with a method",
        put("run/results.json", "rows", 3),
    ),
    "results' row": Wrong(
        REPORT,
        "run/results.json: rows: need a list of objects with a method",
        put("run/results.json", "rows.0", []),
    ),
    "results' version": Wrong(
        REPORT,
        "run/results.json: version '1'; this rlprune reads up to 1",
        put("run/results.json", "version", "1"),
    ),
    "results' summary": Wrong(
        REPORT,
        "run/results.json: summary: need a list of objects, got [3]",
        put("run/results.json", "summary", [3]),
    ),
    "results' budgets": Wrong(
        REPORT,
        "run/results.json: budgets: need a list of objects, got [1, 2]",
        put("run/results.json", "budgets", [1, 2]),
    ),
    "a latency table's grid": Wrong(
        TABLE,
        "table.json: latency table: damaged: tables: each has a kind, widths (outs, ins), a grid of "
        "milliseconds and elements",
        put("table.json", "tables.0.outs", "x"),
    ),
    "a latency table's endless number": Wrong(
        TABLE,
        "table.json: latency table: conv: values must be finite, 0 and more, and never fall",
        put("table.json", "tables.0.milliseconds.0.0", 10**99),
    ),
    "a latency table's layers": Wrong(
        TABLE,
        "table.json: latency table: damaged: layers: each has a module, the number of its table and calls",
        put("table.json", "layers", [3]),
    ),
    "a latency table's calibration": Wrong(
        TABLE,
        "table.json: latency table: a calibration factor is negative",
        put("table.json", "calibration.weighted", -1),
    ),
    "a latency table's machine": Wrong(
        TABLE,
        "table.json: damaged: the field 'machine' is not a dict",
        put("table.json", "machine", 3),
    ),
    "an own model that exits": Wrong(
        train("model.name=own_exits:model", "model.arguments={}"),
        "PLACE/own_exits.py, line 12, in forward: ends the program (sys.exit(0)); it has to raise an "
        "error instead",
        own,
    ),
    "an own builder that exits": Wrong(
        train("model.name=own_exits:builder", "model.arguments={}"),
        "PLACE/own_exits.py, line 21, in builder: ends the program (Stop); it has to raise an error instead",
        own,
    ),
    "an own loss that exits": Wrong(
        "train digits --set workload=own_exits:loss --out new",
        "PLACE/own_exits.py, line 32, in loss: ends the program (sys.exit(5)); it has to raise an error "
        "instead",
        own,
    ),
    "an own metric that exits": Wrong(
        "train digits --set workload=own_exits:metric --out new",
        "PLACE/own_exits.py, line 35, in metric: ends the program (sys.exit('done')); it has to raise "
        "an error instead",
        own,
    ),
}
