"""What the jobs of `freeze.py` read: an encoder and a decoder with random weights, and texts that mean little."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["the", "a", "cat", "dog", "mat", "tree", "red", "blue", "big", "old", "new", "sat", "ran", "on", "by", "far"]
MARKS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def write_inputs(folder: Path) -> None:
    """The folders `bert` and `decoder`, and the texts; the same every time."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, Qwen3Config, Qwen3Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": len(tokenizer()), "intermediate_size": 24, "initializer_range": 0.5, "pad_token_id": 0}
    bert = BertForMaskedLM(BertConfig(max_position_embeddings=40, **shape))
    qwen = Qwen3Model(Qwen3Config(num_key_value_heads=2, head_dim=8, eos_token_id=3, bos_token_id=2, **shape))
    for name, model in (("bert", bert), ("decoder", qwen)):
        with torch.no_grad():  # biases that are zero show nothing
            for parameter in (own for key, own in model.named_parameters() if key.endswith("bias")):
                parameter.normal_(0, 0.3)
        model.save_pretrained(folder / name)
        tokenizer(decoder=name == "decoder").save_pretrained(folder / name)
    write_texts(folder, random.Random(0))


def tokenizer(decoder: bool = False) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    ids = {token: number for number, token in enumerate([*MARKS.values(), "_", *dict.fromkeys(WORDS + letters)])}
    pieces = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if decoder:
        ends = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
        return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", **ends)
    pieces.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=32, **MARKS)


def write_texts(folder: Path, chance: random.Random) -> None:
    """A file of every kind that a job reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def text() -> str:
        kinds = ("the", WORDS[6:11], WORDS[2:6], WORDS[11:13], WORDS[13:15], "the", WORDS[6:11], WORDS[2:6])
        return " ".join(kind if isinstance(kind, str) else chance.choice(kind) for kind in kinds)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")

    (folder / "beir/qrels").mkdir(parents=True)
    for place in range(3):
        pairs = [{"query": text()[4:], "pos": [text(), text()], "neg": [text() for _ in range(16)]} for _ in range(24)]
        write(f"retrieval-{place}.jsonl", pairs)
        write(f"sts-{place}.jsonl", [{"text1": text(), "text2": text(), "score": n / 24} for n in range(24)])
        pq.write_table(pa.Table.from_pylist(pairs), folder / f"retrieval-{place}.parquet")
    scores = [[chance.random() for _ in range(18)] for _ in pairs]
    write("taught.jsonl", [row | {"pos_scores": own[:2], "neg_scores": own[2:]} for row, own in zip(pairs, scores)])
    flat = [{"query": row["query"], "passage": row["pos"][0], "negative_1": row["neg"][0]} for row in pairs]
    (folder / "flat").mkdir()
    pq.write_table(pa.Table.from_pylist(flat), folder / "flat/pairs.parquet")
    write("sts.jsonl", [{"text1": text(), "text2": text(), "score": chance.random()} for _ in range(24)])
    for name in ("docs.jsonl", "beir/corpus.jsonl"):
        write(name, [{"_id": f"d{n}", "title": WORDS[n % 16], "text": text(), "lang": WORDS[n % 2]} for n in range(30)])
    write("beir/queries.jsonl", [{"_id": f"q{n}", "text": text()} for n in range(10)])
    grades = "".join(f"q{query}\td{chance.randrange(30)}\t1\n" for query in range(10))
    (folder / "beir/qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{grades}")
    for name in ("topics-train", "topics-test", "groups"):
        write(f"{name}.jsonl", [{"text": text(), "label": WORDS[6 + n % 3]} for n in range(18)])
    raw = [{"query": text(), "pos": [text()]} for _ in range(24)]
    near = {"query": f"{raw[5]['query']} now", "pos": [f"{raw[5]['pos'][0]} now"]}
    chinese = {"query": "猫坐在红色的垫子上面看着老树", "pos": ["那只大狗在蓝色的树旁边跑来跑去"]}
    bad = [{"query": query, "pos": [text()]} for query in ("", "!!! ???", "https://a.example/b", "x")]
    write("raw.jsonl", [*raw, *raw[:3], near, chinese, *bad])
    articles = [[" ".join(f"{text()}." for _ in range(7)) for _ in range(25)] for _ in range(4)]
    write("articles.jsonl", [{"text": "\n".join(paragraphs)} for paragraphs in articles])
    (folder / "texts.txt").write_text("".join(f"{text()}\n" for _ in range(40)))
