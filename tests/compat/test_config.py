"""The reference's flat JSON configs, field by field as published, and a run from one of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.compat.config import read_recipe
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.losses import F2LLM, Matryoshka, Sum
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


def test_same_class_rows_are_neither_negatives_nor_spread(tmp_path, data):
    kinds = {"arxiv": "clustering"}
    path = write(tmp_path / "c.json", data, **SPREAD, dataset_types=kinds, num_hard_neg_clustering=9)
    cluster, retrieval = read_recipe(path).data
    assert isinstance(cluster.loss, Matryoshka)
    assert cluster.loss.inner == F2LLM(temperature=0.05, in_batch=False)
    assert isinstance(retrieval.loss, Sum)
    assert (cluster.negatives, retrieval.negatives) == (9, 7)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"limits": 500}, RecipeError, "mteb ignored it"),
        ({"mrl_dim": [64]}, RecipeError, "did you mean 'mrl_dims'"),
        ({"pooling_mode": "first"}, RecipeError, "one of eos, mean"),
        ({"mrl_dim_weights": [1.0]}, RecipeError, "1 entries for 2 mrl_dims"),
        ({"train_data_path": "absent"}, DataError, "has no datasets"),
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
