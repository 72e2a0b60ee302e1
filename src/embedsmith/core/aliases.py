"""Names that other tools have for what has another name here, for the errors that meet them; and which verb's recipe a
file looks like. Imported by the shelf and so by `--help`: nothing heavy."""

import re
from collections.abc import Iterable, Mapping

_INFONCE = "type: infonce; train.micro_batch or train.token_budget bounds its memory"

_THINGS: Mapping[str, Mapping[str, str]] = {
    "loss": {
        # sentence-transformers
        "MultipleNegativesRankingLoss": "type: infonce",
        "MNRL": "type: infonce",
        "CachedMultipleNegativesRankingLoss": _INFONCE,
        "CMNRL": _INFONCE,
        "MultipleNegativesSymmetricRankingLoss": "{type: infonce, symmetric: true}",
        "CachedMultipleNegativesSymmetricRankingLoss": "{type: infonce, symmetric: true}",
        "GISTEmbedLoss": "type: gist_embed",
        "CachedGISTEmbedLoss": "type: gist_embed",
        "TripletLoss": "type: infonce, with the negative in the data",
        "MegaBatchMarginLoss": "type: infonce",
        "CoSENTLoss": "type: cosent",
        "AnglELoss": "type: angle",
        "CosineSimilarityLoss": "type: cosent, or type: pearson",
        "ContrastiveLoss": "type: cosent, with the labels 0 and 1 as scores",
        "OnlineContrastiveLoss": "type: cosent, with the labels 0 and 1 as scores",
        "ContrastiveTensionLoss": "type: infonce, on pairs",
        "SoftmaxLoss": "type: classifier",
        "BatchAllTripletLoss": "type: supervised_contrastive",
        "BatchHardTripletLoss": "type: supervised_contrastive",
        "BatchHardSoftMarginTripletLoss": "type: supervised_contrastive",
        "BatchSemiHardTripletLoss": "type: supervised_contrastive",
        "MarginMSELoss": "type: margin_mse",
        "DistillKLDivLoss": "type: score_kl",
        "MSELoss": "type: teacher_vectors",
        "BinaryCrossEntropyLoss": "type: binary, of a reranker",
        "ListNetLoss": "type: listnet",
        "LambdaLoss": "type: lambda",
        "MatryoshkaLoss": "{type: matryoshka, inner: infonce, dims: [64, 256]}",
        "Matryoshka2dLoss": "{type: matryoshka, inner: infonce, dims: [64, 256]}; layers are cut with model.layers",
        "AdaptiveLayerLoss": "model.layers, which keeps the first layers before training",
        "DenoisingAutoEncoderLoss": "type: tsdae",
        "SpladeLoss": "{type: sum, parts: [{type: infonce, head: sparse}, {type: flops}]}",
        "FlopsLoss": "type: flops",
        "GlobalOrthogonalRegularizationLoss": "type: gor",
        # FlagEmbedding and others
        "m3_kd_loss": "type: m3_self_distillation",
        "kl_div": "type: score_kl",
        "contrastive": "type: infonce",
        "simcse": "type: infonce",
        "ranknet": "type: rank_kl",
    },
    "pooling": {
        "avg": "mean",
        "mean_pooling": "mean",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_weightedmean_tokens": "weighted_mean",
        "weightedmean": "weighted_mean",
        "lasttoken": "last",
        "eos": "last",
        "cls_token": "cls",
        "first": "cls",
    },
    "merge method": {
        # mergekit
        "linear": "type: average",
        "soup": "type: average, or type: greedy_soup",
        "dare_ties": "{type: dare, then: ties}",
        "dare_linear": "type: dare",
        "della_linear": "type: della",
        "breadcrumbs_ties": "{type: breadcrumbs, then: ties}",
        "nuslerp": "type: slerp",
        "multislerp": "type: karcher",
        "nearswap": "type: slerp",
        "passthrough": "model.layers, which keeps some layers of one model",
    },
    "head": {"colbert": "multivector", "colbert_vecs": "multivector", "lexical_weights": "sparse", "splade": "sparse"},
}
_KEYS: Mapping[str, str] = {
    # TrainingArguments of transformers and sentence-transformers
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size, of all devices together",
    "train_batch_size": "train.batch_size, of all devices together",
    "gradient_accumulation_steps": "train.batch_size, and train.micro_batch for memory",
    "mini_batch_size": "train.micro_batch",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "max_grad_norm": "train.clip_norm",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision",
    "logging_steps": "train.log_every",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "load_best_model_at_end": "train.final=best",
    "report_to": "train.log_with",
    "eval_steps": "evaluate.every",
    "eval_dataset": "evaluate.validation",
    "metric_for_best_model": "evaluate.metric",
    "early_stopping_patience": "evaluate.patience",
    "output_dir": "output",
    "train_dataset": "data",
    "train_data": "data",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "max_seq_length": "model.max_length",
    "query_max_len": "model.max_length",
    "passage_max_len": "model.max_length",
    "sentence_pooling_method": "model.pooling",
    "pooling_method": "model.pooling",
    "pooling_mode": "model.pooling",
    "normalize_embeddings": "model.normalize",
    "query_instruction_for_retrieval": "model.prompts",
    "train_group_size": "negatives of the source",
    "scale": "temperature, which is 1 / scale",
    "matryoshka_dims": "dims",
    "mini_batch": "train.micro_batch",
    # mergekit
    "merge_method": "method",
    "models": "parents",
    "base_model": "base",
}
_PLAIN = re.compile(r"[^a-z0-9]")


def _plain(name: str) -> str:
    return _PLAIN.sub("", name.lower())


_BY_PLAIN = {
    kind: {_plain(name): text for name, text in names.items()} for kind, names in (*_THINGS.items(), ("key", _KEYS))
}


def name_here(kind: str, name: str) -> str | None:
    """What a name of another tool is here, as a recipe writes it; `None` for a name that is not known. `kind`: that of
    a shelf, or `key` for the key of a recipe."""
    known = _BY_PLAIN.get(kind, {})
    plain = _plain(name)
    return known.get(plain) or (known.get(f"{plain}loss") if kind == "loss" else None)


_TELLING: tuple[tuple[str, frozenset[str]], ...] = (
    ("sweep", frozenset({"sweep"})),
    ("run", frozenset({"stages"})),
    ("merge", frozenset({"parents"})),
    ("mine", frozenset({"searchers"})),
    ("curate", frozenset({"input", "steps"})),
    ("tokenize", frozenset({"model", "data", "out"})),
    ("train", frozenset({"model", "data"})),
    ("train", frozenset({"model", "data", "output"})),
)
"""Keys that the recipe of a verb has, and no other's."""


def other_verb(keys: Iterable[str], known: Iterable[str]) -> str | None:
    """The verb whose recipe has these keys, where it is not that of the `known` ones."""
    given, fields = set(keys), set(known)
    return next((verb for verb, telling in _TELLING if telling <= given and not telling <= fields), None)
