"""What a plan knows of the texts and models of a recipe: a look at a few hundred of its rows, and at the shapes of its
models, of which no weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from embedsmith.cli.planning.machines import Machines
from embedsmith.core.errors import EmbedsmithError
from embedsmith.curate.input_records import Input, InputRecords
from embedsmith.data import Source, negatives_per_query, read_source
from embedsmith.data.record import Record
from embedsmith.models import Embedder, ModelConfig
from embedsmith.models.backbone import keep_layers, read_architecture
from embedsmith.models.load import ModelSource, without_weights
from embedsmith.models.lora import add_adapter
from embedsmith.train.rank_memory import WeightFacts, bytes_of_a_token, weight_facts

ROWS = 500
"""Rows of a source that are looked at."""


@dataclass(frozen=True)
class TextFacts:
    """Texts of a recipe. `records`: some of them. `texts_a_row`: those that a row has, `drawn_a_row`: those that a step
    of training reads of it. `basis`: how they were found."""

    records: Sequence[Record]
    texts_a_row: float
    drawn_a_row: float
    bytes_a_text: float
    basis: str


def _look_at(found: Sequence[Record], machines: Machines, name: str, drawn: Sequence[int] = ()) -> TextFacts:
    """The figures of some records, with what was given in the place of them."""
    texts = [text for record in found for text in (record.query, *record.positives, *record.negatives)]
    mean = sum(len(text.encode()) for text in texts) / max(len(texts), 1)
    a_row = machines.texts_a_row or len(texts) / max(len(found), 1)
    basis = f"{name}: {a_row:.1f} texts a row of {machines.bytes_a_text or mean:.0f} bytes, by {len(found):,} rows"
    of_a_step = sum(drawn) / len(drawn) if drawn else a_row
    return TextFacts(found, a_row, of_a_step, machines.bytes_a_text or mean, basis)


def sample_of(sources: Sequence[Source], machines: Machines) -> TextFacts:
    """A look at sources. Errors: those of `read_source`."""
    found: list[Record] = []
    drawn: list[int] = []
    for source in sources:
        whole = read_source(replace(source, limit=min(source.limit or ROWS, ROWS), streaming=False))
        records = whole.texts_only("a plan", source.path).records[:ROWS]
        negatives = negatives_per_query(source, records)
        drawn += [1 + min(len(r.positives), source.positives) + min(len(r.negatives), negatives) for r in records]
        found += records
    return _look_at(found, machines, ", ".join(source.path for source in sources), drawn)


def sample_of_input(given: Input, machines: Machines) -> TextFacts:
    """The same of what is curated."""
    found = list(islice(InputRecords(replace(given, limit=min(given.limit or ROWS, ROWS))), ROWS))
    return _look_at(found, machines, str(given.path))


@dataclass(frozen=True)
class ModelShape:
    """A model by its shapes. `frame`: it reads texts and cannot encode them. `multiplied`: numbers that every token is
    multiplied with, `layers` and `hidden` those of its transformer."""

    config: ModelConfig
    frame: Embedder
    facts: tuple[WeightFacts, ...]
    multiplied: int
    layers: int
    hidden: int

    @property
    def size(self) -> int:
        return sum(fact.count for fact in self.facts)

    @property
    def dimension(self) -> int:
        return self.config.dimension or self.frame.encoded_dimension

    def flops(self, length: float) -> float:
        """Of a token's forward pass in a text of so many tokens: 2 for each number it is multiplied with, and 4 x
        hidden x length a layer for attention."""
        return 2.0 * self.multiplied + 4.0 * self.layers * self.hidden * length

    def tokens_a_text(self, sample: TextFacts, machines: Machines) -> tuple[float, str]:
        """The mean over all texts of some rows, cut and with prompts; and how that is known."""
        if machines.tokens_a_text is not None:
            return machines.tokens_a_text, f"{machines.tokens_a_text:g} tokens a text, as given"
        lengths = [
            *(self.frame.tokenize([r.query for r in sample.records], "query").length_N),
            *(self.frame.tokenize([t for r in sample.records for t in (*r.positives, *r.negatives)]).length_N),
        ]
        mean = float(np.mean(lengths))
        return mean, f"{mean:.1f} tokens a text, by the tokenizer of {self.config.path}"

    def activations(self, length: int) -> tuple[float, str]:
        """Bytes of a token's graph, and how that is known."""
        folder = ModelSource.find(self.config, with_weights=False).base
        try:
            kind, architecture = read_architecture(folder, self.config.trust_remote_code)
            found = bytes_of_a_token(kind, architecture, length, self.config.gradient_checkpointing)
            return found * self.layers / max(
                architecture.get_text_config().num_hidden_layers, 1
            ), "of two of its layers"
        except (EmbedsmithError, AttributeError, RuntimeError, TypeError, ValueError):
            rule = 34.0 * self.hidden * self.layers
            return rule, "by the rule of 34 x hidden x layers bytes (Korthikanti et al. 2022)"


def shape_of(config: ModelConfig) -> ModelShape:
    """The shapes of a model. Errors: `ModelError` for a model that is not here."""
    frame = without_weights(config)
    backbone: Any = frame.backbone
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # multiplied once a text at most
    keep_layers(backbone, config.layers)
    if config.lora is not None:
        with torch.device("meta"):
            add_adapter(backbone, config.lora)
    facts = tuple(weight_facts(frame))
    shape = getattr(getattr(backbone, "config", None), "get_text_config", lambda: None)()
    if shape is None:
        return ModelShape(config, frame, facts, 0, 0, frame.encoded_dimension)
    multiplied = sum(fact.count for fact in facts if not fact.table and len(fact.shape) > 1)
    return ModelShape(config, frame, facts, multiplied, shape.num_hidden_layers, shape.hidden_size)
