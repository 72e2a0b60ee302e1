"""In a real Jupyter kernel: a run tells how far it is in plain lines, and results show as their tables."""

import pytest

CELLS = (
    "import embedsmith as es\n"
    "run = es.train(model='my-model', data='pairs.jsonl', steps=4, batch_size=8, log_every=2, output='runs/nb',\n"
    "               evaluate='scored.jsonl')",
    "run",
    "es.evaluate(run.folder, 'scored.jsonl')",
    "run.model.encode(['a cat', 'a dog'], convert_to_tensor=True).shape",
)


@pytest.mark.slow
def test_a_notebook_shows_lines_and_tables(workplace):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    resources = {"metadata": {"path": str(workplace)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
    train, run, scores, shape = (cell.outputs for cell in book.cells)
    told = "".join(output.text for output in train if output.output_type == "stream")
    assert [line.split(" · ")[0] for line in told.splitlines() if line.startswith("train ")] == [
        "train 2/4",
        "train 4/4",
    ]
    assert "left" in told
    assert not any(mark in told for mark in ("\r", "\x1b", "%|"))
    for outputs, words in ((run, ("before", "after", "runs/nb/model")), (scores, ("cosine_spearman", "scored"))):
        assert all(word in outputs[0].data["text/plain"] for word in words)
    assert "[2, 16]" in shape[0].data["text/plain"]
