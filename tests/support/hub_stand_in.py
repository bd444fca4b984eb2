"""A stand-in of the Hugging Face hub's API on this machine: repositories are made, committed to and read from."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn(ThreadingHTTPServer):
    """Listens on a free port. `files[repo][path]` holds what was committed, `requests` every request's line."""

    daemon_threads = True

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, *_):
        pass

    def answer(self, body: bytes | dict, status: int = 200, headers: dict | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            known = isinstance(header, dict) and header.get("library_name") == "transformers"
            errors = [] if known else [{"message": "no library_name in the model card's header"}]
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.server.files.setdefault(repo, {})
            private = request.get("private") or request.get("visibility") == "private"
            self.server.private[repo] = bool(private)
            return self.answer({"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})
        match = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/(\w+)(\?.*)?", self.path)
        if match is None or match[1] not in self.server.files:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if match[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[match[1]][line["value"]["path"]] = content
        url = f"{self.server.address}/{match[1]}/commit/{COMMIT}"
        return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/(.+)/resolve/\w+/(.+?)(\?.*)?", self.path)
        if match and match[2] in self.server.files.get(match[1], {}):
            content = self.server.files[match[1]][match[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, headers={"ETag": etag, "X-Repo-Commit": COMMIT})
        return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET
