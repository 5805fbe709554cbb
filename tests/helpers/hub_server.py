"""A stand-in of the Hub on localhost: the requests of huggingface_hub to read models and data, and to upload models."""

import base64
import contextlib
import hashlib
import json
import re
import urllib.parse

from tests.helpers import web

TOKEN = "hf_token_of_the_tests"
_LARGE = (".safetensors", ".bin", ".tar", ".parquet")


class Hub:
    """Repositories in memory, and what was asked.

    Attributes:
      repositories: {"org/name": {"refs": {branch: commit}, "commits": {commit: {file: bytes}}, "gated": bool}}.
      requests: "METHOD path" of each request, in order.
    """

    def __init__(self, url):
        # Large files are served by another host: the client follows redirections to its own.
        self.url, self.elsewhere = url, url.replace("127.0.0.1", "localhost")
        self.repositories, self.requests, self.objects = {}, [], {}

    def add(self, name, files, *, branch="main", gated=False):
        """Commit the files of a folder or of a dict, in place of what the branch has."""
        if not isinstance(files, dict):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        made = self.repositories.setdefault(name, {"refs": {}, "commits": {}, "gated": gated})
        commit = hashlib.sha1(repr((name, sorted(files.items()), len(made["commits"]))).encode()).hexdigest()
        made["commits"][commit] = files
        made["refs"][branch] = commit
        return commit

    def of_datasets(self, monkeypatch):
        """The package `datasets` looks for data here."""
        template = f"{self.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
        for name, value in {"HF_ENDPOINT": self.url, "HUB_DATASETS_URL": template, "HF_HUB_OFFLINE": False,
                            "USE_PARQUET_EXPORT": False}.items():  # fmt: skip
            monkeypatch.setattr(f"datasets.config.{name}", value)

    def fetched(self):
        """Names of the files whose content was sent, sorted."""
        gets = [request.split()[1] for request in self.requests if request.startswith("GET ")]
        sent = [path.partition("/cdn/")[2].partition("/")[2] or path.partition("/resolve/")[2].partition("/")[2]
                for path in gets if "/resolve/" in path or path.startswith("/cdn/")]  # fmt: skip
        return sorted(sent)


@contextlib.contextmanager
def serve():
    """Context of a `Hub` that answers at its `url`."""
    with web.served(_Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        yield server.hub


def _entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class _Refusal(Exception):
    def __init__(self, status, code=""):
        self.status, self.code = status, code


class _Handler(web.Handler):
    def _dispatch(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        hub, path = self.server.hub, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in _ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    answer(self, hub, body, *match.groups())
                    return
            raise _Refusal(404)
        except _Refusal as refusal:
            self._answer(b"{}", status=refusal.status, **({"X-Error-Code": refusal.code} if refusal.code else {}))

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _chunk(self):
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, data, *, status=200, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            first, last = map(int, match.groups())
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit_of(self, hub, name, revision):
        made = hub.repositories.get(name)
        if made is None:
            raise _Refusal(404 if self._known() else 401, "RepoNotFound")
        commit = made["refs"].get(revision, revision)
        if commit not in made["commits"]:
            raise _Refusal(404, "RevisionNotFound")
        return commit, made["commits"][commit]

    def info(self, hub, body, name, revision=None):
        commit, files = self._commit_of(hub, name, revision or "main")
        self._answer({"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, hub, body, name, revision, folder=""):
        _, files = self._commit_of(hub, name, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refusal(404, "EntryNotFound")
        if "recursive=false" in self.path:
            below = {path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)}
            inside = {path: data for path, data in inside.items() if "/" not in path.removeprefix(prefix)}
        else:
            below = {}
        folders = [{"type": "directory", "path": f"{prefix}{path}", "oid": "0" * 40} for path in sorted(below)]
        self._answer([*folders, *(_entry(path, data) for path, data in inside.items())])

    def paths_info(self, hub, body, name, revision):
        _, files = self._commit_of(hub, name, revision)
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = (urllib.parse.parse_qs(body.decode()) if form else json.loads(body))["paths"]
        folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
        self._answer([*({"type": "directory", "path": path, "oid": "0" * 40} for path in folders),
                      *(_entry(path, files[path]) for path in paths if path in files)])  # fmt: skip

    def resolve(self, hub, body, name, revision, path):
        commit, files = self._commit_of(hub, name, revision)
        if hub.repositories[name]["gated"]:
            raise _Refusal(403 if self._known() else 401, "GatedRepo")
        if path not in files:
            raise _Refusal(404, "EntryNotFound")
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not path.endswith(_LARGE):
            self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **headers)
            return
        oid = hashlib.sha256(data).hexdigest()
        hub.objects[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self._answer(b"", status=302, Location=f"{hub.elsewhere}/cdn/{oid}/{path}", **headers)

    def content(self, hub, body, oid):
        self._answer(hub.objects[oid], ETag=f'"{oid}"')

    def whoami(self, hub, body):
        if not self._known():
            raise _Refusal(401)
        self._answer({"type": "user", "name": "me", "orgs": [{"name": "lab"}]})

    def create(self, hub, body):
        if not self._known():
            raise _Refusal(401)
        content = json.loads(body)
        name = f"{content.get('organization') or 'me'}/{content['name']}"
        exists = name in hub.repositories
        if not exists:
            hub.add(name, {".gitattributes": b""})
            hub.repositories[name]["visibility"] = content.get("visibility", "public")
        self._answer({"url": f"{hub.url}/{name}"}, status=409 if exists else 200)

    def validate(self, hub, body):
        card = json.loads(body)["content"]
        errors = [] if "\nlicense: " in card.partition("\n---\n")[0] else [{"message": "no licence"}]
        self._answer({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, hub, body, name, revision):
        files = [{"path": file["path"], "shouldIgnore": False,
                  "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular"}
                 for file in json.loads(body)["files"]]  # fmt: skip
        self._answer({"files": files})

    def batch(self, hub, body, name):
        objects = [
            {"oid": item["oid"], "size": item["size"], "actions": {
                "upload": {"href": f"{hub.url}/store/{item['oid']}", "header": {}}}}
            for item in json.loads(body)["objects"]
        ]  # fmt: skip
        self._answer({"transfer": "basic", "objects": objects})

    def store(self, hub, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        hub.objects[oid] = body
        self._answer(b"")

    def commit(self, hub, body, name, revision):
        if not self._known():
            raise _Refusal(403)
        files = dict(self._commit_of(hub, name, revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hub.add(name, files, branch=revision)
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"})


_NAME = r"([\w.-]+/[\w.-]+)"
_KIND = "(?:models|datasets)"
_ROUTES = (
    ("GET", rf"/api/{_KIND}/{_NAME}", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_NAME}/tree/([^/]+)/?(.*)", _Handler.tree),
    ("POST", rf"/api/{_KIND}/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET HEAD", rf"/(?:datasets/)?{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET HEAD", r"/cdn/(\w+)/.+", _Handler.content),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/store/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
)
