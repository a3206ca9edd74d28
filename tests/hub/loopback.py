"""A Hub on this machine: a standard-library server that speaks the Hugging Face Hub's protocol, and can misbehave.

Two servers run in threads: the API on 127.0.0.1, and the store of large files on localhost under another port, so that
a redirect to it leads to a foreign origin. Every request is logged; faults are queued and taken by the requests that
they match.

    with Loopback() as hub:
        commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": content})
        hub.fault("GET .*model.safetensors", flip=True)
        hf_hub_download("org/name", "model.safetensors", endpoint=hub.endpoint)
        assert hub.requests("GET .*model")
"""

import base64
import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FOREVER = 1 << 30
TOKEN = "hf_loopback"
"""Whoever sends it owns every repository and has accepted every repository's terms."""
LARGE = (".safetensors", ".bin", ".onnx")
"""Files that are kept in the store of large files (LFS)."""


@dataclass
class Fault:
    """What goes wrong with the requests whose `METHOD path` a pattern matches, in this order of precedence."""

    where: re.Pattern[str]
    times: int
    status: int = 0
    """Answer this instead."""
    code: str = ""
    """`X-Error-Code` of that answer."""
    message: str = ""
    """`X-Error-Message` of that answer."""
    silent: bool = False
    """Accept the request and never answer."""
    lost: bool = False
    """Do what was asked, and close the connection without an answer."""
    flip: bool = False
    """Flip one bit of the body."""
    short: int | None = None
    """Serve only so many bytes, as if they were all."""
    cut: int | None = None
    """Announce the whole body, close the connection after so many bytes."""
    reset: int | None = None
    """The same with a reset in place of an orderly end."""
    stall: int | None = None
    """Announce the whole body, fall silent after so many bytes."""
    length: int | None = None
    """Add this to the announced Content-Length."""
    pause: float = 0.0
    """Seconds between the tenths of a body."""
    trickle: float = 0.0
    """Seconds between single bytes."""
    compress: bool = False
    """Content-Encoding: gzip."""
    ranges: bool = True
    """Honour Range."""
    first: Callable[[], object] | None = None
    """Called before what was asked is done."""
    after: Callable[[], object] | None = None
    """Called when it is done, before the answer."""


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Repository:
    """Commits by id, and the names that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts a whole tree on top of a branch; returns the commit."""
        content = repr((self.branches.get(branch), sorted((k, sha256(v)) for k, v in files.items()), len(self.commits)))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's id means."""
        names = self.branches | self.tags
        return names.get(revision) or (revision if revision in self.commits else None)


class Reply(Exception):
    """The answer to a request: raised or returned."""

    def __init__(self, status: int, body: Any = b"", **headers: str):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json")


class Loopback:
    """The Hub; a context manager.

    Attributes:
        endpoint: What HF_ENDPOINT shall be.
        repositories: By `org/name`.
        objects: Large files by sha256.
        redirect: Serve large files by a redirect to the other origin, as the Hub does; otherwise directly.
    """

    def __init__(self, redirect: bool = True):
        self.redirect = redirect
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._servers = [_Server(self), _Server(self)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.blobs = f"http://localhost:{self._servers[1].server_port}"

    def __enter__(self) -> "Loopback":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Goes away: whoever comes later is refused."""
        if self._closing.is_set():
            return
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repository: str, files: dict[str, bytes], branch: str = "main", **kwargs: bool) -> str:
        """A commit with these files and no others, in a repository that is made if there is none."""
        repo = self.repositories.setdefault(repository, Repository(**kwargs))
        self.objects.update({sha256(v): v for k, v in files.items() if k.endswith(LARGE)})
        return repo.commit(dict(files), branch)

    def fault(self, where: str, times: int = 1, **kwargs: Any) -> Fault:
        """Queues a fault for the next `times` requests whose `METHOD path` the pattern `where` is found in."""
        self.faults.append(Fault(re.compile(where), times, **kwargs))
        return self.faults[-1]

    def environment(self, folder: Path) -> dict[str, str]:
        """What a process must find in its environment to use this Hub, with its caches in a folder."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "cache"),
            "XDG_CACHE_HOME": str(folder / "own"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def requests(self, where: str = "") -> list[Request]:
        """The logged requests whose `METHOD path` the pattern is found in."""
        return [request for request in list(self.log) if re.search(where, str(request))]

    def take(self, request: Request) -> Fault | None:
        """The first queued fault that a request matches; what is used up leaves the queue."""
        with self._lock:
            for fault in self.faults:
                if fault.where.search(str(request)):
                    fault.times -= 1
                    self.faults = [other for other in self.faults if other.times > 0]
                    return fault
        return None

    def answer(self, request: Request) -> Reply:
        """What the protocol says."""
        path, _, query = request.path.partition("?")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and request.method in method.split():
                names = {name: unquote(value) for name, value in match.groupdict().items()}
                try:
                    with self._lock:
                        return function(self, request, parse_qs(query), **names)
                except Reply as reply:
                    return reply
        return Reply(404, {"error": "no such route"})

    def repository(self, request: Request, id: str, write: bool = False) -> Repository:
        """A repository, if whoever asks may see it."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise Reply(401, X_Error_Message="Invalid credentials in Authorization header")
        repo = self.repositories.get(id)
        if repo is None or (repo.private or write) and not token:
            raise Reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        return repo

    def commit(self, request: Request, id: str, revision: str, write: bool = False) -> tuple[Repository, str]:
        """A repository and the commit of a revision."""
        repo = self.repository(request, id, write)
        commit = repo.find(revision)
        if commit is None:
            raise Reply(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return repo, commit


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _resolve(hub: Loopback, request: Request, query: Any, id: str, revision: str, file: str) -> Reply:
    repo, commit = hub.commit(request, id, revision)
    if repo.gated and "authorization" not in request.headers:
        return Reply(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {id} is restricted")
    headers = {"X-Repo-Commit": commit}
    content = repo.commits[commit].get(file)
    if content is None:
        return Reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **headers)
    if not file.endswith(LARGE):
        return Reply(200, content, ETag=f'"{git_sha1(content)}"', **headers)
    digest = sha256(content)
    if not hub.redirect:
        return Reply(200, content, ETag=f'"{digest}"', **headers)
    headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
    return Reply(302, Location=f"{hub.blobs}/objects/{digest}", ETag=f'"{git_sha1(content)}"', **headers)


def _object(hub: Loopback, request: Request, query: Any, digest: str) -> Reply:
    if digest not in hub.objects:
        return Reply(404)
    return Reply(200, hub.objects[digest], ETag=f'"{hashlib.md5(digest.encode()).hexdigest()}"')


def _file(hub: Loopback, request: Request, query: Any, path: str) -> Reply:
    return Reply(200, hub.files[path]) if path in hub.files else Reply(404)


def _info(hub: Loopback, request: Request, query: Any, id: str, revision: str = "main") -> Reply:
    repo, commit = hub.commit(request, id, revision)
    siblings: list[dict[str, Any]] = []
    for name, content in sorted(repo.commits[commit].items()):
        siblings.append({"rfilename": name})
        if "blobs" in query:
            siblings[-1] |= {"size": len(content), "blobId": git_sha1(content)}
            if name.endswith(LARGE):
                siblings[-1]["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    gated = "auto" if repo.gated else False
    return Reply(200, {"id": id, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings})


def _tree(hub: Loopback, request: Request, query: Any, id: str, revision: str) -> Reply:
    repo, commit = hub.commit(request, id, revision)
    return Reply(200, [_node(name, content) for name, content in sorted(repo.commits[commit].items())])


def _paths_info(hub: Loopback, request: Request, query: Any, id: str, revision: str) -> Reply:
    repo, commit = hub.commit(request, id, revision)
    paths = parse_qs(request.body.decode())["paths"]
    return Reply(200, [_node(path, repo.commits[commit][path]) for path in paths if path in repo.commits[commit]])


def _node(path: str, content: bytes) -> dict[str, Any]:
    node: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if path.endswith(LARGE):
        node["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return node


def _refs(hub: Loopback, request: Request, query: Any, id: str) -> Reply:
    repo = hub.repository(request, id)
    kinds = (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    refs = {
        kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in names.items()]
        for kind, folder, names in kinds
    }
    return Reply(200, refs | {"converts": []})


def _create(hub: Loopback, request: Request, query: Any) -> Reply:
    asked = json.loads(request.body)
    id = f"{asked.get('organization') or 'user'}/{asked['name']}"
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        return Reply(401, X_Error_Message="Invalid credentials in Authorization header")
    status = 409 if id in hub.repositories else 200
    private = asked.get("visibility") == "private" or asked.get("private", False)
    repo = hub.repositories.setdefault(id, Repository(private=private))
    if not repo.commits:
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    return Reply(status, {"url": f"{hub.endpoint}/{id}", "error": "You already created this model repo"})


def _validate(hub: Loopback, request: Request, query: Any) -> Reply:
    return Reply(200, {"errors": [], "warnings": []})


def _preupload(hub: Loopback, request: Request, query: Any, id: str, revision: str) -> Reply:
    repo, commit = hub.commit(request, id, revision, write=True)
    files = []
    for file in json.loads(request.body)["files"]:
        large = file["path"].endswith(LARGE)
        files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        present = repo.commits[commit].get(file["path"])
        if present is not None:
            files[-1]["oid"] = sha256(present) if large else git_sha1(present)
    return Reply(200, {"files": files})


def _batch(hub: Loopback, request: Request, query: Any, id: str) -> Reply:
    hub.repository(request, id, write=True)
    objects = []
    for asked in json.loads(request.body)["objects"]:
        objects.append({"oid": asked["oid"], "size": asked["size"]})
        if asked["oid"] not in hub.objects:
            upload, verify = f"{hub.blobs}/objects/{asked['oid']}", f"{hub.endpoint}/{id}.git/info/lfs/verify"
            objects[-1]["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify}}
    return Reply(200, {"transfer": "basic", "objects": objects})


def _put(hub: Loopback, request: Request, query: Any, digest: str) -> Reply:
    if sha256(request.body) != digest or "authorization" in request.headers:
        return Reply(400)
    hub.objects[digest] = request.body
    return Reply(200, ETag=f'"{digest}"')


def _verify(hub: Loopback, request: Request, query: Any, id: str) -> Reply:
    return Reply(200 if json.loads(request.body)["oid"] in hub.objects else 404, {})


def _commit(hub: Loopback, request: Request, query: Any, id: str, revision: str) -> Reply:
    repo, head = hub.commit(request, id, revision, write=True)
    files = dict(repo.commits[head])
    for line in map(json.loads, request.body.splitlines()):
        value = line["value"]
        if line["key"] == "header" and value.get("parentCommit", head) != head:
            return Reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return Reply(400, {"error": f"{value['path']}: the object is not there"})
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    commit = repo.commit(files, revision)
    return Reply(200, {"commitUrl": f"{hub.endpoint}/{id}/commit/{commit}", "commitOid": commit})


def _tag(hub: Loopback, request: Request, query: Any, id: str, revision: str) -> Reply:
    repo, commit = hub.commit(request, id, revision, write=True)
    tag = json.loads(request.body)["tag"]
    if tag in repo.tags:
        return Reply(409, {"error": f"Tag reference exists already: {tag}"})
    repo.tags[tag] = commit
    return Reply(200, {})


_ID = r"(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("HEAD GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
    ("HEAD GET", r"/objects/(?P<digest>[0-9a-f]{64})", _object),
    ("HEAD GET", r"/files/(?P<path>.+)", _file),
    ("GET", rf"/api/models/{_ID}", _info),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)", _info),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _tree),
    ("POST", rf"/api/models/{_ID}/paths-info/(?P<revision>[^/]+)", _paths_info),
    ("GET", rf"/api/models/{_ID}/refs", _refs),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _batch),
    ("POST", rf"/{_ID}\.git/info/lfs/verify", _verify),
    ("PUT", r"/objects/(?P<digest>[0-9a-f]{64})", _put),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", _commit),
    ("POST", rf"/api/models/{_ID}/tag/(?P<revision>[^/]+)", _tag),
]
"""Methods, path, and who answers: the table of the protocol."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Loopback):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def answer(self) -> None:
        hub = self.server.hub
        if hub._closing.is_set():
            return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, urlsplit(self.path)._replace(scheme="", netloc="").geturl(), headers, body)
        hub.log.append(request)
        fault = hub.take(request) or Fault(re.compile(""), 0)
        if fault.first is not None:
            fault.first()
        if fault.silent:
            hub._closing.wait(600)
            return self._hang_up()
        if fault.status:
            error = {"X-Error-Code": fault.code, "X-Error-Message": fault.message}
            reply = Reply(fault.status, **{name: value for name, value in error.items() if value})
        else:
            reply = hub.answer(request)
        request.status = reply.status
        if fault.after is not None:
            fault.after()
        if fault.lost:
            return self._hang_up()
        self._send(request, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def _send(self, request: Request, reply: Reply, fault: Fault) -> None:
        status, body, headers = reply.status, reply.body, dict(reply.headers)
        if body and fault.flip:
            body = body[: len(body) - 5] + bytes([body[-5] ^ 1]) + body[len(body) - 4 :]
        if fault.short is not None:
            body = body[: fault.short]
        if fault.compress:
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        if wanted and status == 200 and fault.ranges:
            start = int(wanted[1])
            if start >= len(body):
                status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
            else:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + (fault.length or 0)))
        self.end_headers()
        request.status = status
        if request.method == "HEAD":
            return
        for stop in (fault.cut, fault.reset, fault.stall):
            if stop is not None:
                self.wfile.write(body[:stop])
                self.wfile.flush()
        if fault.stall is not None:
            self.server.hub._closing.wait(600)
        if fault.reset is not None:
            time.sleep(0.05)  # what was sent shall arrive before the reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault.cut is not None or fault.reset is not None or fault.stall is not None:
            return self._hang_up()
        if fault.pause or fault.trickle:
            step = 1 if fault.trickle else -(-len(body) // 10)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                time.sleep(fault.pause or fault.trickle)
        else:
            self.wfile.write(body)
        if fault.length:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4] == b"\0\0\0\0":
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
