"""A bucket of Google Cloud Storage on loopback, as far as gcsfs, TensorStore and Orbax use it."""

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

BUCKET = "mofi-test"


class Objects:
    """Names with contents and generations; a request sees one state of all of them."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.requests: list[str] = []
        self.read_only = False
        self.generations = itertools.count(1)
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> dict[str, str]:
        self.held[name] = next(self.generations), content
        return self.described(name)

    def described(self, name: str) -> dict[str, str]:
        generation, content = self.held[name]
        return {
            **{"kind": "storage#object", "bucket": BUCKET, "name": name, "metageneration": "1"},
            **{"generation": str(generation), "size": str(len(content))},
            **{"updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z"},
        }

    def listed(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.held):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.described(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = (
        -1
    )  # an answer is sent whole: its second packet would wait for a receipt of the first

    def handle(self) -> None:
        # gcsfs hangs up once it has learnt from another request what it wanted to know.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        objects = self.server.objects
        with objects.lock:
            objects.requests.append(f"{self.command} {self.path}")
            self.dispatch(objects, url.path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def dispatch(self, objects: Objects, path: str, query: dict[str, str], body: bytes) -> None:
        if objects.read_only and self.command != "GET":
            return self.answer(403, {"error": {"code": 403, "message": path}})
        if path.startswith("/upload/"):
            return self.upload(objects, query, body)
        matched = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if matched is None or matched[1] != BUCKET:
            code = 403 if "/b/forbidden/" in path else 404
            return self.answer(code, {"error": {"code": code, "message": path}})
        if path.endswith("/o"):
            return self.answer(200, objects.listed(query))
        if matched[2] is None:
            return self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        name, verb, target = map(
            urllib.parse.unquote,
            re.fullmatch(rf"(.+?)(?:/(rewriteTo/b/{BUCKET}|moveTo)/o/(.+))?", matched[2]).groups(
                ""
            ),
        )
        generation, content = objects.held.get(name, (0, b""))
        if not generation:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        if verb == "moveTo":
            del objects.held[name]
            return self.answer(200, objects.put(target, content))
        if verb:
            return self.answer(200, {"done": True, "resource": objects.put(target, content)})
        if self.refused(query, generation):
            return None
        if self.command == "DELETE":
            del objects.held[name]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, objects.described(name))
        headers = {"x_goog_generation": str(generation)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, content, **headers)
        first_byte = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
        part = content[first_byte : int(asked[2]) + 1 if asked[1] and asked[2] else None]
        if not part:
            return self.answer(416, Content_Range=f"bytes */{len(content)}", **headers)
        last = first_byte + len(part) - 1
        headers["Content_Range"] = f"bytes {first_byte}-{last}/{len(content)}"
        return self.answer(206, part, **headers)

    def refused(self, query: dict[str, str], generation: int) -> bool:
        """Answers a request whose condition on the object's generation does not hold."""
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        elif query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        else:
            return False
        return True

    def upload(self, objects: Objects, query: dict[str, str], body: bytes) -> None:
        """In one request, of one part or two, or in several: a place to send to, then pieces."""
        name = query.get("name")
        if query["uploadType"] == "resumable" and "upload_id" not in query:
            upload = str(next(objects.generations))
            objects.uploads[upload] = name or json.loads(body)["name"], b""
            place = f"http://{self.headers['Host']}{self.path}&upload_id={upload}"
            return self.answer(200, Location=place)
        if query["uploadType"] == "resumable":
            name, before = objects.uploads[query["upload_id"]]
            body = before + body
            objects.uploads[query["upload_id"]] = name, body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(body) - 1}")
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, media, _ = re.split(rb"\r?\n?--" + re.escape(boundary), body)
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", media, maxsplit=1)[1]
        if self.refused(query, objects.held.get(name, (0,))[0]):
            return None
        return self.answer(200, objects.put(name, body))


@contextlib.contextmanager
def served() -> Iterator[tuple[Objects, dict[str, str]]]:
    """The objects of an empty bucket, and the environment in which libraries find it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects = Objects()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        # Without the last, gcsfs asks another service, by gRPC, for the kind of the bucket.
        yield (
            server.objects,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
