"""A server that speaks the Hub's protocol for uploads: HTTP API, git LFS with basic and multipart transfer, commits.

Written from huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py) and the LFS batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). Without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

WRITE, READ, FINE_GRAINED = "hf_write", "hf_read", "hf_fine"
_COMMIT = "0123456789abcdef0123456789abcdef012345"


@dataclass
class Repository:
    """Its files by path, the ids of those in LFS, and its visibility."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """The Hub for the user `me`, member of `team`.

    Attributes:
        received: contents in LFS by SHA-256, committed or not.
        multipart: size in bytes of a part; None for basic transfers.
        dropped: SHA-256 of a file: the connection is closed in the middle of each upload of it.
        sent: bytes of LFS contents received, by SHA-256.
    """

    daemon_threads = True

    def __init__(self, multipart: int | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.received: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.sent: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.multipart, self.dropped = multipart, None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that is stopped


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._route()

    def do_POST(self):
        self._route()

    def do_PUT(self):
        self._route()

    def log_message(self, *_):
        pass

    def _route(self):
        url = urlparse(self.path)
        parts = url.path.strip("/").split("/")
        self.server.requests.append((self.command, url.path))
        if parts[0] == "lfs":
            self._lfs(parts[1:])
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if url.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif (token := (self.headers.get("Authorization") or "").removeprefix("Bearer ")) not in (
            WRITE,
            READ,
            FINE_GRAINED,
        ):
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif url.path == "/api/whoami-v2":
            self._answer(_account(token))
        elif token in (READ, FINE_GRAINED) and self.command == "POST":
            self._answer({"error": "You don't have the rights to create or write"}, 403)
        elif url.path == "/api/repos/create":
            self._create(json.loads(body))
        elif url.path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], body)
        else:
            self._answer({"error": f"not found: {url.path}"}, 404)

    def _create(self, request):
        name = f"{request['organization'] or 'me'}/{request['name']}"
        if request["organization"] not in (None, "me", "team"):
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        if name in self.server.repositories:
            self._answer({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
            return
        self.server.repositories[name] = Repository(request.get("visibility") == "private")
        self._answer({"url": f"{self.server.url}/{name}", "name": name})

    def _model(self, name, action, body):
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif action in ([], ["revision", "main"]):
            siblings = [{"rfilename": path} for path in repository.files]
            self._answer(
                {"id": name, "private": repository.private, "sha": _COMMIT + "00", "siblings": siblings, "tags": []}
            )
        elif action[0] == "tree":
            self._answer([_entry(path, repository) for path in sorted(repository.files)])
        elif action[0] == "preupload":
            self._answer({"files": [_upload_mode(file["path"], repository) for file in json.loads(body)["files"]]})
        elif action[0] == "commit":
            self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": "not found"}, 404)

    def _commit(self, name, repository, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.received[value["oid"]]
                repository.lfs.add(value["path"])
        oid = f"{_COMMIT}{len(repository.commits):02d}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _batch(self, request):
        objects = []
        for file in request["objects"]:
            oid, size = file["oid"], file["size"]
            upload = {"href": f"{self.server.url}/lfs/{oid}"}
            if self.server.multipart:
                parts = range(1, -(-size // self.server.multipart) + 1)
                urls = {str(part): f"{self.server.url}/lfs/{oid}/{part}" for part in parts}
                upload = {"href": f"{self.server.url}/lfs/{oid}/complete"}
                upload["header"] = {"chunk_size": str(self.server.multipart), **urls}
            verify = {"href": f"{self.server.url}/lfs/{oid}/verify"}
            present = oid in self.server.received
            objects.append({**file, **({} if present else {"actions": {"upload": upload, "verify": verify}})})
        self._answer({"transfer": "multipart" if self.server.multipart else "basic", "objects": objects})

    def _lfs(self, parts):
        oid, action = parts[0], parts[1] if len(parts) > 1 else ""
        if self.command == "PUT":
            content = self._read_upload(oid)
            if content is None:
                self.close_connection = True  # without an answer
                return
            if action:
                self.server.parts.setdefault(oid, {})[int(action)] = content
            else:
                self.server.received[oid] = content
            self._answer({}, headers={"ETag": hashlib.md5(content).hexdigest()})
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if action == "complete":
            self.server.received[oid] = b"".join(content for _, content in sorted(self.server.parts[oid].items()))
            assert len(request["parts"]) == len(self.server.parts[oid])
        is_right = hashlib.sha256(self.server.received[oid]).hexdigest() == oid
        self._answer({} if is_right else {"error": "checksum mismatch"}, 200 if is_right else 400)

    def _read_upload(self, oid) -> bytes | None:
        """Read the body; None if the connection is to be dropped."""
        content = b""
        for chunk in self._chunks():
            content += chunk
            self.server.sent[oid] = self.server.sent.get(oid, 0) + len(chunk)
            if oid == self.server.dropped:
                return None
        return content

    def _chunks(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"])
        while left:
            chunk = self.rfile.read(min(left, 16384))
            left -= len(chunk)
            yield chunk

    def _answer(self, content, code=200, headers=None):
        body = json.dumps(content).encode()
        self.send_response(code)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def _account(token):
    role = {WRITE: "write", READ: "read", FINE_GRAINED: "fineGrained"}[token]
    access: dict = {"displayName": "test", "role": role}
    if role == "fineGrained":
        access["fineGrained"] = {
            "scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}]
        }
    return {
        "type": "user",
        "name": "me",
        "orgs": [{"name": "team"}],
        "auth": {"type": "access_token", "accessToken": access},
    }


def _upload_mode(path, repository):
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    oid = _oid(path, repository) if path in repository.files else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _oid(path, repository):
    """The id of a file in git; of one in LFS its SHA-256."""
    content = repository.files[path]
    if path in repository.lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path, repository):
    size, oid = len(repository.files[path]), _oid(path, repository)
    lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if path in repository.lfs else {}
    return {"type": "file", "path": path, "size": size, "oid": oid[:40], **lfs}
