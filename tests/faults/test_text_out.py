"""What leaves the program: hostile names and texts are shown as text, and keys of servers are nowhere."""

import json
import logging
import re
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from rich.text import Text

import embedsmith
from embedsmith.cli import main
from embedsmith.core.errors import EmbedsmithError, RecipeError
from embedsmith.core.keys import key_from
from embedsmith.core.markdown import block, code, in_line
from embedsmith.core.progress import progress_bar
from embedsmith.core.recipe import parse, save_recipe
from embedsmith.core.settings import to_plain
from embedsmith.core.text_out import printable, remember_secret, without_secrets
from embedsmith.curate import CurateRecipe, Endpoint, Input, SyntheticQueries, Tools, curate
from embedsmith.index.server import ServerStore
from embedsmith.merge import merge
from embedsmith.models import load
from embedsmith.report import folder_page
from embedsmith.report.model_card import TrainingFacts, push
from tests.evaluate.examples import NamedEncoder

ORDER = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202edrow\u2066\r[/x][red]:smile:<script>alert(1)</script>"
NAME = "a\x1b[31m\u202eb[/x] [red]|`"
"""As a file may be called."""
COMMANDS = set("\x1b\x07\x9b\r\u202e\u2066")


def lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path):
    """Files with hostile names and texts."""
    texts = [{"query": f"{ORDER} {n}", "pos": [f"yes {ORDER}"], "neg": [ORDER]} for n in range(6)]
    lines(tmp_path / f"{NAME}.jsonl", texts)
    lines(tmp_path / "labels.jsonl", [{"text": ORDER, "label": f"{ORDER}{n % 2}"} for n in range(6)])
    graded = [{"text1": f"{ORDER} {n}", "text2": f"{n} {ORDER}", "score": n % 5} for n in range(12)]
    lines(tmp_path / "tasks" / "sts" / f"{NAME}.jsonl", graded)
    lines(tmp_path / "docs.jsonl", [{"_id": ORDER, "text": f"the cat {ORDER}"}, {"_id": "2", "text": "a dog"}])
    return tmp_path


def harmless(shown: str) -> bool:
    return not COMMANDS & set(shown)


def test_hostile_texts_are_shown_and_sent_as_no_command(place, typed, folders, monkeypatch):
    pairs, model = place / f"{NAME}.jsonl", folders / "base"
    found = {}
    for name, arguments in {
        "inspect": ("inspect", pairs),
        "labels": ("inspect", place / "labels.jsonl", "task=classification"),
        "json": ("inspect", pairs, "--json"),
        "missing": ("inspect", f"{pairs}.gone"),
        "curate": ("curate", pairs, place / f"{NAME}-clean.jsonl", "-s", "length query_min=1"),
        "tokenize": ("tokenize", pairs, "-m", model, "-o", place / NAME),
        "verb": ("list", ORDER),
        "index": ("index", model, place / "docs.jsonl", "--to", place / f"{NAME}-index"),
        "search": ("search", f"the cat {ORDER}", "-i", place / f"{NAME}-index"),
        "geometry": ("geometry", model, "-t", place / "tasks" / "sts" / f"{NAME}.jsonl", "--texts", "10"),
    }.items():
        out, err, code_ = typed(*arguments)
        assert (name in ("missing", "verb")) == bool(code_), (name, err)
        assert harmless(out + err), (name, out, err)
        found[name] = out
    assert json.loads(found["json"])["samples"][0]["negatives"] == [ORDER], "the same JSON"
    assert "\\u001b[31m" in found["inspect"]
    assert "[/x][red]:smile:" in "".join(found["search"].split()), "no markup, no emoji"


def test_scores_of_a_task_with_markup_in_its_name_are_written_and_shown(place, typed, monkeypatch):
    named = lambda name, _: NamedEncoder(int(name.rsplit("-", 1)[1]))
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", named)
    monkeypatch.setattr("embedsmith.models.load", lambda name, **_: named(name, {}))
    task, scores, page = place / "tasks" / "sts" / f"{NAME}.jsonl", place / "s.json", place / "p.html"
    out, err, code_ = typed("evaluate", "m[/x]/m-8", task, "--json", scores, "--items")
    assert (code_, err) == (0, "")
    assert harmless(out)
    assert json.loads(scores.read_text())["tasks"][0]["task"]
    out, err, code_ = typed("compare", "m[/x]/m-8", "m[/x]/m-9", "-t", task, "--report", page)
    assert (code_, err) == (0, "")
    assert harmless(out)
    assert "<script>alert" not in page.read_text(encoding="utf-8")

    def broken(self):
        raise RuntimeError("the table cannot be shown")

    scores.unlink()
    monkeypatch.setattr("embedsmith.evaluate.result.Results.table", broken)
    monkeypatch.setattr("sys.argv", ["embedsmith", "evaluate", "m/m-8", str(task), "--json", str(scores)])
    with pytest.raises(RuntimeError):
        main()
    assert scores.is_file(), "results are written before they are shown"


def test_progress_and_log_lines_are_no_commands(typed, capsys, monkeypatch):
    with progress_bar("\x1b[/x]", 2, visible=True) as bar:
        bar.note("[/y]\u202e")
        bar.advance(2)
    shown = capsys.readouterr().err
    assert harmless(shown)
    assert "\\u001b[/x]" in shown
    monkeypatch.setattr("embedsmith.cli.app", lambda: logging.getLogger("embedsmith").warning("%s", ORDER) or exit(0))
    _, err, _ = typed()
    assert harmless(err)


def test_texts_of_any_kind_are_printable():
    assert printable("a\tb\nü 中 👍🏽 \u200d") == "a\tb\nü 中 👍🏽 \u200d"
    assert printable(Path("a\udc80")) == "a\\udc80"
    assert json.loads(printable(json.dumps({"a": ORDER}, ensure_ascii=False))) == {"a": ORDER}
    assert Text(printable(ORDER)).plain == printable(ORDER)


def test_a_failure_of_the_program_shows_neither_commands_nor_keys(monkeypatch, capsys):
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("embedsmith.cli.app", lambda: 1 / 0 if key_from("A_KEY") else None)
    with pytest.raises(ZeroDivisionError):
        main()
    sys.excepthook(RuntimeError, RuntimeError(f"{ORDER} {KEY}"), None)
    shown = capsys.readouterr().err
    assert "RuntimeError" in shown
    assert harmless(shown)
    assert KEY not in shown


def test_a_page_shows_names_and_texts_as_text(tmp_path):
    script = "<script>alert(1)</script>"
    lines(tmp_path / "metrics.jsonl", [{"step": 1, f"loss/{script}": 2.0, f"score/{script}/64": 1.0, script: 1.0}])
    sources = {script: {"task": script, "rows": 1, "seen": {"rows": script}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": sources}))
    (tmp_path / "finished.json").write_text(json.dumps({"steps": script, "best_step": script}))
    (tmp_path / "environment.json").write_text(json.dumps({script: script}))
    (tmp_path / "recipe.yaml").write_text(f"# {script}\n")
    merged = {"method": script, "notes": [script], "models": [{"id": script, "distance": script, "weight": script}]}
    (tmp_path / "merge.json").write_text(json.dumps(merged | {"coefficients": {script: [1.0]}, script: script}))
    assert script not in folder_page(tmp_path)


def test_nothing_is_printed_past_the_one_place():
    allowed = {"core/terminal.py": "Console", "cli/__init__.py": "secho"}
    root = Path(embedsmith.__file__).parent
    for path in root.rglob("*.py"):
        printing = set(re.findall(r"\b(echo|secho|Console|from_markup)\((?!Console\))", path.read_text("utf-8")))
        assert printing <= {allowed.get(path.relative_to(root).as_posix())}, path


# Cards.


@pytest.mark.parametrize("name", ["x | y", "`", "a\n---\nb", "<!-- embedsmith: end -->", "<script>", "[a](b:c)"])
def test_names_are_no_markup_in_a_card(tmp_path, name):
    assert "\n" not in in_line(name) + code(name)
    facts = TrainingFacts(
        {name: {"task": name, "rows": 1}}, recipe=yaml.safe_dump({"note": f"{name} ```"}), versions={name: "1"}
    )
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n\n# Model\n", encoding="utf-8")
    for _ in range(2):
        facts.write_into(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("## Training data") == text.count("## Recipe") == 1
    assert text.splitlines()[:3] == ["---", "tags: []", "---"]
    assert text.splitlines().count("---") == 2
    (table_row,) = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("| 1 |")]
    assert table_row.replace("\\|", "").count("|") == 4
    assert "<script>" not in text.partition("```")[0]
    assert block("a\n```\nb", "yaml").startswith("````yaml")


def test_neither_cards_nor_what_is_pushed_name_folders_of_this_machine(folders, tmp_path, monkeypatch):
    parents = [{"path": str(folders / f"parent-{n}"), "id": f"p|{n}"} for n in range(2)]
    out = tmp_path / "merged"
    tree = {
        "parents": parents,
        "base": str(folders / "base"),
        "method": {"type": "slerp"},
        "output": str(out),
        "unrelated": True,
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(tree))
    merge(tmp_path / "merge.yaml")
    card = (out / "README.md").read_text()
    assert str(folders) not in card
    assert str(out) not in card
    assert "path: parent-0" in card
    assert "| p\\|0 | `parent-0` |" in card
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"_name_or_path": str(folders / "base")}))
    (out / "README.md").write_text(f"{card}\nMade from {folders}/base, see https://a.example/b/c\n")
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("private")
    pushed = {}

    def upload(self, folder_path, **_):
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                pushed[file.relative_to(folder_path).as_posix()] = file.read_bytes()

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: "address")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    push(out, "me/model")
    here = [
        name for name, content in pushed.items() if str(folders).encode() in content or str(out).encode() in content
    ]
    assert here == []
    assert {"config.json", "README.md", "model.safetensors", "merge.json"} <= set(pushed)
    assert not {"recipe.yaml", ".cache/x"} & set(pushed)
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert b"Made from base, see https://a.example/b/c" in pushed["README.md"]
    assert load(str(out)).dimension == 16, "the folder itself is as it was"


# Secrets.

KEY = "sk-0123456789abcdef"


@pytest.fixture
def echo(monkeypatch):
    """A server that says 401 and repeats all that it was sent; its address without the scheme."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")

    class Echo(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            said = json.dumps({"error": f"wrong key {'.' * 130}{self.headers} {body}"}).encode()
            self.send_response(401, f"no {self.headers.get('Authorization') or self.headers.get('api-key')}")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def everything(folder: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", [KEY, f"{KEY}\n", f"{KEY}\nx", f"{KEY}é"])
def test_a_key_is_in_no_message_file_or_traceback(tmp_path, typed, echo, monkeypatch, key):
    monkeypatch.setenv("ECHO_KEY", key)
    rows = lines(tmp_path / "in.jsonl", [{"_id": str(n), "text": f"passage {n}"} for n in range(3)])
    model = {"type": "endpoint", "base_url": f"http://{echo}/v1", "model": "m", "key_env": "ECHO_KEY", "retries": 0}
    model["extra"] = {"api_key": f"{KEY}-extra", "nested": {"Authorization": f"{KEY}-nested"}, "seed": 1}
    step = {"type": "synthetic_queries", "generator": model}
    recipe = {"input": {"path": str(rows)}, "output": str(tmp_path / "out" / "o.jsonl"), "steps": [step]}
    path = tmp_path / "curate.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out, err, code_ = typed("curate", path)
    assert code_ == 1
    assert ("401" in err) == (key.strip() == KEY), err
    assert KEY[:8] not in out + err + everything(tmp_path / "out")


def test_secrets_of_extra_are_in_no_report_and_no_copy(tmp_path):
    class Says(Endpoint):
        def answers(self, prompts, accept, spent):
            raise EmbedsmithError(f"refused {self.extra}")

    generator = Says("http://localhost/v1", "m", extra={"api_key": f"{KEY}-extra", "seed": 1})
    recipe = CurateRecipe(
        Input(path=str(tmp_path / "in.jsonl")), str(tmp_path / "o.jsonl"), (SyntheticQueries(generator),)
    )
    save_recipe(recipe, tmp_path / "copy.yaml")
    lines(tmp_path / "in.jsonl", [{"_id": "0", "text": "a passage"}])
    with pytest.raises(EmbedsmithError, match=r"refused .*\*\*\*") as caught:
        curate(recipe, Tools())
    assert "seed: 1" in (tmp_path / "copy.yaml").read_text()
    assert KEY not in everything(tmp_path) + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("base_url", f"http://user:{KEY}@localhost/v1"),
        ("base_url", f"https://localhost/v1?api_key={KEY}"),
        ("key_env", KEY),
        ("max_tokens", "many"),
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(tmp_path, setting, value):
    model = {"type": "endpoint", "base_url": "http://localhost", "model": "m", "extra": {"token": f"{KEY}2"}}
    step = {"type": "synthetic_queries", "generator": model | {setting: value}}
    tree = {"input": {"path": "a"}, "output": "b", "steps": [step]}
    with pytest.raises(RecipeError, match=setting) as caught:
        parse(CurateRecipe, tree)
    assert KEY[:12] not in "".join(traceback.format_exception(caught.value))


def test_a_key_of_an_index_server_is_in_no_message(echo, typed, monkeypatch, folders, tmp_path):
    pytest.importorskip("qdrant_client")
    with pytest.raises(EmbedsmithError, match="401") as caught:
        ServerStore(f"http://{echo}", "c", api_key=KEY).settings()
    assert KEY[:8] not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("INDEX_KEY", KEY)
    for url, variable in ((f"http://{echo}", "INDEX_KEY"), (f"http://u:{KEY}@{echo}", "INDEX_KEY"), (echo, KEY)):
        out, err, code_ = typed("search", "a", "--url", url, "--api-key-env", variable)
        assert code_ == 1, (out, err)
        assert KEY[:8] not in out + err


def test_addresses_lose_their_secrets_in_messages():
    text = f"https://u:{KEY}@host/a?x=1&X-Amz-Signature={KEY}&token={KEY} s3://bucket/a@b"
    assert without_secrets(text) == "https://***@host/a?x=1&X-Amz-Signature=***&token=*** s3://bucket/a@b"
    assert KEY not in str(EmbedsmithError("no", where=f"https://u:{KEY}@host/data.jsonl"))


def test_data_and_models_keep_what_only_looks_like_a_secret(monkeypatch):
    monkeypatch.setattr("embedsmith.core.text_out._secrets", set())
    remember_secret("<|endoftext|>")
    settings = Endpoint("http://localhost", "m", system="see http://a@b/?key=1 <|endoftext|>")
    assert to_plain(settings, exact=True)["system"] == settings.system
    assert to_plain(settings)["system"] == "see http://***@b/?key=*** ***"
