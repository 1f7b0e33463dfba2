"""A bucket of Google Cloud Storage on loopback: as much of its JSON API as gcsfs, tensorstore and orbax ask for.

As in the real one an object appears whole, when its upload has ended; nothing can be appended to, and here nothing can
be renamed or copied either. It is for tests alone: it checks no credentials.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit


class Bucket:
    """What the server holds, and what it was asked: `requests` are "METHOD path"."""

    def __init__(self, *names: str):
        self.names = set(names)
        self.objects: dict[tuple[str, str], dict] = {}
        self.requests: list[str] = []
        self.refused: str = ""  # a pattern: what matches of "METHOD path" is answered with 403
        self.generation = 0
        self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.lock = threading.RLock()
        self.url = ""

    def clear(self) -> None:
        """Holds nothing any more, and refuses nothing."""
        with self.lock:
            self.objects.clear()
            self.requests.clear()
            self.refused = ""

    def put(self, bucket: str, name: str, content: bytes) -> dict:
        """Holds an object from now on, in the place of any before it."""
        with self.lock:
            self.generation += 1
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            meta = {
                "kind": "storage#object", "id": f"{bucket}/{name}/{self.generation}", "name": name, "bucket": bucket,
                "generation": str(self.generation), "metageneration": "1", "size": str(len(content)),
                "updated": now, "timeCreated": now, "etag": str(self.generation), "storageClass": "STANDARD",
                "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
                "contentType": "application/octet-stream",
            }  # fmt: skip
            self.objects[bucket, name] = {"meta": meta, "content": bytes(content)}
            return meta

    def set_back(self, name: str, seconds: float) -> None:
        """Makes an object of "bucket" so many seconds older."""
        meta = self.objects["bucket", name]["meta"]
        then = datetime.fromisoformat(meta["updated"]) - timedelta(seconds=seconds)
        meta["updated"] = then.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def names_below(self, url: str) -> list[str]:
        """The objects below a gs:// address, by their names there."""
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        prefix = prefix.rstrip("/") + "/"
        return sorted(n.removeprefix(prefix) for b, n in self.objects if b == bucket and n.startswith(prefix))

    def read(self, url: str) -> bytes:
        """The content of the object at a gs:// address."""
        bucket, _, name = url.removeprefix("gs://").partition("/")
        return self.objects[bucket, name]["content"]


class Handler(BaseHTTPRequestHandler):
    """Answers whole; `serve` says with what."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        headers.setdefault("Content-Type", "application/json; charset=UTF-8")
        with contextlib.suppress(ConnectionError):  # gcsfs asks two things at once, and hears the first answer only
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def content(self, content: bytes, **told: str) -> None:
        """Answers with a content, or with the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, content, **told)
        first, last = asked[1], asked[2]
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        if start >= max(1, len(content)):
            return self.error(416, "requested range not satisfiable")
        told["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], **told)

    def _serve(self) -> None:
        self.serve()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _serve


class Server(contextlib.AbstractContextManager):
    """Serves on loopback, in threads, what a Handler says of `held`; enters with it, and `held.url` is its address."""

    def __init__(self, handler: type, held):
        self.held = held
        self.server = _Quiet(("127.0.0.1", 0), type("Bound", (handler,), {"held": held}))

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.held.url = f"http://127.0.0.1:{self.server.server_port}"
        return self.held

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Says nothing of connections that a client has dropped."""


class _GCS(Handler):
    held: Bucket

    def error(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"code": status, "message": message, "errors": [{"reason": message}]}})

    def serve(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        body, held = self.body(), self.held
        held.requests.append(f"{self.command} {unquote(parts.path)}")
        if held.refused and re.search(held.refused, held.requests[-1]):
            return self.error(403, "the caller does not have permission")
        found = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", parts.path)
        if not found:
            return self.error(501, f"not of this fake: {self.path}")
        bucket, name = unquote(found[2]), unquote(found[3] or "")
        if bucket not in held.names:
            return self.error(404, "The specified bucket does not exist.")
        with held.lock:
            if found[1] == "upload":
                return self._upload(bucket, query, body)
            if "/o" not in parts.path.removeprefix(f"/storage/v1/b/{found[2]}") and not name:
                return self.answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
            if not name:
                return self._list(bucket, query)
            return self._object(bucket, name, query)

    def _list(self, bucket: str, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        low, high = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for (of, name), entry in sorted(self.held.objects.items()):
            if of != bucket or not name.startswith(prefix) or name < low or (high and name >= high):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(entry["meta"])
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _object(self, bucket: str, name: str, query: dict) -> None:
        entry = self.held.objects.get((bucket, name))
        if entry is None:
            return self.error(404, f"No such object: {bucket}/{name}")
        meta, content = entry["meta"], entry["content"]
        if query.get("ifGenerationMatch", meta["generation"]) != meta["generation"]:
            return self.error(412, "conditionNotMet")
        if query.get("ifGenerationNotMatch") == meta["generation"]:
            return self.answer(304)
        if self.command == "DELETE":
            del self.held.objects[bucket, name]
            return self.answer(204)
        if self.command not in ("GET", "HEAD"):
            return self.error(501, f"not of this fake: {self.command} {self.path}")
        if query.get("alt") != "media":
            return self.answer(200, meta)
        told = {
            "Content_Type": meta["contentType"], "ETag": meta["etag"], "x_goog_generation": meta["generation"],
            "x_goog_metageneration": "1", "x_goog_stored_content_length": meta["size"],
            "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }  # fmt: skip
        self.content(content, **told)

    def _upload(self, bucket: str, query: dict, body: bytes) -> None:
        held, kind = self.held, query.get("uploadType")
        if "upload_id" in query:
            return self._more(query["upload_id"], body)
        if kind == "resumable":
            told = json.loads(body or b"{}")
            number = str(len(held.uploads) + 1)
            held.uploads[number] = (bucket, query.get("name") or told["name"], query, bytearray())
            where = f"{held.url}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={number}"
            return self.answer(200, {}, Location=where)
        name, content = query.get("name", ""), body
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
            first, second = re.split(rb"\r?\n?--" + re.escape(boundary) + rb"(?:--)?(?:\r?\n|$)", body)[1:3]
            split = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
            name, content = json.loads(split(first))["name"], split(second)
        self._keep(bucket, name, query, content)

    def _more(self, number: str, body: bytes) -> None:
        bucket, name, query, sofar = self.held.uploads[number]
        sofar += body
        whole = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */*"))[1]
        if whole == "*" and self.headers.get("Content-Range"):
            return self.answer(308, Range=f"bytes=0-{len(sofar) - 1}")
        del self.held.uploads[number]
        self._keep(bucket, name, query, bytes(sofar))

    def _keep(self, bucket: str, name: str, query: dict, content: bytes) -> None:
        there = self.held.objects.get((bucket, name))
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (there["meta"]["generation"] if there else "0"):
            return self.error(412, "conditionNotMet")
        self.answer(200, self.held.put(bucket, name, content))


def serving(*names: str) -> Server:
    """A server with empty buckets of these names."""
    return Server(_GCS, Bucket(*names))


def environment(url: str) -> dict[str, str]:
    """What sends gcsfs, google-cloud-storage and tensorstore to the server, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GCS_TOKEN": "anon", "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "none",
    }  # fmt: skip
