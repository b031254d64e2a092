"""`rlprune push`: the card, a local folder, and a hub that a stub plays."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rlprune
from helpers.small import SMALL_DIGITS, SMALL_RUN, without
from rlprune.cli.main import main
from rlprune.experiments.push import model_card
from rlprune.workloads.adapter import read_pruned

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "half"
    words = ["prune", "digits", "--rule", "uniform", "--budget", "50%", "--out", str(folder)]
    assert main([*words, *without(SMALL_DIGITS)]) == 0
    return folder


def test_a_local_folder_is_what_would_be_pushed(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "card"
    words = ["push", str(pruned), "--out", str(out), "--license", "apache-2.0", "--base-model", "me/dense"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": str(out)}
    assert {path.name for path in out.iterdir()} == {path.name for path in pruned.iterdir()} | {"README.md"}
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(rlprune.load(out)(x), rlprune.load(pruned)(x))
    card = (out / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(card.split("---")[1])
    assert (
        facts["license"] == "apache-2.0" and facts["base_model"] == "me/dense" and "pruning" in facts["tags"]
    )
    document = read_pruned(pruned)
    for group, width in zip(document["groups"], document["widths"], strict=True):
        assert f"`{group['name']}`" in card and f" {width} " in card
    assert f"{document['cost']['macs'] / document['dense_cost']['macs']:.1%}" in card and "uniform" in card
    assert main(words) == 0, "a folder of ours is replaced"


def test_the_card_of_a_run_says_what_it_costs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rlprune.train(rlprune.load_config("digits", [*SMALL_RUN, "search.baselines=[]"]), run)
    card = model_card(read_pruned(run / "pruned"), "me/digits", run=run)
    assert "# digits\n" in card and "accuracy" in card and 'snapshot_download("me/digits")' in card


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give REPO"),
        (["a/b", "--out", "x"], "give REPO"),
        (["--out", "x", "--private"], "--private: is for a push"),
        (["not a name"], "expected OWNER/NAME"),
        (["../../etc"], "expected OWNER/NAME"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(pruned), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that one commit of small files makes."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._answer(
            {"name": "me", "type": "user", "auth": {}, "id": "me/digits", "sha": "0" * 40, "siblings": []}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/me/digits", "name": "me/digits"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {"success": True, "commitOid": "1" * 40, "commitUrl": "http://hub/me/digits/commit/1"}
            )
        else:
            self._answer({}, 404)

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Stub", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def pushed(pruned: Path, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "rlprune", "push", str(pruned), "me/digits", "--private", "--endpoint", endpoint]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_made_up",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=env, timeout=120, cwd=home.parent
    )


def test_a_push_is_one_commit_of_all_files(pruned: Path, hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    done = pushed(pruned, endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pushed: http://hub/me/digits/commit/1"
    assert handler.made[0]["private"] is True or handler.made[0].get("visibility") == "private"
    assert set(handler.files) == {path.name for path in pruned.iterdir()} | {"README.md"}
    for path in pruned.iterdir():
        assert handler.files[path.name] == path.read_bytes()


def test_a_hub_that_is_not_there_is_one_line(pruned: Path, tmp_path: Path) -> None:
    done = pushed(pruned, "http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode == 1 and "hf_made_up" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlprune: error")]
    assert "push to me/digits: " in line
