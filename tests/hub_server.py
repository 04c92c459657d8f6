"""A hub on this machine, as far as a push needs one: strict about what it is asked, and it keeps what it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_aSecretOfTheTests0123"
USER = "ada"
NO_REPO = "Repository not found"
LARGE = 2000  # bytes from which on a file is large, beside those of weights


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its visibility and its files; and every request, with what was wrong with it.

    `broken` gets a request's method and path, and answers it with a status where it returns one; 0 ends the connection.
    """

    daemon_threads = True

    def __init__(self, broken: Callable[[str, str], int | None] = lambda method, path: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.broken, self.role = broken, "write"
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.wrong: list[str] = []
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str) -> dict[str, bytes]:
        return self.repos[name]["files"]

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that a test has ended: no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        path, hub = self.path.partition("?")[0], self.server
        hub.requests.append(f"{self.command} {path}")
        self._check_token(path, body)
        if (status := hub.broken(self.command, path)) is not None:
            content: Any = {"error": "as the test asked"}
        elif not path.startswith("/storage/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status, content = 401, {"error": "Invalid username or password."}
        else:
            for method, pattern, action in ROUTES:
                if (found := re.fullmatch(pattern, path)) and method == self.command:
                    status, content = action(hub, *found.groups(), body)
                    break
            else:
                hub.wrong.append(f"no such call: {self.command} {path}")
                status, content = 404, {"error": "no such call"}
        if status == 0:
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", content.get("error", ""))
            if content.get("error") == NO_REPO:
                self.send_header("X-Error-Code", "RepoNotFound")
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _check_token(self, path: str, body: bytes) -> None:
        """The token is in its header, and nowhere else; the storage's addresses are signed, and need none."""
        others = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        if TOKEN in self.path or TOKEN in str(others) or TOKEN.encode() in body:
            self.server.wrong.append(f"the token is out: {path}")
        if path.startswith("/storage/") and "Authorization" in self.headers:
            self.server.wrong.append(f"the token went to the storage: {path}")


def _whoami(hub: Hub, body: bytes) -> tuple[int, Any]:
    return 200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": hub.role}}}


def _create(hub: Hub, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    if asked["organization"] not in (None, USER):
        return 403, {
            "error": f"You don't have the rights to create a model under the namespace {asked['organization']}"
        }
    name = f"{USER}/{asked['name']}"
    if name in hub.repos:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
    private = asked.get("visibility") == "private" or asked.get("private") is True
    hub.repos[name] = {"private": private, "files": {}}
    return 200, {"url": f"{hub.url}/{name}", "name": name}


def _info(hub: Hub, name: str, body: bytes) -> tuple[int, Any]:
    if name not in hub.repos:
        return 404, {"error": NO_REPO}
    return 200, {"_id": "1", "id": name, "modelId": name, "private": hub.repos[name]["private"], "sha": "a" * 40,
                 "siblings": [], "tags": [], "downloads": 0, "likes": 0}  # fmt: skip


def _auth_check(hub: Hub, name: str, write: str | None, body: bytes) -> tuple[int, Any]:
    return (200, {}) if name.startswith(f"{USER}/") else (403, {"error": "Forbidden"})


def _validate(hub: Hub, body: bytes) -> tuple[int, Any]:
    """The hub's rules for a card's metadata, of those that ours could break."""
    _, head, _ = json.loads(body)["content"].split("---\n", 2)
    data, errors = yaml.safe_load(head), []
    for name in (data.get("base_model"), *(data.get("datasets") or [])):
        if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append({"message": f'"{name}" is not valid. Use a name from https://hf.co'})
    for entry in data.get("model-index") or []:
        good = isinstance(entry["name"], str) and all(
            {"type", "name"} <= result["dataset"].keys() and result["task"]["type"]
            and all(m["type"] and m["value"] is not None for m in result["metrics"]) for result in entry["results"]
        )  # fmt: skip
        errors += [] if good else [{"message": "model-index is not valid"}]
    return (400, {"error": "invalid", "errors": errors}) if errors else (200, {"errors": [], "warnings": []})


def _preupload(hub: Hub, name: str, body: bytes) -> tuple[int, Any]:
    if name not in hub.repos:
        return 404, {"error": NO_REPO}
    files = []
    for file in json.loads(body)["files"]:
        large = file["path"].endswith(".safetensors") or file["size"] > LARGE
        files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
    return 200, {"files": files}


def _batch(hub: Hub, name: str, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
    objects = []
    for file in asked["objects"]:
        actions = {"upload": {"href": f"{hub.url}/storage/{file['oid']}"}, "verify": {"href": f"{hub.url}/verify"}}
        objects.append(file | ({} if file["oid"] in hub.large else {"actions": actions}))
    return 200, {"transfer": "basic", "objects": objects}


def _store(hub: Hub, oid: str, body: bytes) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        hub.wrong.append(f"not what was announced: {oid}")
        return 400, {"error": "another content"}
    hub.large[oid] = body
    return 200, {}


def _verify(hub: Hub, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    return (200, {}) if len(hub.large.get(asked["oid"], b"")) == asked["size"] else (404, {"error": "not there"})


def _commit(hub: Hub, name: str, body: bytes) -> tuple[int, Any]:
    header, *operations = [json.loads(line) for line in body.splitlines()]
    assert header["key"] == "header" and header["value"]["summary"]
    files = {}
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile" and len(hub.large[value["oid"]]) == value["size"]:
            files[value["path"]] = hub.large[value["oid"]]
        else:
            hub.wrong.append(f"no such operation: {operation['key']}")
            return 400, {"error": "no such operation"}
    hub.repos[name]["files"] |= files
    hub.commits += 1
    url = f"{hub.url}/{name}/commit/{'b' * 40}"
    return 200, {"success": True, "commitOid": "b" * 40, "commitUrl": url, "hookOutput": ""}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("GET", f"/api/models/{NAME}", _info),
    ("GET", f"/api/models/{NAME}/auth-check(/write)?", _auth_check),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", f"/api/models/{NAME}/preupload/main", _preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", _batch),
    ("PUT", "/storage/([0-9a-f]{64})", _store),
    ("POST", "/verify", _verify),
    ("POST", f"/api/models/{NAME}/commit/main", _commit),
)


@contextmanager
def serving(broken: Callable[[str, str], int | None] = lambda method, path: None) -> Iterator[Hub]:
    """A hub until the end of the block."""
    hub = Hub(broken)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
