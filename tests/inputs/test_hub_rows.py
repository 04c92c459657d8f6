"""A name on the hub, asked for over HTTP by the library's own client, of a small server in the hub's place."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from running import python

FILES = {
    "train.csv": b"question,answer\nq0,NA\nq1,007\n" + b"q,a\n" * 4,
    "README.md": b"---\nconfigs:\n- config_name: all\n  data_files: train.csv\n---\n",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from noisefit.base.errors import one_line_errors
from noisefit.inputs.sources import find_source
from noisefit.inputs.tables import read_rows
import train_loop
from noisefit.run.settings import parse_arguments

for word in ("org/none", "org/gated"):
    try:
        with one_line_errors("program"):
            find_source("--train_data", word, {}, ("train",))
    except SystemExit:
        pass
with one_line_errors("train_loop.py"):
    train_loop.train(parse_arguments(sys.argv[1:]))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as reading a data set needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"{}", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/org/gated" in path:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="access is restricted")
        if "/org/none" in path or "/org/mine" not in path:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if "/tree/" in path and not path.endswith("/data"):
            found = [{"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                     for name, content in FILES.items()]  # fmt: skip
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if "/revision/" in path:
            about = {"id": "org/mine", "sha": COMMIT, "private": False, "siblings": [], "tags": [], "downloads": 0}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        content = FILES.get(path.rpartition("/")[2]) if "/resolve/" in path else None
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(200, content, X_Repo_Commit=COMMIT, ETag=f'"{digest(content)}"', Accept_Ranges="bytes")


def digest(content):
    return hashlib.sha1(content).hexdigest()


@pytest.mark.slow
def test_a_name_on_the_hub_trains_and_its_commit_is_recorded(llama_folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = python(
            "-c", PROGRAM, "--model", str(llama_folder), "--train_data", "org/mine", "--revision", "v1",
            "--max_steps=1", "--dataset_config=all", "--columns", "prompt=question", "response=answer",
            f"--output_model={tmp_path / 'out'}",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
            HF_DATASETS_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
    finally:
        server.shutdown()
    lines = done.stderr.splitlines()
    assert lines[0].startswith("program: error: --train_data org/none: no such file or folder, and on the hub: "), lines
    assert lines[1].startswith("program: error: --train_data org/gated: no such file or folder, and on the hub: "), (
        lines
    )
    assert "gated" in lines[1].partition("on the hub")[2] and "6 rows; 1 steps of 16 rows; processes: 1" in lines
    record = json.loads((tmp_path / "out" / "noisefit_config.json").read_text())
    assert record["revision"] == COMMIT and record["train_data"] == "org/mine" and done.returncode == 0
