"""Object storage in the place of paths, on file systems of fsspec that need no network: what is read is whole and new,
what is sent is whole or said not to be, and what cannot be reached is one clear error."""

import json
import sys
from importlib import import_module

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import embedsmith as es
from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError, MissingExtraError
from embedsmith.core.inputs import local_path, read_text
from embedsmith.core.outputs import atomic_folder, claimed, delivered
from embedsmith.core.recipe import parse
from embedsmith.core.remote import Delivery, is_remote, url_of
from embedsmith.data import Source, read_source
from embedsmith.evaluate.result import Results
from embedsmith.models import Embedder, load
from embedsmith.models.encode_files import EncodeJob, encode_files
from embedsmith.train import Recipe, train


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of its own, and a bucket that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket():
    return fsspec.filesystem("memory")


@pytest.fixture
def closed(monkeypatch):
    """`s3://`, with a backend that lets nobody in."""

    class Closed(MemoryFileSystem):
        protocol = "s3"

        def exists(self, path, **options):
            raise PermissionError("Access Denied")

        isfile = find = glob = exists

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("s3://")

    fsspec.register_implementation("s3", Closed, clobber=True)
    yield
    import_module("fsspec.registry")._registry.pop("s3")  # the package hides the module behind a mapping of that name


def names(bucket, below="/bucket"):
    return sorted(name.removeprefix(f"{below}/") for name in bucket.find(below))


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/a.jsonl", True),
        ("gs://bucket/a", True),
        ("memory:/bucket/a", True),
        ("hf://datasets/owner/name/a.jsonl", True),
        ("hf://owner/name", False),
        ("file:///a/b", False),
        ("owner/name", False),
        ("c:/data", False),
    ],
)
def test_what_is_object_storage(path, remote):
    assert is_remote(path) == remote


def test_a_file_url_is_its_path(tmp_path):
    (tmp_path / "a.txt").write_text("here")
    assert read_text(f"file://{tmp_path}/a.txt") == "here"
    with delivered(f"file://{tmp_path}/out", "test") as place:
        assert place == f"{tmp_path}/out"


def test_a_file_is_copied_once_and_again_when_it_changed(bucket, monkeypatch):
    bucket.pipe("/bucket/a.jsonl", b"one")
    first = local_path("memory://bucket/a.jsonl")
    assert (first.name, first.read_text()) == ("a.jsonl", "one")
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", lambda *given, **options: pytest.fail("copied again"))
        assert local_path("memory:/bucket/a.jsonl") == first
    bucket.pipe("/bucket/a.jsonl", b"another")
    assert read_text("memory://bucket/a.jsonl") == "another"


def test_folders_and_patterns(bucket):
    for name in ("set/corpus.jsonl", "set/qrels/test.tsv", "part-1.jsonl", "part-2.jsonl", "other.jsonl"):
        bucket.pipe(f"/bucket/{name}", name.encode())
    folder = local_path("memory://bucket/set")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["corpus.jsonl", "qrels/test.tsv"]
    pattern = local_path("memory://bucket/part-*.jsonl")
    assert sorted(path.name for path in pattern.parent.glob(pattern.name)) == ["part-1.jsonl", "part-2.jsonl"]


def test_a_source_is_read_as_the_same_rows(bucket, files):
    bucket.put_file(str(files / "pairs.jsonl"), "/bucket/pairs.jsonl")
    here, there = (read_source(Source(path=p)) for p in (str(files / "pairs.jsonl"), "memory://bucket/pairs.jsonl"))
    assert (here.name, here.fingerprint, len(here.records)) == (there.name, there.fingerprint, len(there.records))


def test_what_is_not_there_and_what_may_not_be_read(closed):
    with pytest.raises(DataError, match=r"memory://bucket/gone\.jsonl: nothing is there"):
        local_path("memory://bucket/gone.jsonl")
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: no permission \(Access Denied\)\n.*AWS_PROFILE"):
        local_path("s3://bucket/a.jsonl")
    with pytest.raises(CheckpointError, match="no permission"), delivered("s3://bucket/out", "test"):
        pytest.fail("went on")
    with pytest.raises(CheckpointError, match="a whole bucket"), delivered("s3://bucket", "test"):
        pytest.fail("went on")


@pytest.mark.parametrize(("url", "package", "extra"), [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs", "gcs")])
def test_a_backend_that_is_missing_says_how_to_get_it(monkeypatch, url, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package}.*\n.*pip install "embedsmith\[{extra}\]"'):
        local_path(url)


def made(place, text="new"):
    with atomic_folder(place) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text(text)


def test_a_folder_is_sent_with_its_manifest_last(bucket, monkeypatch):
    order = []
    for name in ("put_file", "pipe_file"):
        real = getattr(MemoryFileSystem, name)

        def seen(self, first, second, *more, real=real, name=name, **options):
            order.append((second if name == "put_file" else first).rpartition("/")[2])
            return real(self, first, second, *more, **options)

        monkeypatch.setattr(MemoryFileSystem, name, seen)
    with delivered("memory://bucket/out", "test") as place:
        made(place)
    assert [name for name in order if name != "out"][-1] == ".out.embedsmith.json"
    assert order.index(".out.embedsmith.json") < order.index("a.txt")
    assert names(bucket) == [".out.embedsmith.json", "out/a.txt", "out/deep/b.txt"]
    assert local_path("memory://bucket/out/deep/b.txt").read_text() == "new"


def test_a_folder_that_is_half_sent_is_refused_until_the_same_command_sends_the_rest(bucket, monkeypatch):
    real = MemoryFileSystem.put_file

    def lost(self, local, remote, **options):
        if remote.endswith("b.txt"):
            raise OSError("connection lost")
        return real(self, local, remote, **options)

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="connection lost"):
        patched.setattr(MemoryFileSystem, "put_file", lost)
        with delivered("memory://bucket/out", "test") as place:
            made(place)
    assert names(bucket) == [".out.embedsmith.json", "out/a.txt"]
    for part in ("out", "out/a.txt"):
        with pytest.raises(DataError, match=r"not sent whole\n.*embedsmith test"):
            local_path(f"memory://bucket/{part}")
    with delivered("memory://bucket/out", "test") as place:
        assert (local_path(place) / "a.txt").read_text() == "new"  # made before, and still here
    assert (local_path("memory://bucket/out") / "deep" / "b.txt").read_text() == "new"


def test_a_stopped_command_goes_on_elsewhere(bucket, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt), delivered("memory://bucket/out", "test") as place:
        made(place)
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="has not ended"):
        local_path("memory://bucket/out")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with delivered("memory://bucket/out", "test") as place:
        assert (local_path(place) / "deep" / "b.txt").read_text() == "new"
        (local_path(place) / "a.txt").unlink()
    assert names(bucket) == [".out.embedsmith.json", "out/deep/b.txt"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with delivered("memory://bucket/out", "test") as place:
        assert not (local_path(place) / "a.txt").exists()


def test_what_is_not_ours_stays(bucket):
    bucket.pipe("/bucket/out/theirs.txt", b"theirs")
    with pytest.raises(CheckpointError, match="did not send"), delivered("memory://bucket/out", "test"):
        pytest.fail("went on")
    assert names(bucket) == ["out/theirs.txt"]


def test_what_arrives_is_what_was_sent(bucket):
    with delivered("memory://bucket/out", "test") as place:
        made(place)
    bucket.pipe("/bucket/out/a.txt", b"old")
    with pytest.raises(DataError, match="not as it was sent"):
        local_path("memory://bucket/out")


def test_one_writer_and_one_machine(monkeypatch):
    with delivered("memory://bucket/out", "test"), claimed(Delivery("memory://bucket/out", "").path, "test"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="several machines"), delivered("memory://bucket/out", "test"):
        pytest.fail("went on")
    with pytest.raises(CheckpointError, match="does not write to object storage"), claimed("s3:/bucket/out", "index"):
        pytest.fail("went on")
    assert url_of("s3:/bucket/out/") == "s3://bucket/out"


def test_training_and_encoding_from_and_to_a_bucket(bucket, files, tree, tmp_path):
    """The run, and the vectors of its model, are those of a run on this disk."""
    bucket.put(str(files) + "/", "/bucket/", recursive=True)
    bucket.pipe("/bucket/texts.txt", b"a cat\nthe red mat\n")
    tree["train"] |= {"steps": 2, "log_with": []}
    local = train(parse(Recipe, tree))
    tree["data"] = [
        {**source, "path": f"memory://bucket/{name}.jsonl"} for source, name in zip(tree["data"], ("pairs", "scored"))
    ]
    tree["output"] = "memory://bucket/run"
    sent = train(parse(Recipe, tree))
    assert json.loads(bucket.cat("/bucket/.run.embedsmith.json"))["state"] == "complete"
    assert train(parse(Recipe, tree)) == sent  # finished is finished
    weights = "model.safetensors"
    assert bucket.cat(f"/bucket/run/model/{weights}") == (local / weights).read_bytes()
    texts = local_path("memory://bucket/texts.txt")
    for model, out in (
        (str(local), str(tmp_path / "vectors")),
        ("memory://bucket/run/model", "memory://bucket/vectors"),
    ):
        assert encode_files(EncodeJob(model, (texts,), out)) == 2
    left, right = (
        np.load(local_path(out) / "vectors.npy") for out in (str(tmp_path / "vectors"), "memory://bucket/vectors")
    )
    np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="module")
def model(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("small") / "model"
    load(str(bert), pooling="mean").save(folder)
    return folder


def write(verb, model, files, out):
    """One verb with its output at `out`."""
    model, pairs = str(model), str(files / "pairs.jsonl")
    if verb == "index":
        return es.index(model, [{"id": "a", "text": "a cat"}, {"id": "b", "text": "the red mat"}], to=f"{out}/made")
    if verb == "evaluate":
        scores = es.evaluate(model, str(files / "scored.jsonl"), cache=f"{out}/made")
        return scores.save(f"{out}/scores.json")
    if verb == "export":
        return es.export(model, f"{out}/made.gguf", to="gguf")
    return es.distil(model, f"{out}/made", data=pairs, static=True, dims=4)


WRITTEN = ("index", "evaluate", "export", "distil")


@pytest.mark.parametrize("verb", WRITTEN)
def test_a_verb_writes_into_a_bucket_what_it_writes_on_this_disk(bucket, model, files, tmp_path, verb):
    write(verb, model, files, tmp_path / "here")
    write(verb, model, files, "memory://bucket")
    name = "made.gguf" if verb == "export" else "made"
    assert json.loads(bucket.cat(f"/bucket/.{name}.embedsmith.json"))["state"] == "complete"
    write(verb, model, files, "memory://bucket")  # finished is finished
    if verb == "index":
        places = (str(tmp_path / "here/made"), "memory://bucket/made")
        here, there = (es.search("the red cat", place, model=str(model)) for place in places)
        assert [hit.id for hit in there[0].hits] == [hit.id for hit in here[0].hits] == ["b", "a"]
    elif verb == "evaluate":
        here, there = (Results.load(f"{place}/scores.json") for place in (tmp_path / "here", "memory://bucket"))
        assert here.main_scores() == there.main_scores()
        assert any(name.startswith("made/results/") for name in names(bucket))
    elif verb == "export":
        assert bucket.cat("/bucket/made.gguf") == (tmp_path / "here/made.gguf").read_bytes()
    else:
        left, right = (
            es.load(place).encode("a cat") for place in (str(tmp_path / "here/made"), "memory://bucket/made")
        )
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("verb", WRITTEN)
def test_a_bucket_without_permission_is_refused_before_any_work(closed, model, files, verb, monkeypatch):
    monkeypatch.setattr(Embedder, "represent", lambda *given, **options: pytest.fail("worked"))
    with pytest.raises(CheckpointError, match=r"bucket/\.made.*no permission \(Access Denied\)\n.*AWS_PROFILE"):
        write(verb, model, files, "s3://bucket")


def test_a_model_and_data_in_a_bucket_without_permission_are_told(closed, model, files):
    for call in (
        lambda: es.evaluate(str(model), "s3://bucket/scored.jsonl"),
        lambda: es.evaluate("s3://bucket/model", str(files / "scored.jsonl")),
        lambda: es.index(str(model), "s3://bucket/documents.jsonl", to="index"),
        lambda: es.export("s3://bucket/model", "out.gguf", to="gguf"),
        lambda: es.search("a cat", "s3://bucket/index"),
        lambda: es.search("a cat", vectors="s3://bucket/vectors", model=str(model)),
    ):
        with pytest.raises(EmbedsmithError, match=r"s3://bucket/.*no permission \(Access Denied\)\n.*AWS_PROFILE"):
            call()
