"""A stand-in for the Hugging Face hub: a server on this machine that answers what huggingface_hub asks for.

It keeps repositories in memory, takes commits as the hub does (small files within the commit, large ones by Git LFS
before it), and hands files out again. One token may write, under one name.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, OWNER = "hf_" + "a" * 34, "me"


class Hub(ThreadingHTTPServer):
    """files: of each repository, by path. private, messages: what it was made and written with."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private, self.messages, self.large = {}, [], {}
        self.broken = None  # a part of the paths that fail

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str):
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_POST(self):
        hub, path = self.server, self.path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.broken and hub.broken in path:
            return self._error(500, "", "the hub is down")
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not name.startswith(f"{OWNER}/"):
                return self._error(403, "", f"You don't have the rights to create a model under {name}")
            if name in hub.files:
                return self._answer(409, {"error": "You already created this model repo",
                                          "url": f"{hub.address}/{name}"})
            hub.files[name], hub.private[name] = {}, asked.get("private", asked.get("visibility") == "private")
            return self._answer(200, {"url": f"{hub.address}/{name}", "name": name, "id": name})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [{"oid": one["oid"], "size": one["size"], "authenticated": True, "actions": {
                "upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}} for one in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects},
                                Content_Type="application/vnd.git-lfs+json")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [{"path": one["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                     for one in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(hub.files[found[1]], [json.loads(line) for line in body.splitlines() if line])
            at = f"{hub.address}/{found[1]}/commit/{sha(hub.files[found[1]])}"
            return self._answer(200, {"success": True, "commitUrl": at, "commitOid": at[-40:]})
        self._error(404, "EntryNotFound", path)

    def _commit(self, files: dict[str, bytes], lines: list[dict]):
        for line in lines:
            match line["key"], line["value"]:
                case "header", value:
                    self.server.messages.append(value["summary"])
                case "file", value:
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile", value:
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile", value:
                    del files[value["path"]]

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self._answer(200)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if hub.broken and hub.broken in path:
            return self._error(400, "", "the hub is confused")  # not 500, after which it would try for half a minute
        if (found := re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)) and found[1] not in hub.files:
            return self._error(404, "RepoNotFound", "Repository not found")
        name, files = found[1], hub.files[found[1]]
        if re.fullmatch(r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?", path):
            return self._answer(200, {"id": name, "sha": sha(files), "private": hub.private[name],
                                      "siblings": [{"rfilename": file} for file in files]})
        if re.match(r"/api/models/[^/]+/[^/]+/tree/", path):
            return self._answer(200, [{"type": "file", "path": file, "size": len(data), "oid": digest(data)}
                                      for file, data in files.items()])
        found = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if not found or found[1] not in files:
            return self._error(404, "EntryNotFound", path)
        data = files[found[1]]
        self._answer(200, data, ETag=f'"{digest(data)}"', X_Repo_Commit=sha(files))

    do_HEAD = do_GET


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sha(files: dict[str, bytes]) -> str:
    return digest(json.dumps(sorted((name, digest(data)) for name, data in files.items())).encode())


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
