"""The evaluation scripts of the decoder reference: what of a config they honour, local data, devices."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedsmith.compat import scripts
from embedsmith.core.device import has_mps, use_device
from embedsmith.core.errors import EmbedsmithError, ModelError, RecipeError
from embedsmith.models import load
from tests.compat.test_config import BOTH, COMMON
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer


@pytest.fixture
def base(tmp_path):
    tiny("qwen3", vocab_size=280).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def beir(folder, splits=("dev",)):
    (folder / "qrels").mkdir(parents=True)
    texts = {"d1": "the cat sat", "d2": "a dog ran far", "d3": "old tree"}
    rows = [{"_id": key, "title": "", "text": text} for key, text in texts.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": "q1", "text": "cat"}, {"_id": "q2", "text": "dog"}]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for split in splits:
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    return folder


def config(tmp_path, base, **changes):
    path = tmp_path / "config.json"
    small = {"model_path": str(base), "train_data_path": "none", "max_seq_length": 48, "attn_implementation": "sdpa"}
    path.write_text(json.dumps(COMMON | small | changes))
    return path


@pytest.fixture
def run(tmp_path):
    """Runs the extractor's script: the loaded model, and the scores."""

    def extractor(*arguments):
        loaded = []

        def noted(path, **options):
            loaded.append(load(path, device="cpu", **{k: v for k, v in options.items() if k != "device"}))
            return loaded[-1]

        out = ("--output_folder", str(tmp_path / "results"))
        results = scripts.extractor_command(noted, [*map(str, arguments), *out])
        return SimpleNamespace(model=loaded[0], results=results)

    return extractor


def test_a_config_decides_how_a_checkpoint_of_the_reference_is_read(tmp_path, base, run):
    """Plain transformers folders say nothing of pooling, attention or instructions."""
    pytest.importorskip("mteb", reason='needs mteb: pip install "embedsmith[eval]"')
    data, asked = beir(tmp_path / "t2"), ("--query_instruction", r"Instruct: find\nQuery: ")
    path = config(tmp_path, base, **BOTH, skip_instruction=True)
    made = run("--config", path, "--ckpt_dir", base, "--data", data, *asked)
    settings = made.model.settings
    assert (settings.pooling, settings.include_prompt, settings.max_length) == ("mean", False, 48)
    assert made.model.attention.mode == "bidirectional"
    assert settings.prompts == {"query": "Instruct: find\nQuery: "}
    backbone = made.model.backbone
    ids = made.model.tokenize(["a cat"], "query").id_S
    assert ids[-1] == made.model.tokenizer.eos_token_id
    with torch.no_grad():
        state_TH = backbone(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
    body = state_TH[len("Instruct: find\nQuery:") + 1 : -1].mean(0)  # " a", " cat": neither instruction nor end
    whole = made.model.encode(["a cat"], "query")[0]
    np.testing.assert_allclose(whole, torch.nn.functional.normalize(body, dim=0).numpy(), atol=1e-5)
    assert made.results.tasks[0].task == "t2"
    plain = run("--config", config(tmp_path, base), "--data", tmp_path, "--tasks", "t2", "--split", "dev")
    assert (plain.model.settings.pooling, plain.model.attention.mode) == ("last", "causal")
    assert plain.model.settings.eos_id == plain.model.tokenizer.eos_token_id


def test_an_adapter_of_the_reference_lies_below_the_checkpoint(tmp_path, base, run):
    pytest.importorskip("mteb", reason='needs mteb: pip install "embedsmith[eval]"')
    data = beir(tmp_path / "t2")
    how = {"pooling": "mean", "attention": "bidirectional", "append_eos": True, "max_length": 48, "device": "cpu"}
    model = load(str(base), lora={"r": 4}, **how)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    vectors = model.encode(TEXTS)
    model.save(tmp_path / "apart", merge=False)
    (tmp_path / "step_10/adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # what peft writes, and no more
        text = (tmp_path / "apart" / name).read_bytes().replace(str(base).encode(), b"models/of/another/machine")
        (tmp_path / "step_10/adapter" / name).write_bytes(text)
    lora = config(tmp_path, base, **BOTH, lora_enabled=True)
    np.testing.assert_allclose(
        run("--config", lora, "--ckpt_dir", tmp_path / "step_10", "--data", data).model.encode(TEXTS),
        vectors,
        atol=1e-5,
    )
    named = config(tmp_path, base, **BOTH, lora_enabled=True, lora_adapter_path=str(tmp_path / "step_10/adapter"))
    np.testing.assert_allclose(run("--config", named, "--data", data).model.encode(TEXTS), vectors, atol=1e-5)
    saved = run("--config", lora, "--ckpt_dir", tmp_path / "apart", "--data", data)
    np.testing.assert_allclose(saved.model.encode(TEXTS), vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("e5", {"prompts": {"query": scripts.T2_PROMPT}}),
        ("bge", {"pooling": "cls"}),
        ("qwen3embedding", {"prompts": {"query": scripts.T2_PROMPT}}),
        ("qwen3eos", {"pooling": "last", "prompts": {"query": scripts.T2_PROMPT}}),
    ],
)
def test_a_known_model_is_loaded_as_its_authors_say(tmp_path, name, options):
    pytest.importorskip("mteb", reason='needs mteb: pip install "embedsmith[eval]"')
    asked = []

    def loaded(path, **given):
        asked.append((path, given))
        raise ModelError("enough")

    data = ("--data", str(beir(tmp_path / "t2")))
    for given, path in (((), scripts.PRESETS[name][0]), (("--model_id", "mine"), "mine")):
        with pytest.raises(ModelError, match="enough"):
            scripts.t2retrieval_command(loaded, ["--model", name, *given, *data])
        assert asked.pop() == (path, options)


def test_tasks_are_asked_for_in_the_languages_that_are_named(monkeypatch):
    asked = []

    def found(names, **given):
        asked.append((names, given["languages"]))
        raise ModelError("enough")

    monkeypatch.setattr(scripts, "find_mteb_tasks", found)
    for given, languages in (((), []), (("--task_langs", "cmn", "eng"), ["cmn", "eng"])):
        with pytest.raises(ModelError, match="enough"):
            scripts.extractor_command(None, ["--ckpt_dir", "m", "--tasks", "a,b", "c", *given])
        assert asked.pop() == (["a", "b", "c"], languages)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "x"], "neither --ckpt_dir nor --config"),
        (["--ckpt_dir", "m", "--data", "{t2}", "--tasks", "a", "b"], "is one task, and 2 are named"),
        (["--ckpt_dir", "m", "--data", "{root}"], r"holds no T2Retrieval; found: t2\n  expected: a folder with corpus"),
        (["--ckpt_dir", "m", "--data", "{t2}", "--split", "train"], "no judgements for the split 'train'"),
        (["--ckpt_dir", "m", "--device", "gpu"], "--device gpu: no device is called 'gpu'"),
        (["--ckpt_dir", "m", "--corpus_limit", "3"], "--corpus_limit without --limits"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(tmp_path, arguments, words):
    pytest.importorskip("mteb", reason='needs mteb: pip install "embedsmith[eval]"')
    data = beir(tmp_path / "t2")
    with pytest.raises(EmbedsmithError, match=words):
        scripts.extractor_command(None, [one.format(t2=data, root=tmp_path) for one in arguments])


def test_a_gpu_that_is_not_there_is_one_clear_error(monkeypatch, typed):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match=r"--device 0: (.|\n)*to fix: leave --device out, or say --device cpu"):
        scripts.t2retrieval_command(None, ["--model", "e5", "--device", "0"])
    for command in (("train", "joint"), ("encode", "a.txt", "out", "--model", "m"), ("evaluate", "m")):
        _, err, code = typed(*command, "--device", "cuda:0")
        assert code == 1
        assert "--device cuda:0: the device 'cuda:0' is asked for, and" in err


def test_one_card_of_those_that_a_process_was_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("embedsmith.core.device._cpu_alone", False)
    for visible, name, left in (
        ("", "1", "1"),
        ("4,5,6", "1", "5"),
        ("4,5,6", "cuda:2", "6"),
        ("4,5,6", "cuda", "4,5,6"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        use_device(name)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    with pytest.raises(ModelError, match=r"--device 3: (.|\n)*cuda:0 to cuda:2"):
        use_device("3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="under a launcher"):
        use_device("1")
    use_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert not has_mps()


def test_an_unknown_key_of_a_config_is_named(tmp_path, base):
    with pytest.raises(RecipeError, match=r"bi_atn_enabled: unknown key .did you mean 'bi_attn_enabled'"):
        scripts.extractor_command(None, ["--config", str(config(tmp_path, base, bi_atn_enabled=True))])
