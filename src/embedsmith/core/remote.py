"""Object storage: `s3://`, `gs://`, `hf://datasets/`, `memory://` and `file://` in the place of a path, by fsspec.

What is read is first copied to this machine, into the user's cache folder, whole or not at all, and again only when it
has changed. What is written is made on this machine, and then sent; of a folder `a` the manifest beside it,
`.a.embedsmith.json`, says which files it consists of. It says `sending` before the first file goes and `complete` after
the last has arrived, so a reader never takes half of something for the whole, and the same command sends the rest.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError, MissingExtraError
from embedsmith.core.files import TEMPORARY, atomic_file, disk_errors, sync_file

_URL = re.compile(r"(?P<scheme>s3|s3a|gs|gcs|memory|file):/{1,2}(?P<rest>.*)|(?P<hub>hf://?datasets/[^/]+/[^/]+/.+)")
_BACKENDS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Packages that fsspec needs, and the extras that bring them."""
_KEYS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "hf": "HF_TOKEN",
}
SENDING, COMPLETE, STOPPED = "sending", "complete", "stopped"
_WORK = ".work"
_VERSION = ("size", "ETag", "etag", "md5Hash", "mtime", "created", "blob_id")
"""What backends tell of a file that is another one when the file is."""
_MAGIC = re.compile(r"[*?\[]")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something that is not a file of this machine. `hf://owner/dataset` does not: that is the id
    of a dataset, which its own library reads. A `Path` has lost one slash of it, which does not matter."""
    return (found := _URL.fullmatch(str(path))) is not None and found["scheme"] != "file"


def plain_path(path: str) -> str:
    """A `file://` URL as the path that it is; anything else as it is."""
    found = _URL.fullmatch(path)
    return path if found is None or found["scheme"] != "file" else "/" + found["rest"].lstrip("/")


def url_of(path: str | os.PathLike[str]) -> str:
    """The URL with both of its slashes and none at its end."""
    scheme, _, rest = str(path).partition(":")
    return f"{scheme}://{rest.strip('/')}"


@dataclass(frozen=True)
class Sent:
    """A manifest. `state`: `sending`, `complete`, or `stopped` for what a stopped command left, for the same one to go
    on. `files`: sizes and SHA-256 by their paths beside the manifest."""

    state: str
    verb: str
    files: dict[str, tuple[int, str]]


class Bucket:
    """A file system behind URLs. Every error of it becomes one of ours, of the class `error`."""

    def __init__(self, url: str, error: type[EmbedsmithError]) -> None:
        self.url, self.error, self.scheme = url, error, url.partition(":")[0]
        import fsspec

        try:
            with self.told():
                self.files, found = fsspec.core.url_to_fs(url)
        except ImportError as missing:
            raise MissingExtraError(*_BACKENDS.get(self.scheme, (self.scheme, "all"))) from missing
        self.path: str = str(found).rstrip("/")

    @contextmanager
    def told(self, where: str | None = None) -> Iterator[None]:
        """Errors: `error` naming the URL, in place of whatever a backend raises."""
        try:
            yield
        except (EmbedsmithError, ImportError):
            raise
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            keys = _KEYS.get(self.scheme.replace("s3a", "s3").replace("gcs", "gs"))
            fix = "check the name" + (f", and that this machine may go there: {keys}" if keys else "")
            if isinstance(error, FileNotFoundError):
                said = "nothing is there"
            elif isinstance(error, PermissionError):
                said = f"no permission ({said})"
            raise self.error(said[:300], where=where or self.url, fix=fix) from error

    @property
    def base(self) -> str:
        """The folder that holds what is named: of a pattern, the one before its first sign."""
        magic = _MAGIC.search(self.path)
        return self.path[: magic.start()].rpartition("/")[0] if magic else str(PurePosixPath(self.path).parent)

    def has(self, path: str) -> bool:
        with self.told(path):
            self.files.invalidate_cache()
            return bool(self.files.exists(path))

    def listed(self) -> dict[str, Any]:
        """Facts of every file that is named. Errors: `error` where there is none."""
        with self.told():
            self.files.invalidate_cache()
            if _MAGIC.search(self.path):
                found: dict[str, Any] = self.files.glob(self.path, detail=True)
            elif self.files.isfile(self.path):
                found = {self.path: self.files.info(self.path)}
            else:
                found = self.files.find(self.path, detail=True)
            found = {name: facts for name, facts in found.items() if facts.get("type") != "directory"}
            if not found:
                raise FileNotFoundError(self.url)
            return found

    def copy(self, name: str, facts: dict[str, Any], local: Path) -> None:
        """A file to this machine."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with self.told(name):
            self.files.get_file(name, str(local))
        if local.stat().st_size != facts["size"]:
            raise self.error("it changed while it was read", where=name, fix="give the same command again")
        sync_file(local)

    def manifest(self, path: str) -> Sent | None:
        """Of the output at a path, or of the one that it is part of; the hub has none."""
        place = PurePosixPath(path)
        for one in (place, *place.parents) if self.scheme != "hf" else ():
            if not _within(str(one)):  # beside a bucket is another bucket
                break
            name = manifest_of(str(one))
            with self.told(name):
                if self.files.exists(name):
                    told = json.loads(self.files.cat_file(name))
                    return Sent(told["state"], told["verb"], {k: tuple(v) for k, v in told["files"].items()})
        return None

    def write_manifest(self, sent: Sent) -> None:
        with self.told():
            self.files.makedirs(str(PurePosixPath(self.path).parent), exist_ok=True)
            self.files.pipe_file(manifest_of(self.path), _text(sent).encode())


def _within(path: str) -> bool:
    """Whether a path lies in a bucket, and is not one."""
    return len(PurePosixPath(path.lstrip("/")).parts) > 1


def manifest_of(path: str) -> str:
    """Where the manifest of an output lies: beside it."""
    place = PurePosixPath(path)
    return str(place.with_name(f".{place.name}.embedsmith.json"))


def cache_home() -> Path:
    """`embedsmith` in the user's cache folder, as the XDG convention has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedsmith"


def fetched(given: str | os.PathLike[str], error: type[EmbedsmithError] = DataError) -> Path:
    """A copy of a remote file, folder or pattern on this machine; the one that is here already unless it has changed.

    Errors: `error` for what is not there, may not be read, was not sent whole or does not arrive as it was sent;
    `MissingExtraError` with the install line of a backend; `CheckpointError` where the disk is full.
    """
    url = url_of(given)
    bucket = Bucket(url, error)
    found = bucket.listed()
    sent = bucket.manifest(bucket.path)
    if sent is not None and sent.state != COMPLETE:
        what = "it was not sent whole" if sent.state == SENDING else "the command that makes it has not ended"
        raise error(
            what, where=url, fix=f"wait for it, or give the command again that sends it (embedsmith {sent.verb})"
        )
    root = cache_home() / "remote" / _hash(url)
    folder = root / _hash([[name, [facts.get(key) for key in _VERSION]] for name, facts in sorted(found.items())])
    base = bucket.base
    if not folder.is_dir():
        with disk_errors(folder):
            root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=root, suffix=TEMPORARY))
            try:
                for name, facts in found.items():
                    local = temporary / name[len(base) :].lstrip("/")
                    bucket.copy(name, facts, local)
                    _refuse_other(sent, name, local, error)
                with contextlib.suppress(OSError):  # another process was first
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        for old in root.iterdir():
            if old != folder and not old.name.endswith(TEMPORARY):
                shutil.rmtree(old, ignore_errors=True)
    return folder / bucket.path[len(base) :].lstrip("/")


def _refuse_other(sent: Sent | None, name: str, local: Path, error: type[EmbedsmithError]) -> None:
    """Errors: `error` for a file that this program sent and that is another one now."""
    for known, facts in ({} if sent is None else sent.files).items():
        if f"/{name}".endswith(f"/{known}") and _facts(local) != facts:
            raise error("it is not as it was sent", where=name, fix="give the command again that made it")


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=12).hexdigest()


def _facts(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Delivery:
    """An output that is made on this machine, below `folder`, and sent to `url`."""

    url: str
    verb: str

    @property
    def folder(self) -> Path:
        return cache_home() / "outputs" / _hash(self.url)

    @property
    def path(self) -> Path:
        return self.folder / PurePosixPath(self.url).name

    @property
    def _note(self) -> Path:
        """The manifest that was here last: while the bucket still has it, what is here is at least as new."""
        return self.folder / ".sent.json"

    def bring(self) -> None:
        """Bring here what was sent before, by this machine or another, unless nothing was sent since.

        Errors: `CheckpointError` for a place with files that this program did not send, or that cannot be reached.
        """
        bucket = Bucket(self.url, CheckpointError)
        if bucket.scheme == "hf" or not _within(bucket.path):
            what = "nothing is written here" if bucket.scheme == "hf" else "this is a whole bucket"
            raise CheckpointError(what, where=self.url, fix="name a folder in a bucket, such as s3://bucket/runs/a")
        sent = bucket.manifest(bucket.path)
        if sent is None:
            if bucket.has(bucket.path):
                what = "something is there that this program did not send"
                raise CheckpointError(what, where=self.url, fix="choose another output")
            return
        if sent.state == SENDING or (self._note.exists() and self._note.read_text() == _text(sent)):
            return
        for known in self.files().values():
            known.unlink()
        for name, facts in sent.files.items():
            remote = str(PurePosixPath(bucket.path).parent / name)
            local = self.folder / name
            bucket.copy(remote, {"size": facts[0]}, local)
            _refuse_other(sent, remote, local, CheckpointError)
        self._keep(sent)

    def send(self, state: str) -> None:
        """Send what is here and not there, the manifest last. Errors: `CheckpointError`."""
        bucket = Bucket(self.url, CheckpointError)
        files = self.files()
        facts = {name: _facts(path) for name, path in files.items()}
        before = bucket.manifest(bucket.path)
        if before is not None and (before.state, before.files) == (state, facts):
            return
        there = {} if before is None or before.state == SENDING else before.files
        parent = PurePosixPath(bucket.path).parent
        bucket.write_manifest(Sent(SENDING, self.verb, facts))
        for name, path in files.items():
            if there.get(name) != facts[name]:
                with bucket.told(name):
                    bucket.files.makedirs(str((parent / name).parent), exist_ok=True)
                    bucket.files.put_file(str(path), str(parent / name))
        for name in there.keys() - facts.keys():
            with bucket.told(name):
                bucket.files.rm_file(str(parent / name))
        sent = Sent(state, self.verb, facts)
        bucket.write_manifest(sent)
        self._keep(sent)

    def files(self) -> dict[str, Path]:
        """The files of the output and of what lies beside it, such as a report, by their paths. Work is not sent."""
        found = {path.relative_to(self.folder): path for path in sorted(self.folder.rglob("*")) if path.is_file()}
        return {
            name.as_posix(): path
            for name, path in found.items()
            if not any(part.startswith(".") or part.endswith(_WORK) for part in name.parts)
        }

    def _keep(self, sent: Sent) -> None:
        with atomic_file(self._note) as file:
            file.write(_text(sent))


def _text(sent: Sent) -> str:
    return json.dumps(asdict(sent), indent=1)
