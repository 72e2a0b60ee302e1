"""The files of deploy/: what they name exists, their commands are understood, and nothing in them runs as root, is
unpinned or holds a key. No container engine is needed; systemd and docker compose look at them where they are there."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
import typer
import yaml

from embedsmith.cli import app
from tests.docs.blocks import ROOT

DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def dockerfile(text):
    """(instruction, its text) in order, lines joined, without comments."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


INSTRUCTIONS = dockerfile((DEPLOY / "Dockerfile").read_text(encoding="utf-8"))


def given(command):
    """The options of a verb as the command line would understand them; an unknown one is an error."""
    group = typer.main.get_command(app)
    verb, *arguments = command
    with group.make_context("embedsmith", [verb, *arguments], resilient_parsing=True) as context:
        found = group.get_command(context, verb)
    with found.make_context(verb, list(map(str, arguments)), parent=context) as made:
        return made.params


def last(name):
    return [text for instruction, text in INSTRUCTIONS if instruction == name][-1]


def copied():
    rows = [text.split() for instruction, text in INSTRUCTIONS if instruction == "COPY" and "--from" not in text]
    return {source for row in rows for source in row[:-1]}


def test_the_image_is_built_of_what_is_there_and_is_let_in():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert copied() == {line[1:] for line in ignored if line.startswith("!")}
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    built_of = {
        PYPROJECT["project"]["readme"],
        *PYPROJECT["project"]["license-files"],
        *PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"],
        *(path.split("/")[0] for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]),
    }
    assert built_of <= copied()
    (extras,) = re.findall(r"\"\.\[([\w,]+)\]\"", " ".join(text for _, text in INSTRUCTIONS))
    assert set(extras.split(",")) <= PYPROJECT["project"]["optional-dependencies"].keys()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)


def test_the_image_is_pinned_runs_as_nobody_and_starts_the_server():
    bases = [text.split()[0] for instruction, text in INSTRUCTIONS if instruction == "FROM"]
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    after = INSTRUCTIONS[[name for name, _ in INSTRUCTIONS].index("USER") :]
    assert last("USER") not in ("0", "root")
    assert {"RUN", "ADD"}.isdisjoint(name for name, _ in after), "what needs root comes before USER"
    assert not [text for name, text in INSTRUCTIONS if name in ("ARG", "ENV") and re.search("KEY|TOKEN|PASS", text)]
    entry, command = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))
    assert entry == ["embedsmith"]
    options = given(command)
    assert (options["host"], str(options["port"])) == ("0.0.0.0", last("EXPOSE"))
    health = last("HEALTHCHECK")
    assert f"127.0.0.1:{options['port']}/health" in " ".join(json.loads(health.partition("CMD")[2]))


def test_a_service_that_writes_nothing_and_is_reached_from_this_machine_alone():
    services = COMPOSE["services"]
    assert all(re.search(r":v?\d|:cpu$", service["image"]) for service in services.values())
    for name in ("embedsmith", "index"):
        service, options = services[name], given(services[name]["command"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert options["url"] == "http://qdrant:6333"
        assert options["api_key_env"] in service["environment"]
        assert set(service["depends_on"]) <= services.keys()
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    served, made = given(services["embedsmith"]["command"]), given(services["index"]["command"])
    assert served["collection"] == made["collection"]
    assert served["models"] == [made["model"]]
    assert served["key_env"] in services["embedsmith"]["environment"]
    published = services["embedsmith"]["ports"]
    assert published == [f"127.0.0.1:{served['port']}:{served['port']}"]
    assert "ports" not in services["qdrant"]
    stop = int(services["embedsmith"]["stop_grace_period"].removesuffix("s"))
    assert stop > served["drain"]
    named = {volume.split(":")[0] for volume in services["qdrant"]["volumes"]}
    assert named == COMPOSE["volumes"].keys()


def test_every_variable_is_in_the_example_and_no_key_is():
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / "example.env").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert set(re.findall(r"\$\{(\w+)", text)) == example.keys()
    assert [value for name, value in example.items() if name.endswith("KEY")] == ["", ""]
    cuda = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text(encoding="utf-8"))
    assert cuda["services"].keys() <= COMPOSE["services"].keys()
    argument = next(text.split("=")[0] for name, text in INSTRUCTIONS if name == "ARG" and text.startswith("ACC"))
    for service in (*cuda["services"].values(), COMPOSE["services"]["embedsmith"]):
        assert argument in service["build"]["args"]


@pytest.fixture(scope="module")
def unit():
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read(DEPLOY / "embedsmith.service", encoding="utf-8")
    return parser


def test_the_unit_starts_the_server_and_waits_for_its_end(unit):
    service = unit["Service"]
    program, *command = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/embedsmith")
    options = given(command)
    assert options["host"] == "127.0.0.1"
    name = service["LoadCredential"].split(":")[0]
    assert str(options["keys"]) == "${CREDENTIALS_DIRECTORY}/" + name
    assert int(service["TimeoutStopSec"]) > options["drain"]
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert not service["CapabilityBoundingSet"]


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("this machine has no systemd-analyze")
    text = (DEPLOY / "embedsmith.service").read_text(encoding="utf-8")
    place = tmp_path / "embedsmith.service"
    place.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(place)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_accepts_its_files(tmp_path):
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("this machine has no docker compose")
    env = tmp_path / "env"
    env.write_text("MODEL=/m\nDOCUMENTS=/d\nEMBEDSMITH_KEY=k\nQDRANT_KEY=q\n")
    for files in (["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]):
        chosen = [part for file in files for part in ("-f", str(DEPLOY / file))]
        command = ["docker", "compose", *chosen, "--env-file", str(env), "config", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
