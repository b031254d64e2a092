"""`rlprune push`: the card, a local folder, and a hub that a stub plays."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml

import rlprune
from helpers.run_fixture import write_run
from helpers.small import SMALL_DIGITS, without
from rlprune.cli.main import main
from rlprune.experiments.push import model_card
from rlprune.workloads.adapter import read_pruned


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


def test_the_card_of_a_run_says_what_it_costs(pruned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    shutil.rmtree(run / "pruned")
    shutil.copytree(pruned, run / "pruned")
    assert main(["push", str(run), "--out", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "# card\n" in card and "50.0% of the dense MACs" in card and "from 0.92 to 0.94" in card
    card = model_card(read_pruned(pruned), "me/digits")
    assert 'snapshot_download("me/digits")' in card and "0.94" not in card


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
    refuses = False

    def do_GET(self) -> None:
        self._answer(
            {"name": "me", "type": "user", "auth": {}, "id": "me/digits", "sha": "0" * 40, "siblings": []}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses:
            self._answer({"error": "You may not"}, 403)
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/repos/create"):
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
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/me/digits/commit/1",
                }
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


def push(pruned: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    return main(["push", str(pruned), "me/digits", "--private", "--endpoint", endpoint])


def test_a_push_is_one_commit_of_all_files(
    pruned: Path,
    hub: tuple[str, type[Hub]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endpoint, handler = hub
    assert push(pruned, endpoint, monkeypatch) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == f"pushed: {endpoint}/me/digits/commit/1"
    assert "private" in (
        handler.made[0].get("visibility"),
        *(k for k, v in handler.made[0].items() if v is True),
    )
    assert set(handler.files) == {path.name for path in pruned.iterdir()} | {"README.md"}
    for path in pruned.iterdir():
        assert handler.files[path.name] == path.read_bytes()


def test_a_hub_that_refuses_is_one_line(
    pruned: Path,
    hub: tuple[str, type[Hub]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endpoint, handler = hub
    handler.refuses = True
    assert push(pruned, endpoint, monkeypatch) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("rlprune: error")]
    assert "push to me/digits: " in line and "hf_made_up" not in line and not handler.files
