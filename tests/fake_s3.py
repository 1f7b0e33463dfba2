"""A bucket of S3 on loopback: as much of its XML API as s3fs asks for. It checks no signatures; see `fake_gcs`."""

import hashlib
import re
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from fake_gcs import Handler, Server


class Bucket:
    """What the server holds, and what it was asked: `requests` are "METHOD path"."""

    def __init__(self, *names: str):
        self.names = set(names)
        self.objects: dict[tuple[str, str], tuple[bytes, datetime]] = {}
        self.requests: list[str] = []
        self.refused = ""  # a pattern: what matches of "METHOD path" is answered with 403
        self.conditions = "told"  # of "If-None-Match: *"; "kept": without saying which it was; "ignored"
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self.url = ""

    def clear(self) -> None:
        """Holds nothing any more, and refuses nothing."""
        with self.lock:
            self.objects.clear()
            self.requests.clear()
            self.refused, self.conditions = "", "told"

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Holds an object from now on, in the place of any before it."""
        self.objects[bucket, name] = content, datetime.now(UTC)

    def set_back(self, name: str, seconds: float) -> None:
        """Makes an object of "bucket" so many seconds older."""
        content, when = self.objects["bucket", name]
        self.objects["bucket", name] = content, when - timedelta(seconds=seconds)

    def names_below(self, url: str) -> list[str]:
        """The objects below an s3:// address, by their names there."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/") + "/"
        return sorted(n.removeprefix(prefix) for b, n in self.objects if b == bucket and n.startswith(prefix))

    def read(self, url: str) -> bytes:
        """The content of the object at an s3:// address."""
        bucket, _, name = url.removeprefix("s3://").partition("/")
        return self.objects[bucket, name][0]


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class _S3(Handler):
    held: Bucket

    def error(self, status: int, code: str, more: str = "") -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message>{more}</Error>".encode())

    def there_already(self, key: tuple[str, str]) -> bool:
        """Whether a write is on condition that nothing is there, and something is."""
        asked = self.headers.get("If-None-Match") == "*" and self.held.conditions != "ignored"
        return asked and key in self.held.objects

    def refuse(self) -> None:
        told = "<Condition>If-None-Match</Condition>" if self.held.conditions == "told" else ""
        self.error(412, "PreconditionFailed", told)

    def serve(self) -> None:
        parts, body, held = urlsplit(self.path), self.body(), self.held
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        held.requests.append(f"{self.command} {unquote(parts.path)}")
        if held.refused and re.search(held.refused, held.requests[-1]):
            return self.error(403, "AccessDenied")
        if bucket not in held.names:
            return self.error(404, "NoSuchBucket")
        with held.lock:
            if name:
                return self._object(bucket, name, query, body)
            if self.command == "POST" and "delete" in query:
                for key in re.findall("<Key>(.*?)</Key>", body.decode()):
                    held.objects.pop((bucket, unescape(key)), None)
                return self.answer(200, b"<DeleteResult></DeleteResult>")
            if self.command == "GET" and "location" in query:
                return self.answer(200, b"<LocationConstraint></LocationConstraint>")
            if self.command == "GET":
                return self._list(bucket, query)
            return self.answer(200)

    def _list(self, bucket: str, query: dict) -> None:
        prefix, delimiter, rows, folders = query.get("prefix", ""), query.get("delimiter", ""), [], set()
        for (of, name), (content, when) in sorted(self.held.objects.items()):
            if of != bucket or not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                rows.append(
                    f"<Contents><Key>{escape(name)}</Key><LastModified>{when:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                    f"<ETag>{escape(_etag(content))}</ETag><Size>{len(content)}</Size></Contents>"
                )
        rows += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        rows = rows[: int(query.get("max-keys", 1000))]
        text = f"<Name>{bucket}</Name><KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>{''.join(rows)}"
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def _object(self, bucket: str, name: str, query: dict, body: bytes) -> None:
        held, key = self.held, (bucket, name)
        if self.command == "POST" and "uploads" in query:
            number = str(len(held.parts) + 1)
            held.parts[number] = {}
            text = f"<UploadId>{number}</UploadId><Bucket>{bucket}</Bucket><Key>{escape(name)}</Key>"
            return self.answer(200, f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>".encode())
        if self.command == "PUT" and "partNumber" in query:
            held.parts[query["uploadId"]][int(query["partNumber"])] = body
            return self.answer(200, ETag=_etag(body))
        if self.command in ("POST", "PUT") and self.there_already(key):
            return self.refuse()
        if self.command == "POST" and "uploadId" in query:
            held.put(*key, b"".join(part for _, part in sorted(held.parts.pop(query["uploadId"]).items())))
            text = f"<ETag>{escape(_etag(held.objects[key][0]))}</ETag>"
            return self.answer(200, f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>".encode())
        if self.command == "PUT" and "x-amz-copy-source" in self.headers:
            return self.error(501, "NotImplemented")
        if self.command == "PUT":
            held.put(*key, body)
            return self.answer(200, ETag=_etag(body))
        if key not in held.objects:
            return self.error(404, "NoSuchKey")
        if self.command == "DELETE":
            del held.objects[key]
            return self.answer(204)
        content, when = held.objects[key]
        told = {"ETag": _etag(content), "Last_Modified": format_datetime(when, usegmt=True)}
        self.content(content, **told)


def serving(*names: str) -> Server:
    """A server with empty buckets of these names."""
    return Server(_S3, Bucket(*names))


def environment(url: str) -> dict[str, str]:
    """What sends s3fs to the server."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }  # fmt: skip
