"""Malformed and hostile requests from a seed: bodies that are nearly right, values that no endpoint takes, bytes that
are no JSON."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

VALID: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {
        "input": ["the fox", "a dog"],
        "model": "tiny",
        "encoding_format": "float",
        "dimensions": 8,
        "input_type": "query",
        "user": "ada",
    },
    "/v1/sparse": {"input": "the fox", "model": "tiny", "input_type": "document"},
    "/v1/multivector": {"input": [5, 6, 7], "input_type": "query"},
    "/rerank": {"query": "fox", "documents": ["a fox", {"text": "a dog"}], "top_n": 1, "return_documents": True},
    "/v1/rerank": {"query": "fox", "texts": ["a fox", "a dog"], "raw_scores": True, "return_text": True},
    "/search": {
        "query": "fox",
        "k": 3,
        "weights": {"dense": 1.0, "sparse": 0.3},
        "rrf": False,
        "candidates": 10,
        "filter": {"lang": "en", "n": {"gte": 1}},
        "explain": True,
        "rerank": True,
    },
    "/documents": {"documents": [{"id": "a", "text": "the fox", "fields": {"lang": "en", "n": 1}}], "model": "tiny"},
    "/documents/delete": {"ids": ["a", "b"]},
    "/admin/reload": {"models": ["none such"]},
}
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "\0",
        "\x1b[31m",
        "\ud800",
        "\udfff x",
        "a" * 100_000,
        "😀" * 1000,
        "null",
        "NaN",
        "8",
        "../../etc/passwd",
    ),
    *("<script>alert(1)</script>", "{{7*7}}", "'; drop table x; --", "%s%n", "\u202e", "__class__"),
    *([], [[]], [[[]]], [None], [""], ["a", None], ["a", 1], [1, "a"], [[1], "a"], [1.5], [True], [-1], [2**40]),
    *([[1], []], [[10**9]], ["a"] * 3000, [1] * 5000, [[1]] * 3000),
    *({}, {"text": "a"}, {"": 1}, {"a" * 1000: "b"}, {"dense": -1}, {"dense": 0}, {"dense": "1"}, {"other": 1}),
    *({"dense": float("nan")}, {"gte": "x"}, {"n": {"over": 1}}, {"n": {}}, {"n": []}, {"a.b[": 1}, {"a[]": "x"}),
    *({'"': 1}, {"metadata.x": 1}, {"n": {"gte": float("inf")}}, {"n": [1, "a"]}, {"n": 2**70}, {"n": 1.5}),
]
"""Values that are wrong at most places."""


@dataclass(frozen=True)
class Sent:
    """A request."""

    path: str
    body: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def requests(seed: int, count: int) -> Iterator[Sent]:
    """`count` requests, the same for the same seed."""
    chance = random.Random(seed)
    for _ in range(count):
        kind = chance.choice(_KINDS)
        yield kind(chance, chance.choice(list(VALID)))


def _value(chance: random.Random, path: str) -> Sent:
    """One value is another one."""
    tree = json.loads(json.dumps(VALID[path]))
    place = tree
    key: Any = chance.choice(list(tree))
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.5:
        place = place[key]
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
    place[key] = chance.choice(HOSTILE)
    return Sent(path, _written(tree))


def _keys(chance: random.Random, path: str) -> Sent:
    """Keys are missing, wrong, or twice."""
    tree = dict(VALID[path])
    what = chance.randrange(3)
    if what == 0:
        for key in chance.sample(list(tree), chance.randint(1, len(tree))):
            del tree[key]
    elif what == 1:
        tree[chance.choice(["inputs", "x" * 10_000, "", "\0", "\ud800", "__proto__", "constructor"])] = chance.choice(
            HOSTILE
        )
    else:
        text = json.dumps(tree)
        return Sent(path, (text[:-1] + f", {json.dumps(chance.choice(list(tree)))}: 1}}").encode())
    return Sent(path, _written(tree))


def _whole(chance: random.Random, path: str) -> Sent:
    """The body is another value, or nested beyond any sense."""
    deep = chance.choice(["[" * 100_000, '{"input":' * 50_000, '{"input":' + "[" * 5_000 + "]" * 5_000 + "}"])
    return Sent(path, chance.choice([_written(chance.choice(HOSTILE)), deep.encode()]))


def _bytes(chance: random.Random, path: str) -> Sent:
    """Bytes are cut, changed, or of another encoding."""
    text = json.dumps(VALID[path])
    raw = bytearray(text.encode())
    what = chance.randrange(5)
    if what == 0:
        return Sent(path, bytes(raw[: chance.randrange(len(raw))]))
    if what == 1:
        for _ in range(chance.randint(1, 5)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        return Sent(path, bytes(raw))
    if what == 2:
        return Sent(path, text.encode(chance.choice(["utf-16", "utf-32", "utf-8-sig", "cp037"])))
    if what == 3:
        return Sent(path, chance.randbytes(chance.randrange(2000)))
    return Sent(path, b'{"input": "\xff\xfe\xed\xa0\x80"}')


def _envelope(chance: random.Random, path: str) -> Sent:
    """The method, the path or a header is another one."""
    body = _written(VALID[path])
    what = chance.randrange(4)
    if what == 0:
        return Sent(path, body, chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]))
    if what == 1:
        ends = ["/", "//", "/..", "/%2e%2e/x", "?x=1", "%00", "x" * 3000, "/v1/models/", "/%ff"]
        return Sent(path + chance.choice(ends), body)
    if what == 2:
        kind = chance.choice(
            ["text/plain", "application/xml", "multipart/form-data", "application/json; charset=x", "", "a/b/c"]
        )
        return Sent(path, body, headers={"content-type": kind})
    headers = {
        "content-type": "application/json",
        "content-encoding": "gzip",
        "authorization": "Bearer \x7f",
        "x-api-key": "?",
    }
    return Sent(path, body, headers=headers)


_KINDS = (_value, _value, _value, _keys, _whole, _bytes, _envelope)


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def fault(status: int, body: bytes, sent: Sent) -> str | None:
    """What is wrong with an answer; `None` where nothing is."""
    if status >= 500:
        return f"status {status}"
    if b"Traceback" in body or b".py" in body:
        return "a traceback"
    if sent.method in ("HEAD", "OPTIONS") or status in (200, 307):
        return None
    error = json.loads(body)["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"] or len(body) > 10_000:
        return "not OpenAI's shape of an error"
    return None
