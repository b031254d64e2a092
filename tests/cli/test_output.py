"""What commands print: tables within 100 columns, a headline, JSON alone on standard output, completion scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.run_fixture import write_run
from helpers.small import SMALL_DIGITS, without
from rlprune.cli import commands, output
from rlprune.cli import main as cli
from rlprune.cli.completion import SHELLS
from rlprune.report import benchmark, comparison
from rlprune.report.results import read_results

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`train` that leaves a finished run at once, and tells its callback so."""
    from rlprune.experiments import train

    def instantly(config: Any, out: Path, *, resume: bool, callback: Any) -> None:
        callback.note("a note")
        callback.status("ppo", 1, 2)
        callback.close()
        write_run(out, seeds=1)
        (out / "report.html").write_text("")

    monkeypatch.setattr(train, "train", instantly)
    return tmp_path / "run"


def test_train_ends_with_a_narrow_table_and_the_decision(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = run(capsys, "train", "digits", "--out", str(trained))
    assert code == 0 and "a note" in err
    assert not re.search(r"\x1b\[[0-9;]*(3|9)[0-9]", out)  # no colour, though bold letters may be
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith(("* ", "† ", "+ ")))]
    assert max(len(line) for line in table) <= 100
    names = ("dense", "uniform +", "erk +", "global_taylor +", "random", "ppo *")
    assert all(any(line.startswith(name) for line in table) for name in names)
    assert lines[-3].startswith("Asked for at most 50.0% of the dense MACs, the plan of ppo brings")
    assert lines[-1] == f"report: {trained / 'report.html'}"


def test_quiet_leaves_the_decision_and_the_report(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "digits", "--out", str(trained), "--quiet")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 3 and out.startswith("Asked for")


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_json_is_alone_on_standard_output(
    quiet: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "train", "digits", "--out", str(trained), "--json", *quiet)
    summary = json.loads(out)
    assert code == 0 and "Asked for" in err
    assert summary["run"] == str(trained) and summary["method"] == "ppo"
    assert {row["method"] for row in summary["rows"]} >= {"dense", "ppo", "uniform"}
    assert summary["costs"]["macs"] == {"dense": 40.55e6, "pruned": 20.27e6}
    assert isinstance(summary["as_good_and_cheaper"], list)


def test_an_error_under_json_leaves_standard_output_empty(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "nowhere", "--json")
    assert (code, out) == (2, "") and err.startswith("rlprune: error: RUN: nowhere")


def test_report_and_rebuilt_pages_have_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    code, out, err = run(capsys, "report", str(tmp_path), "--json")
    assert code == 0 and json.loads(out) == {"report": str(tmp_path / "report.html")}
    assert err == f"report: {tmp_path / 'report.html'}\n"


def test_lists_have_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "rules", "--json")
    assert code == 0 and list(found := json.loads(out)) == ["rules"]
    assert {"uniform", "lamp"} <= {entry["name"] for entry in found["rules"]}
    assert all(entry["summary"] for entry in found["rules"])


def test_inspect_and_evaluate_have_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = without(SMALL_DIGITS, "model.train", "data", "device")
    code, out, err = run(capsys, "inspect", "digits", "--json", *words)
    found = json.loads(out)
    assert code == 0 and "feasible budgets" in err
    assert found["budget"]["target"] == pytest.approx(0.5 * found["costs"]["macs"]["dense"], rel=0.01)
    assert 0 < found["costs"]["params"]["lowest"] < found["costs"]["params"]["dense"]
    assert all(1 <= group["minimum"] <= group["width"] for group in found["groups"]) and found["protected"]
    folder = str(tmp_path / "half")
    words = ["prune", "digits", "--rule", "uniform", "--budget", "50%", "--out", folder]
    assert run(capsys, *words, *without(SMALL_DIGITS))[0] == 0
    code, out, err = run(capsys, "evaluate", folder, "--json")
    found = json.loads(out)
    assert code == 0 and "give CONFIG" in err
    assert (
        0.45 < found["pruned"]["macs"] / found["dense"]["macs"] <= 0.5 and found["pruned"]["ms_batch_1"] > 0
    )


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_commands_without_a_use_for_them_refuse_them(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "schema", option)
    assert (code, out) == (2, "") and f"{option}, which another command has" in err


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.json")))
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_benchmark_tables_fit(
    name: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(RESULTS / name, tmp_path / "results.json")
    monkeypatch.setattr(output, "WIDTH", min(100, width))
    for view in comparison.per_budget(read_results(tmp_path)):
        table = benchmark.short(view)
        assert table is not None
        output.print_table(table)
        out = capsys.readouterr().out
        assert max(len(line) for line in out.splitlines()) <= min(100, width)
        if width >= 100:
            assert all(
                any(x.startswith(line.cells[0].text) for x in out.splitlines()) for line in table.lines
            )


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_know_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "completion", shell)
    assert (code, err) == (0, "")
    for word in ("benchmark", "evaluations", "fidelity", "json"):
        assert word in out
    program = shutil.which(shell)
    if program is not None and shell in ("bash", "zsh", "fish"):
        done = subprocess.run([program, "-n"], input=out, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_bash_completes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    _, script, _ = run(capsys, "completion", "bash")
    ask = 'COMP_WORDS=(rlprune bench); COMP_CWORD=1; _shtab_rlprune; echo "${COMPREPLY[@]}"'
    done = subprocess.run([bash, "-c", f"{script}\n{ask}"], text=True, capture_output=True)
    assert done.stdout.split() == ["benchmark"], done.stderr


def test_every_command_with_progress_can_be_quiet() -> None:
    parser = cli.build_parser()
    for words in (
        "demo",
        "train digits",
        "apply run digits",
        "prune digits",
        "benchmark digits",
        "evaluate dir",
    ):
        assert parser.parse_args([*words.split(), "--quiet"]).quiet
    assert parser.parse_args(["fidelity", "digits", "--quiet"]).quiet
    assert commands.watcher(parser.parse_args(["demo", "--quiet"])).shown == "none"
