"""A Hub in one process: the calls that the real huggingface_hub client makes to create, upload, list and download."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory. `fail`: a part of a path; requests to it get `status` instead of an answer, and with 0
    the connection is cut."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail, self.status = "", 500
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, revision="main"):
        return self.repos[repo][self.branches[repo].get(revision, revision)]

    def commit(self, repo, branch, lines):
        files = dict(self.files(repo, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        digest = hashlib.sha1("".join(f"{n}{hashlib.sha256(c).hexdigest()}" for n, c in sorted(files.items())).encode())
        self.repos[repo][digest.hexdigest()] = files
        self.branches[repo][branch] = digest.hexdigest()
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, data=b"", headers=None):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if hub.fail and hub.fail in path and not hub.status:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if hub.fail and hub.fail in path:
            return self.answer(hub.status, {"error": "said no"}, {"X-Error-Message": "said no"})
        if self.headers.get("Authorization") != "Bearer hf_test" and self.command == "POST":
            return self.answer(401, {"error": "no token"}, {"X-Error-Message": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            new = repo not in hub.repos
            if new:
                hub.repos[repo], hub.branches[repo] = {"0" * 40: {}}, {"main": "0" * 40}
                hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.answer(200 if new else 409, {"url": f"{hub.address}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/branch/(\w+)", path):
            branches = hub.branches[found[1]]
            if self.command == "DELETE":
                del branches[found[2]]
            elif found[2] in branches:
                return self.answer(409, {"error": "exists"}, {"X-Error-Message": "exists"})
            else:
                branches[found[2]] = json.loads(body).get("startingPoint") or branches["main"]
            return self.answer(200, {})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/refs", path):
            rows = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in hub.branches[found[1]].items()
            ]
            return self.answer(200, {"branches": rows, "tags": [], "converts": []})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commits/main", path):
            about = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            return self.answer(200, [{"id": commit, **about} for commit in reversed(hub.repos[found[1]])])
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/(\w+)", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if found := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/large/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.large[found[1]] = body
            return self.answer(200)
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/(\w+)", path):
            if found[2] not in hub.branches[found[1]]:
                return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            commit = hub.commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
            url = f"{hub.address}/{found[1]}/commit/{commit}"
            return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+?)(?:/(revision|tree)/(\w+))?", path):
            repo, kind, revision = found[1], found[2], found[3] or "main"
            if repo not in hub.repos or hub.branches[repo].get(revision, revision) not in hub.repos[repo]:
                return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            files = hub.files(repo, revision)
            if kind == "tree":
                rows = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
                return self.answer(200, rows)
            names = [{"rfilename": name} for name in files]
            return self.answer(
                200,
                {
                    "id": repo,
                    "sha": hub.branches[repo].get(revision, revision),
                    "siblings": names,
                    "private": hub.private[repo],
                },
            )
        if found := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            repo, revision, name = found.groups()
            commit = hub.branches.get(repo, {}).get(revision, revision)
            files = hub.repos.get(repo, {}).get(commit, {})
            if name not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            headers = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}
            return self.answer(200, files[name], headers)
        return self.answer(404, {"error": f"unknown call {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any


def _etag(content):
    return hashlib.sha256(content).hexdigest()
