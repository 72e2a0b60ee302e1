"""Files of strangers that carry code or point elsewhere. A payload writes a file `owned`; none may ever be there."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.faults.fuzz import Judge, copied
from tests.faults.workplace import MAKING, READING, Command


class Payload:
    """Unpickled, it writes the file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("owned"), "owned")


def _pickled_weights(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Payload()}, place / "model" / "pytorch_model.bin")


def _pickle_beside(place: Path) -> None:
    (place / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (place / "model" / "1_Pooling" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def _index_of_weights(target: str) -> Callable[[Path], None]:
    def put(place: Path) -> None:
        weights = place / "model" / "model.safetensors"
        names = list(load_file(weights))
        shutil.move(weights, place / "stolen.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target.format(place=place))}
        (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    return put


def _own_code(place: Path) -> None:
    config = place / "model" / "config.json"
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto, "model_type": "evil"}))
    (place / "model" / "evil.py").write_text("open('owned', 'w').write('owned')\n")


def _own_tokenizer(place: Path) -> None:
    config = place / "model" / "tokenizer_config.json"
    auto = {"AutoTokenizer": ["evil.Tokenizer", None]}
    own = {"auto_map": auto, "tokenizer_class": "Tokenizer"}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    (place / "model" / "evil.py").write_text("open('owned', 'w').write('owned')\n")


def _own_module(place: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.Transformer"}]
    (place / "model" / "modules.json").write_text(json.dumps(modules))
    for folder in (place, place / "model"):
        (folder / "evil.py").write_text("open('owned', 'w').write('owned')\n")


def _module_outside(place: Path) -> None:
    modules = json.loads((place / "model" / "modules.json").read_text())
    shutil.move(place / "model" / "1_Pooling", place / "elsewhere")
    modules[1]["path"] = "../elsewhere"
    (place / "model" / "modules.json").write_text(json.dumps(modules))


def _pickled_state(place: Path) -> None:
    for path in (place / "stopped" / "checkpoints").glob("step-*/training.pt"):
        torch.save({"optimizer": Payload()}, path)


def _pickled_vectors(place: Path) -> None:
    np.save(place / "vectors" / "vectors.npy", np.array([Payload()] * 24, dtype=object), allow_pickle=True)


def _tokens_elsewhere(place: Path) -> None:
    shutil.copytree(place / "tokens", place / "stolen")
    manifest = place / "tokens" / "manifest.json"
    tree = json.loads(manifest.read_text())
    for name, entry in dict(tree["datasets"]).items():
        tree["datasets"][f"../stolen/{name}"] = entry | {"name": f"../stolen/{name}"}
        del tree["datasets"][name]
    manifest.write_text(json.dumps(tree))


_BY_NAME = {command.name: command for command in (*MAKING, *READING)}
CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "pickled weights": ("encode", _pickled_weights),
    "pickle beside the weights": ("merge", _pickle_beside),
    "weights outside the folder": ("encode", _index_of_weights("../stolen.safetensors")),
    "weights at an absolute path": ("merge", _index_of_weights("{place}/stolen.safetensors")),
    "code of the model": ("encode", _own_code),
    "code of the tokenizer": ("tokenize", _own_tokenizer),
    "code of a module": ("evaluate", _own_module),
    "a module outside the folder": ("encode", _module_outside),
    "pickled state of training": ("train on", _pickled_state),
    "pickled vectors": ("encode on", _pickled_vectors),
    "tokens outside their folder": ("train tokens", _tokens_elsewhere),
}
HARMLESS = ("pickle beside the weights", "code of the tokenizer")
"""What may be left unread: the command may work."""


def hostile_round(judge: Judge, case: str) -> str | None:
    name, put = CASES[case]
    command: Command = _BY_NAME[name]
    place = copied(judge.base, judge.scratch / "hostile", command)
    put(place)
    outcome = judge.server.one(command.args, place)
    if (place / "owned").exists():
        return "the payload ran"
    if outcome.hung or outcome.crashed:
        return f"traceback: {outcome.text[-500:]}"
    return "accepted" if outcome.code == 0 and case not in HARMLESS else None
