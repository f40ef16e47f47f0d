"""A Hub on the loopback interface for tests: what huggingface_hub asks of the real one, with faults.

    with LoopbackHub(lfs=True) as hub:
        hub.plant("PUT /lfs/", status=500, times=1)   # the next upload of a large file fails once
        ...                                            # a client with HF_ENDPOINT=hub.url
        hub.repos["me/model"].files("main")            # path -> content, at a branch, tag or commit

It knows no xet: its clients set HF_HUB_DISABLE_XET=1.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopbackloopbackloop"  # the one that it accepts


@dataclass(frozen=True)
class Blob:
    """A file: its content, and whether it is stored as a large file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    message: str
    parent: str | None
    blobs: dict[str, Blob]


@dataclass
class Repo:
    """Commits, and the branches and tags that name them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, blobs: dict[str, Blob]) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{len(self.commits)} {parent} {message}".encode()).hexdigest()
        self.commits[oid] = Commit(message, parent, blobs)
        self.branches[branch] = oid
        return oid

    def add(self, files: dict[str, bytes]) -> str:
        """A commit of these files alone on main."""
        return self.commit("main", "by hand", {name: Blob(content, False) for name, content in files.items()})

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return oid

    def files(self, revision: str) -> dict[str, bytes]:
        """Path -> content, without the .gitattributes that the Hub adds."""
        blobs = self.commits[self.resolve(revision)].blobs
        return {path: blob.content for path, blob in blobs.items() if path != ".gitattributes"}

    def messages(self, branch: str = "main") -> list[str]:
        """Of the commits of a branch, oldest first."""
        found, oid = [], self.branches.get(branch)
        while oid is not None:
            found.append(self.commits[oid].message)
            oid = self.commits[oid].parent
        return found[::-1]


@dataclass
class Fault:
    """A fault of the next `times` requests whose `METHOD /path` matches `pattern` from its start."""

    pattern: str
    status: int | None  # None: the connection is cut
    times: int
    headers: dict[str, str]
    is_done_first: bool  # the request is carried out, and only its answer is lost


class Refusal(Exception):
    """An answer with an error's status."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None, body: Any = None):
        self.status, self.body = status, body if body is not None else {"error": message or code or "refused"}
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


class LoopbackHub:
    """The server, in a thread; its state may be read and changed by the test between requests.

    `lfs` says whether weights are stored as large files, or inside of commits.
    """

    def __init__(self, lfs: bool = False):
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.requests: list[str] = []  # "METHOD /path" of each
        self.faults: list[Fault] = []
        self.returns_other_bytes = False  # downloads have the right length and other content
        self.before: dict[str, Callable[[], Any]] = {}  # pattern -> called once, before such a request
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def plant(
        self,
        pattern: str,
        status: int | None = None,
        times: int = 1,
        is_done_first: bool = False,
        **headers: str,
    ) -> None:
        """A fault to come; a header's underscores stand for dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, times, named, is_done_first))

    def count(self, pattern: str) -> int:
        """How many requests came whose `METHOD /path` begins like `pattern`."""
        return sum(re.match(pattern, request) is not None for request in self.requests)

    def fault_of(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.match(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def repo(self, repo_id: str, is_authorised: bool) -> Repo:
        if repo_id not in self.repos or (self.repos[repo_id].private and not is_authorised):
            raise Refusal(404 if is_authorised else 401, "RepoNotFound")
        return self.repos[repo_id]


def connect(hub: LoopbackHub, monkeypatch: Any, home: Path | None = None) -> None:
    """Lead huggingface_hub to `hub`, in this process (it reads its constants at import) and in new ones.

    What is downloaded is kept in `home`, if one is given.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the first address
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if home is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        for name, value in (("HF_HOME", str(home)), ("HF_ENDPOINT", hub.url), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class Request:
    """What an answer is made from."""

    query: dict[str, list[str]]
    body: bytes
    is_authorised: bool

    def json(self) -> Any:
        return json.loads(self.body)


# answers: (hub, request, *groups of the route)


def create(hub: LoopbackHub, request: Request) -> Any:
    asked = request.json()
    repo_id = f"{asked['organization']}/{asked['name']}"
    answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        raise Refusal(409, body={"error": "You already created this model repo", **answer})
    hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
    attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
    hub.repos[repo_id].commit("main", "initial commit", {".gitattributes": attributes})
    return answer


def validate_yaml(hub: LoopbackHub, request: Request) -> Any:
    front = re.match(r"---\n(.*?)\n---\n", request.json()["content"], flags=re.S)
    try:
        content = yaml.safe_load(front[1]) if front else {}
        if not isinstance(content, dict):
            raise yaml.YAMLError("it is no mapping")
    except yaml.YAMLError as error:
        raise Refusal(400, body={"errors": [{"message": str(error)}], "warnings": []}) from error
    return {"errors": [], "warnings": []}


def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Any:
    repo = hub.repo(repo_id, request.is_authorised)
    blobs = repo.commits[repo.resolve(revision)].blobs
    asked = request.json()
    ignored = [line for line in asked.get("gitIgnore", "").splitlines() if line]
    if not ignored and ".gitignore" in blobs:
        ignored = blobs[".gitignore"].content.decode().splitlines()
    answers = []
    for file in asked["files"]:
        path = file["path"]
        is_lfs = hub.lfs and path.endswith((".safetensors", ".bin", ".png"))
        blob = blobs.get(path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, rule) for rule in ignored),
                "oid": None if blob is None else blob.sha256 if blob.is_lfs else blob.git_id,
            }
        )
    return {"files": answers}


def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Any:
    hub.repo(repo_id, request.is_authorised)
    objects = []
    for asked in request.json()["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.objects:
            answer["actions"] = {
                "upload": {"href": f"{hub.url}/lfs/{asked['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify"},
            }
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


def lfs_upload(hub: LoopbackHub, request: Request, oid: str) -> Any:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, message="this is not the content of that hash")
    hub.objects[oid] = request.body
    return {}


def lfs_verify(hub: LoopbackHub, request: Request) -> Any:
    asked = request.json()
    if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, message="not uploaded")
    return {}


def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Any:
    repo = hub.repo(repo_id, request.is_authorised)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repo.branches.get(revision)
    if head is None:
        raise Refusal(404, "RevisionNotFound")
    if header.get("parentCommit") not in (None, head):
        raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
    blobs = dict(repo.commits[head].blobs)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            blobs[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                raise Refusal(400, message=f"the large file {value['path']} was not uploaded")
            blobs[value["path"]] = Blob(hub.objects[value["oid"]], True)
        elif line["key"] == "deletedFile":
            del blobs[value["path"]]
    oid = repo.commit(revision, header["summary"], blobs)
    return {"commitUrl": f"{hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}


def create_branch(hub: LoopbackHub, request: Request, repo_id: str, name: str) -> Any:
    repo = hub.repo(repo_id, request.is_authorised)
    if name in repo.branches:
        raise Refusal(409, message=f"Reference already exists: {name}")
    repo.branches[name] = repo.resolve((request.json() or {}).get("startingPoint", "main"))
    return {}


def create_tag(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Any:
    repo, name = hub.repo(repo_id, request.is_authorised), request.json()["tag"]
    if name in repo.tags:
        raise Refusal(409, message=f"Tag reference exists already: {name}")
    repo.tags[name] = repo.resolve(revision)
    return {}


def refs(hub: LoopbackHub, request: Request, repo_id: str) -> Any:
    repo = hub.repo(repo_id, request.is_authorised)

    def listed(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in named.items()]

    return {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}


def model_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str = "main") -> Any:
    repo = hub.repo(repo_id, request.is_authorised)
    oid = repo.resolve(revision)
    siblings = [{"rfilename": path} for path in repo.commits[oid].blobs]
    return {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": siblings}


def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, below: str = "") -> Any:
    repo = hub.repo(repo_id, request.is_authorised)
    entries, folders = [], set()
    for path, blob in repo.commits[repo.resolve(revision)].blobs.items():
        if below and not path.startswith(f"{below}/"):
            continue
        rest = path.removeprefix(f"{below}/") if below else path
        if "/" in rest and request.query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
            folders.add(f"{below}/{rest.split('/')[0]}".lstrip("/"))
            continue
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_id}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 100}
        entries.append(entry)
    return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]


# method, path -> answer; those of the first kind demand the token
_REPO = r"([\w.-]+/[\w.-]+)"
WRITES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", r"/lfs/verify", lfs_verify),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", commit),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", create_branch),
    ("POST", rf"/api/models/{_REPO}/tag/([^/]+)", create_tag),
]
READS: list[tuple[str, str, Callable[..., Any]]] = [
    ("PUT", r"/lfs/(\w+)", lfs_upload),  # its address is signed on the real one
    ("GET", rf"/api/models/{_REPO}", model_info),
    ("GET", rf"/api/models/{_REPO}/revision/([^/]+)", model_info),
    ("GET", rf"/api/models/{_REPO}/refs", refs),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", tree),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)/(.+)", tree),
]
_RESOLVE = re.compile(rf"/{_REPO}/resolve/([^/]+)/(.+)")


def _handler_of(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_any(self) -> None:
            path = urlsplit(self.path).path
            with hub.lock:
                hub.requests.append(f"{self.command} {path}")
                for pattern in [p for p in hub.before if re.match(p, hub.requests[-1])]:
                    hub.before.pop(pattern)()
                fault = hub.fault_of(hub.requests[-1])
            length = int(self.headers.get("Content-Length") or 0)
            if fault is not None and fault.status is None and not fault.is_done_first:
                self.rfile.read(length // 2)
                self._cut()
                return
            body = self._body(length)
            if fault is not None and not fault.is_done_first:
                self._answer(fault.status, {"error": "planted"}, fault.headers)
                return
            try:
                with hub.lock:
                    status, answer, headers = self._carry_out(unquote(path), body)
            except Refusal as refusal:
                status, answer, headers = refusal.status, refusal.body, refusal.headers
            if fault is not None:
                self._cut()
                return
            self._answer(status, answer, headers)

        do_GET = do_HEAD = do_POST = do_PUT = do_any

        def _body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(length)
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _carry_out(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
            given = self.headers.get("Authorization", "")
            is_authorised = given == f"Bearer {TOKEN}"
            if given and not is_authorised:
                raise Refusal(401, message="Invalid credentials in Authorization header")
            request = Request(parse_qs(urlsplit(self.path).query), body, is_authorised)
            for routes, needs_token in ((WRITES, True), (READS, False)):
                for method, pattern, answer in routes:
                    found = re.fullmatch(pattern, path) if method == self.command else None
                    if found is not None:
                        if needs_token and not is_authorised:
                            raise Refusal(401, message="Invalid username or password.")
                        return 200, answer(hub, request, *found.groups()), {}
            found = _RESOLVE.fullmatch(path)
            if found is None or self.command not in ("GET", "HEAD"):
                raise Refusal(404, message=f"no such route: {self.command} {path}")
            return self._resolve(request, *found.groups())

        def _resolve(
            self, request: Request, repo_id: str, revision: str, path: str
        ) -> tuple[int, Any, dict[str, str]]:
            repo = hub.repo(repo_id, request.is_authorised)
            oid = repo.resolve(revision)
            blob = repo.commits[oid].blobs.get(path)
            if blob is None:
                raise Refusal(404, "EntryNotFound")
            headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 if blob.is_lfs else blob.git_id}"'}
            if blob.is_lfs:
                headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            content = blob.content
            if hub.returns_other_bytes:
                content = content[:-1] + bytes([content[-1] ^ 1])
            return 200, content, headers

        def _answer(self, status: int | None, answer: Any, headers: dict[str, str]) -> None:
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
            self.send_response(status or 500)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _cut(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
