"""The reference's flat JSON configs, field by field as published, and a run from one of them."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.api.tokenizing import adopt
from embedsmith.compat.config import read_recipe
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data import Source, read_source
from embedsmith.data.token_cache import Manifest
from embedsmith.losses import F2LLM, InfoNCE, Matryoshka, Sum
from embedsmith.models import load
from embedsmith.train import train
from tests.models.families import tiny
from tests.models.test_decoders import byte_tokenizer

COMMON = {
    "model_path": "Qwen/Qwen3-0.6B",
    "experiment_id": "one",
    "output_dir": "output",
    "tb_dir": "tb",
    "cache_dir": "cache",
    "train_batch_size": 24,
    "max_seq_length": 1024,
    "learning_rate": 1.2e-5,
    "min_lr": 1e-7,
    "weight_decay": 0.01,
    "warmup_steps": 1000,
    "train_epochs": 2,
    "train_steps": -1,
    "num_hard_neg": 7,
    "checkpointing_steps": 1000,
    "validation_steps": 2000,
    "log_interval": 10,
    "mrl_enabled": False,
    "mrl_dims": [128, 256],
    "mrl_dim_weights": [0.5, 0.5],
    "spread_enabled": False,
    "spread_weight": 0.1,
    "spread_t": 2.0,
    "lora_enabled": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_bias": "none",
    "lora_task_type": "FEATURE_EXTRACTION",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_adapter_path": None,
    "bi_attn_enabled": False,
    "attn_implementation": "flash_attention_2",
    "pooling_mode": "eos",
    "skip_instruction": False,
    "instruction_separator": "Query:",
}
SPREAD = {"mrl_enabled": True, "spread_enabled": True}
BOTH = {"bi_attn_enabled": True, "pooling_mode": "mean"}
CONFIGS = {
    "f2llm": {},
    "mrl_spread": SPREAD,
    "mrl_spread.bi_mean": SPREAD | BOTH,
    "mrl_spread.lora.bi_mean": SPREAD | BOTH | {"lora_enabled": True},
    "full": SPREAD | BOTH | {"pooling_mode": "eos", "lora_enabled": True},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Their relative paths (cache_dir, output_dir) lead into a folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for name in ("msmarco", "arxiv"):
        rows = [
            {
                "query": f"Instruct: find\nQuery: cat {i} {name}",
                "passage": f"dog {i}",
                "negative_1": f"tree {i}",
                "negative_2": "sun",
            }
            for i in range(60)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def write(path, data, **changes):
    path.write_text(json.dumps(COMMON | {"train_data_path": str(data)} | changes))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_load_unchanged(tmp_path, data, name):
    changes = CONFIGS[name]
    recipe = read_recipe(write(tmp_path / "config.json", data, **changes))
    model, loss = recipe.model, recipe.data[0].loss
    assert (model.path, model.max_length) == ("Qwen/Qwen3-0.6B", 1024)
    assert model.attention == ("bidirectional" if changes.get("bi_attn_enabled") else "causal")
    assert model.pooling == ("mean" if changes.get("pooling_mode") == "mean" else "last")
    assert (model.lora is not None) == changes.get("lora_enabled", False)
    assert (recipe.output, recipe.train.epochs, recipe.train.betas) == ("output/one", 2, (0.9, 0.98))
    assert [source.name for source in recipe.data] == ["arxiv", "msmarco"]
    if name == "f2llm":
        assert loss == F2LLM(temperature=0.05)
    else:
        assert isinstance(loss, Sum)
        assert loss.weights == (1.0, 0.1)
        inner = loss.parts[0]
        assert isinstance(inner, Matryoshka)
        assert (inner.dims, inner.weights) == ((128, 256), (0.5, 0.5))


def test_in_batch_and_hard_negatives_may_be_one_term(tmp_path, data):
    kinds = {"dataset_types": {"arxiv": "clustering"}, "loss_form": "joint", "false_neg_margin": 0.2}
    cluster, retrieval = read_recipe(write(tmp_path / "c.json", data, **kinds)).data
    assert retrieval.loss == InfoNCE(temperature=0.05, negatives="all", margin=0.2)
    assert cluster.loss == InfoNCE(temperature=0.05, negatives="own", margin=0.2)


def test_same_class_rows_are_neither_negatives_nor_spread(tmp_path, data):
    kinds = {"arxiv": "clustering"}
    path = write(tmp_path / "c.json", data, **SPREAD, dataset_types=kinds, num_hard_neg_clustering=9)
    cluster, retrieval = read_recipe(path).data
    assert isinstance(cluster.loss, Matryoshka)
    assert cluster.loss.inner == F2LLM(temperature=0.05, in_batch=False)
    assert isinstance(retrieval.loss, Sum)
    assert (cluster.negatives, retrieval.negatives) == (9, 7)


def parquet(path, rows, negatives=2, instruction="Instruct: find\nQuery: "):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {"query": f"{instruction}cat {i} {path.stem}", "passage": f"dog {i}"}
        | {f"negative_{n}": f"tree {n} {i}" for n in range(1, negatives + 1)}
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)


def test_datasets_that_are_no_retrieval_are_known_by_name_and_by_their_single_negative(tmp_path, caplog):
    for name, negatives in (("msmarco", 3), ("imdb", 1), ("mine", 1), ("banking77", 3)):
        parquet(tmp_path / f"raw/{name}.parquet", 8, negatives)
    path = write(tmp_path / "c.json", tmp_path / "raw", **SPREAD, validation_steps=None)
    with caplog.at_level(logging.INFO, "embedsmith"):
        found = {source.name: source for source in read_recipe(path).data}
    tasks = {"banking77": "clustering", "imdb": "classification", "mine": "classification", "msmarco": "retrieval"}
    assert {name: source.task for name, source in found.items()} == tasks
    assert {name: source.negatives for name, source in found.items()} == {
        n: 1 if t == "classification" else 7 for n, t in tasks.items()
    }
    for name, source in found.items():
        assert isinstance(source.loss, Sum) == (name == "msmarco")
        inner = source.loss.parts[0].inner if name == "msmarco" else source.loss.inner
        assert inner.in_batch == (name == "msmarco")
    assert "classification, without in-batch negatives and spread-out: imdb, mine" in caplog.text
    other = write(tmp_path / "d.json", tmp_path / "raw", dataset_types={"mine": "retrieval"}, validation_steps=None)
    assert {s.name: s.task for s in read_recipe(other).data}["mine"] == "retrieval"


def test_the_instruction_of_a_query_is_cut_off_at_the_separator_and_left_out_of_the_pooling(tmp_path, data):
    skip = {"skip_instruction": True, "instruction_separator": "", "pooling_mode": "mean", "validation_steps": None}
    recipe = read_recipe(write(tmp_path / "c.json", data, **skip))
    assert recipe.model.include_prompt is False
    records = read_source(recipe.data[0]).records
    assert {record.instruction for record in records} == {"Instruct: find\nQuery: "}
    assert records[3].query == "cat 3 arxiv"
    tiny("qwen3", vocab_size=280).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = load(str(tmp_path / "base"), pooling="mean", include_prompt=False, max_length=64, device="cpu")
    split = model.tokenize([records[3].query], "query", "retrieval", [records[3].instruction])
    whole = model.tokenize([records[3].instruction + records[3].query], "query")
    assert split.id_S.tolist() == whole.id_S.tolist(), "the model reads the same characters"
    assert (split.body_N[0], whole.body_N[0]) == (len("Instruct: find\nQuery:"), 0), "the space belongs to ' cat'"


def test_a_query_without_the_separator_stays_whole_and_is_counted(tmp_path, caplog):
    rows = [{"query": "Instruct: find Query: a Query: b", "passage": "c"}, {"query": "plain", "passage": "c"}]
    pq.write_table(pa.Table.from_pylist([*rows, {"query": "ends in Query: ", "passage": "c"}]), tmp_path / "x.parquet")
    found = read_source(Source(path=str(tmp_path / "x.parquet"), instruction_separator="Query:")).records
    assert [record.query for record in found] == ["a Query: b", "plain", "ends in Query: "]
    assert [record.instruction for record in found] == ["Instruct: find Query: ", None, None]
    assert "2 (instruction: no 'Query:' in the query)" in caplog.text
    with pytest.raises(RecipeError, match="instruction and instruction_separator"):
        Source(path="x", instruction="a", instruction_separator="b")


def test_empty_values_of_the_reference_mean_what_they_mean_there(tmp_path, data):
    """Its code writes 0, null and "" where nothing is wanted."""
    empty = {
        "train_subset_rows": 0,
        "valid_subset_rows": 0,
        "max_datasets": 0,
        "read_rows_limit": 0,
        "lora_adapter_path": "",
    }
    nothing = {"mrl_dims": None, "mrl_dim_weights": None, "lora_target_modules": None, "instruction_separator": ""}
    recipe = read_recipe(write(tmp_path / "c.json", data, **empty, **nothing, lora_enabled=True))
    assert [source.limit for source in (*recipe.data, *recipe.evaluate.validation)] == [None] * (
        2 + len(recipe.evaluate.validation)
    )
    assert (recipe.model.path, recipe.model.lora.targets) == ("Qwen/Qwen3-0.6B", "auto")
    for key, weighting in (("mrl_enabled", "ones"), ("use_mrl", "f2llm")):
        path = write(tmp_path / f"{key}.json", data, **empty, **nothing | {"mrl_dims": [8, 16]}, **{key: True})
        assert [source.loss.weighting for source in read_recipe(path).data] == [weighting] * 2


def test_small_files_are_trained_on_and_validated_where_they_can_be(tmp_path, caplog):
    parquet(tmp_path / "raw/few.parquet", 5)
    parquet(tmp_path / "raw/more.parquet", 600)
    recipe = read_recipe(write(tmp_path / "c.json", tmp_path / "raw"))
    assert [source.name for source in recipe.data] == ["few", "more"]
    assert [source.name for source in recipe.evaluate.validation] == ["more"]
    assert "few has 5 rows, and none is in the hundredth held out: it is not validated on" in caplog.text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_batch_sise=4", "train_batch_sise: a flat config has no such key .did you mean 'train_batch_size'"),
        ("trian.steps=4", "trian: a flat config has no such key .did you mean 'train'"),
        ("max_seq_length=1", "max_seq_length: Input should be greater than or equal to 4"),
        ("lora_r=0", "lora_r: Input should be greater than 0"),
        ("dataset_types.arxif=clustering", "dataset_types: no dataset is called 'arxif' .did you mean 'arxiv'"),
        ("dataset_types.arxiv=cluster", "a dataset of the kind 'cluster'"),
    ],
)
def test_misspelt_overrides_are_told_in_the_words_of_flat_configs(tmp_path, data, override, words):
    with pytest.raises(RecipeError, match=words):
        read_recipe(write(tmp_path / "c.json", data), [override])


def test_a_flat_config_is_known_without_its_first_key(tmp_path, data):
    tree = {"modle_path": "x", "train_data_path": str(data), "output_dir": "out"}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match=r"modle_path: unknown key .did you mean 'model_path'"):
        read_recipe(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"limits": 500}, RecipeError, "mteb ignored it"),
        ({"mrl_dim": [64]}, RecipeError, "did you mean 'mrl_dims'"),
        ({"pooling_mode": "first"}, RecipeError, "one of eos, mean"),
        ({"mrl_dim_weights": [1.0]}, RecipeError, "1 entries for 2 mrl_dims"),
        ({"train_data_path": "absent"}, DataError, "has no datasets"),
        ({"train_batch_size": 0}, RecipeError, "train_batch_size: Input should be greater than 0"),
        ({"dataset_weights": {"nq": 2}}, RecipeError, "dataset_weights: no dataset is called 'nq'"),
    ],
)
def test_mistakes_are_named(tmp_path, data, changes, error, words):
    with pytest.raises(error, match=words):
        read_recipe(write(tmp_path / "c.json", data, **changes))


def test_a_run_from_a_flat_config(tmp_path, data):
    tiny("qwen3", vocab_size=280).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    small = {"train_steps": 2, "train_batch_size": 4, "mrl_dims": [4, 8], "max_seq_length": 48, "warmup_steps": 1}
    here = {"attn_implementation": "sdpa", "cache_dir": None, "validation_steps": None}
    changes = CONFIGS["mrl_spread.lora.bi_mean"] | small | here
    path = write(tmp_path / "c.json", data, **changes, model_path=str(tmp_path / "base"), output_dir=str(tmp_path))
    folder = train(read_recipe(path, ["log_interval=1", "train.log_with=[]"]))
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["is_causal"] is False


@pytest.fixture
def base(tmp_path):
    tiny("qwen3", vocab_size=280).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_is_tokenized_in_one_command_and_trained_on(tmp_path, base, typed, monkeypatch):
    """Files with different numbers of negatives; the kinds of task travel in the manifest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, negatives in (("msmarco", 3), ("imdb", 1), ("deep/nq", 2)):
        parquet(tmp_path / f"raw/{name}.parquet", 12, negatives)
    model = ("--model", base, "--max-length", 48, "--pooling", "last")
    out, err, code = typed("tokenize", tmp_path / "raw", *model, "--out", tmp_path / "plain")
    assert code == 0, err
    assert "imdb: 12 rows, 24 documents, classification" in out
    cut = ("--set", "instruction_separator=Query:")
    assert typed("tokenize", tmp_path / "raw", *model, "--out", tmp_path / "tokens", *cut)[2] == 0
    tasks = {"imdb": "classification", "msmarco": "retrieval", "nq": "retrieval"}
    assert {name: facts.task for name, facts in Manifest.load(tmp_path / "tokens").datasets.items()} == tasks
    changes = SPREAD | BOTH | {"skip_instruction": True, "train_steps": 2, "train_batch_size": 4, "mrl_dims": [4, 8]}
    changes |= {"max_seq_length": 48, "attn_implementation": "sdpa", "cache_dir": None, "model_path": str(base)}
    changes |= {"output_dir": str(tmp_path), "warmup_steps": 1, "checkpointing_steps": 2, "validation_steps": None}
    with pytest.raises(DataError, match=r"do not say where the instruction of a query ends\n  to fix: tokenize the"):
        read_recipe(write(tmp_path / "c.json", tmp_path / "plain", **changes))
    with pytest.raises(RecipeError, match="dataset_types calls imdb retrieval, and its tokens were made as class"):
        read_recipe(write(tmp_path / "c.json", tmp_path / "tokens", **changes, dataset_types={"imdb": "retrieval"}))
    path = write(tmp_path / "c.json", tmp_path / "tokens", **changes)
    recipe = read_recipe(path, ["train.log_with=[]"])
    assert {source.name: source.task for source in recipe.data} == tasks
    from_tokens = train(recipe)
    texts = write(tmp_path / "d.json", tmp_path / "raw", **changes, experiment_id="texts")
    from_texts = train(read_recipe(texts, ["train.log_with=[]"]))
    assert (from_tokens / "model.safetensors").read_bytes() == (from_texts / "model.safetensors").read_bytes()
    whole = write(tmp_path / "e.json", tmp_path / "raw", **changes | {"skip_instruction": False}, experiment_id="whole")
    other = train(read_recipe(whole, ["train.log_with=[]"]))
    assert (other / "model.safetensors").read_bytes() != (from_texts / "model.safetensors").read_bytes()


def test_tokens_of_the_references_script_are_adopted_with_their_kinds(tmp_path, base):
    for name, negatives in (("msmarco", 2), ("own", 1)):
        ids = {"query_input_ids": [3, 2], "passage_input_ids": [4, 2]}
        ids |= {f"negative_{n}_input_ids": [5, 2] for n in range(1, negatives + 1)}
        (tmp_path / "theirs").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([ids] * 4), tmp_path / f"theirs/{name}.parquet")
    with pytest.raises(DataError, match=r"no column 'query'(.|\n)*--adopt auto"):
        read_recipe(write(tmp_path / "c.json", tmp_path / "theirs"))
    manifest = adopt(tmp_path / "theirs", load(str(base), pooling="last", device="cpu"), str(base), "auto")
    assert {name: facts.task for name, facts in manifest.datasets.items()} == {
        "msmarco": "retrieval",
        "own": "classification",
    }
    assert [
        s.task for s in read_recipe(write(tmp_path / "c.json", tmp_path / "theirs", validation_steps=None)).data
    ] == [
        "retrieval",
        "classification",
    ]
