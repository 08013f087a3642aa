"""`export --push` sends whole exports alone, in one commit, to a stand-in for the Hub that speaks its HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.cli.hub_upload import check_push, push
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.records.artifacts import atomic_folder, write_manifest
from ray_pipeline.records.integrity import damage

WEIGHTS = bytes(range(256)) * 8


@dataclass
class Hub:
    """What was asked of the stand-in, and what it keeps."""

    address: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> contents
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: str = ""  # a piece of an address that gets a 403
    private: bool | None = None  # of the repository; None where there is none

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.asked.append((method, path))
        if self.refuse and self.refuse in path:
            return 403, {"error": "You have read access only"}
        if path == "/api/models/me/model":
            there = {"id": "me/model", "private": self.private}
            return (404, {"error": "Repository not found"}) if self.private is None else (200, there)
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/me/model"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(("safetensors", "gguf")) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            found = json.loads(body)["objects"]
            made = [{**o, "actions": {"upload": {"href": f"{self.address}/put/{o['oid']}"}}} for o in found]
            return 200, {"transfer": "basic", "objects": made}
        if method == "PUT":
            self.large[path.removeprefix("/put/")] = body
        if path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.address}/me/model/commit/abc", "commitOid": "abc"}
        return 200, {"name": "me", "errors": [], "warnings": []}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


@pytest.fixture
def hub(monkeypatch):
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = found.answer(self.command, self.path, body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path) -> Path:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")
        (folder / "hf" / "model.safetensors").write_bytes(WEIGHTS)
        write_manifest(folder / "hf")
        (folder / "model-q8_0.gguf").write_bytes(b"GGUF" + WEIGHTS)
        (folder / "export.json").write_text("{}")
    return tmp_path / "out"


def test_the_repository_holds_every_file_and_a_manifest_that_fits(hub, out, tmp_path):
    check_push("me/model", public=False)
    assert push(out, "me/model", public=False) == f"{hub.address}/me/model/commit/abc"
    assert hub.created["visibility"] == "private" and hub.created["name"] == "model"
    assert hub.files.keys() == {"config.json", "model.safetensors", "model-q8_0.gguf", "export.json", "manifest.json"}
    assert hub.files["model.safetensors"] == WEIGHTS and hashlib.sha256(WEIGHTS).hexdigest() in hub.large
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, contents in hub.files.items():
        (fetched / name).write_bytes(contents)
    assert damage(fetched) is None
    (fetched / "model-q8_0.gguf").write_bytes(b"GGUF" + WEIGHTS[::-1])
    assert "model-q8_0.gguf: damaged" in str(damage(fetched))


def test_public_is_only_what_was_asked_to_be(hub, out):
    for private in (None, True):
        hub.private = private
        check_push("me/model", public=False)
    hub.private = False
    check_push("me/model", public=True)
    with pytest.raises(UserError, match="is there already, for all to see. Add --public"):
        check_push("me/model", public=False)
    push(out, "me/model", public=True)
    assert hub.created["visibility"] == "public"


def test_a_tampered_export_is_not_sent(hub, out):
    (out / "model-q8_0.gguf").write_bytes(b"GGUF" + WEIGHTS[::-1])
    with pytest.raises(UserError, match=r"model-q8_0\.gguf: damaged"):
        push(out, "me/model", public=False)
    assert hub.asked == []


def test_what_the_hub_refuses_is_told_and_the_export_stays(hub, out):
    hub.refuse = "commit/main"
    with pytest.raises(StageFailed, match=r"--push me/model: the Hub says .*403.*The export is whole in .*out"):
        push(out, "me/model", public=False)
    assert damage(out) is None and not hub.files


def test_names_tokens_and_addresses_are_checked_before_anything_is_exported(hub, monkeypatch, tmp_path):
    for name in ("model", "a/b/c", "me/..", ""):
        with pytest.raises(UserError, match="names no repository"):
            check_push(name, public=False)
    hub.refuse = "whoami"
    with pytest.raises(UserError, match=r"the Hub says .*403.*Set another HF_TOKEN"):
        check_push("me/model", public=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Hub says"):
        check_push("me/model", public=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token of the Hub"):
        check_push("me/model", public=False)
