"""The model card, README.md, written beside a model: what it is, its prompts, and how to load it anywhere; Markdown
with the metadata block that model hubs read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from embedsmith.core.markdown import code, row
from embedsmith.core.shelf import poolings
from embedsmith.models.attention import Attention
from embedsmith.models.config import Settings
from embedsmith.models.heads.base import Head


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. `architecture`: of the backbone; `queries`: of another one that reads queries. `layers`:
    whether some stand behind the pooling. `standard`: whether standard files alone give the same vectors. `graph`: what
    is said of the graph for `backend` that is in the place of the weights."""

    settings: Settings
    architecture: str
    dimension: int
    heads: Mapping[str, Head]
    attention: Attention
    layers: bool
    standard: bool
    queries: str | None = None
    backend: str | None = None
    graph: str = ""


def model_card(about: CardFacts) -> str:
    settings = about.settings
    if settings.pooling is None or settings.main != "dense" or about.queries is not None:
        return _card_of_form(about)
    normalise = "vectors = torch.nn.functional.normalize(vectors, dim=-1)\n" if settings.normalize else ""
    if about.layers:
        normalise = "# the layers in the folders *_Dense come next, then normalisation; see modules.json\n"
    parts = settings.pooling.split("+")
    pooled = ", ".join(_POOLED.get(part, "") for part in parts)
    pooled = f"torch.cat([{pooled}], dim=-1)" if len(parts) > 1 else pooled
    plain = _ALONE.format(max_length=settings.max_length, pooled=pooled, head=normalise)
    plain = plain if settings.form == "dense" else ""  # a table is no model of transformers
    package = poolings.entry(parts[0]).package
    foreign = f"Its pooling, `{settings.pooling}`, comes with the Python package `{package}`.\n"
    foreign = "" if package == "embedsmith" else foreign
    return _CARD.format(
        alone=about.graph if about.backend else plain if about.standard else _ATTENDED + foreign,
        trust=("" if about.standard else ", trust_remote_code=True")
        + (f', backend="{about.backend}"' if about.backend else ""),
        attention=_attention(about.attention),
        architecture=about.architecture,
        pooling=settings.pooling.replace("_", " ").replace("+", " and "),
        max_length=settings.max_length,
        dimension=about.dimension,
        normalised=", normalised to length 1" if settings.normalize else "",
        prompts=_prompts(settings),
        token_heads=_token_heads(about.heads, with_files=about.backend is None),
    )


def _card_of_form(about: CardFacts) -> str:
    """Of a model of words or tokens, and of two models behind a Router."""
    settings = about.settings
    opened = {"sparse": "SparseEncoder", "multivector": "MultiVectorEncoder"}.get(settings.main, "SentenceTransformer")
    lines = f"from sentence_transformers import {opened} as Model"
    if settings.form == "colbert":
        lines += "  # or from pylate.models import ColBERT as Model"
    return _FORM_CARD.format(
        architecture=about.architecture,
        query="" if about.queries is None else f"; queries are read by a `{about.queries}`",
        max_length=settings.max_length,
        made={"sparse": "weights of words", "multivector": "a vector a token"}.get(settings.main, "a vector"),
        main=settings.main,
        prompts=_prompts(settings),
        code=lines,
    )


_POOLED = {
    "cls": "states[:, 0]",
    "mean": "(states * mask).sum(1) / mask.sum(1)",
    "mean_sqrt_len": "(states * mask).sum(1) / mask.sum(1).sqrt()",
    "weighted_mean": "(states * mask * mask.cumsum(1)).sum(1) / (mask * mask.cumsum(1)).sum(1)",
    "last": "states[torch.arange(len(states)), tokens.attention_mask.sum(1) - 1]",
    "max": "states.masked_fill(mask == 0, float('-inf')).amax(1)",
}

_MADE = {"sparse": "a weight a token", "multivector": "a vector a token"}

_FORM_CARD = """\
---
library_name: sentence-transformers
tags:
- sentence-transformers
- feature-extraction
- embedsmith
---

# Text embedding model

A `{architecture}` that maps a text of up to {max_length} tokens to {made}{query}. Made with embedsmith.

## Prompts

{prompts}

## Use

With embedsmith:

```python
import embedsmith as es

model = es.load("path/to/this/folder")
queries = model.represent(["what is late interaction?"], role="query", outputs=("{main}",))["{main}"]
documents = model.represent(["It compares token vectors."], role="document", outputs=("{main}",))["{main}"]
print(queries.scores(documents))
```

With sentence-transformers:

```python
{code}

model = Model("path/to/this/folder")
```
"""

_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- embedsmith
---

# Text embedding model

A `{architecture}` with {pooling} pooling that maps a text of up to {max_length} tokens to {dimension} numbers\
{normalised}.{attention} Made with embedsmith.

## Prompts

{prompts}

## Use

With embedsmith:

```python
import embedsmith as es

model = es.load("path/to/this/folder")
queries = model.encode(["what is late interaction?"], role="query")
documents = model.encode(["Late interaction compares token vectors."], role="document")
print(model.similarity(queries, documents))
```

With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder"{trust})
vectors = model.encode_query(["what is late interaction?"])
```

{alone}{token_heads}"""

_ALONE = """\
With transformers alone (put the prompt before the text yourself):

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", padding_side="right")
model = AutoModel.from_pretrained("path/to/this/folder").eval()
tokens = tokenizer(["a text"], padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    states = model(**tokens).last_hidden_state
mask = tokens.attention_mask[..., None].float()
vectors = {pooled}
{head}```
"""


_ATTENDED = """\
This model has parts that only the Python package embedsmith knows; sentence-transformers loads it through that package.
See `embedding_config.json`.
"""


def _attention(found: Attention) -> str:
    """What the self-test showed."""
    if found.mode == "native":
        return ""
    kind = "causal" if found.mode == "causal" else "bidirectional"
    how = {"config": "by its config", "modules": "by flags on its modules", "mask4d": "by a mask of four dimensions"}
    left = f"; layers {', '.join(map(str, found.causal_layers))} stay causal" if found.causal_layers else ""
    return f" Attention is {kind} ({how.get(found.how, found.how)}{left}), proven on the model by a self-test."


def _token_heads(heads: Mapping[str, Head], with_files: bool) -> str:
    shown = {name: head for name, head in heads.items() if not head.own_pass}  # without what only pre-training reads
    if not shown:
        return ""
    made = {name: _MADE.get(name, "see its package") for name in shown}
    files = {name: f" (`{head.file}`)" if with_files else "" for name, head in shown.items()}
    rows = "\n".join(f"- `{name}`: {made[name]}{files[name]}" for name in shown)
    outputs = ", ".join(f'"{name}"' for name in ("dense", *shown))
    code = f'reps = model.represent(["a text"], role="document", outputs=({outputs}))'
    return f"\n## A text in other ways\n\n{rows}\n\n```python\n{code}\n```\n"


def _prompts(settings: Settings) -> str:
    if not any(settings.prompts.values()):
        return "None: texts go in as they are."
    shown = ((code(name), code(json.dumps(text, ensure_ascii=False))) for name, text in settings.prompts.items())
    rows = [row(*cells) for cells in shown]
    default = f"\n\nDefault: {code(settings.default_prompt)}." if settings.default_prompt else ""
    left_out = "" if settings.include_prompt else "\n\nPrompt tokens are attended to but left out of the pooling."
    return "\n".join(["| for | text put before every text |", "|---|---|", *rows]) + default + left_out
