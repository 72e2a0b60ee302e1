"""What `export` refuses before a graph is made."""

import pytest

import embedsmith as es
from embedsmith.core.errors import ModelError


@pytest.mark.parametrize(
    ("given", "name"),
    [({"floor": 0.9}, "floor"), ({"texts": ["a cat"]}, "texts"), ({"tasks": "sts"}, "tasks")],
)
def test_what_is_for_graphs_is_refused_for_gguf(workplace, given, name):
    with pytest.raises(ModelError, match=f"{name} with to=gguf(.|\n)*leave {name} out"):
        es.export("my-model", "out", to="gguf", **given)


def test_a_file_without_a_text_is_refused(workplace):
    (workplace / "empty.txt").write_text("")
    with pytest.raises(ModelError, match=r"empty\.txt: no text in this file"):
        es.export("my-model", "out", to="onnx", dtype="int8", texts="empty.txt")
    assert not (workplace / "out").exists()
