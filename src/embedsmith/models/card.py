"""The model card written beside a saved model: what it is, its prompts, and how to load it anywhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from embedsmith.models.contract import contract_of
from embedsmith.models.token_heads import head_file

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder

_POOLED = {
    "cls": "states[:, 0]",
    "mean": "(states * mask).sum(1) / mask.sum(1)",
    "weighted_mean": "(states * mask * mask.cumsum(1)).sum(1) / (mask * mask.cumsum(1)).sum(1)",
    "last": "states[torch.arange(len(states)), tokens.attention_mask.sum(1) - 1]",
    "max": "states.masked_fill(mask == 0, float('-inf')).amax(1)",
}

_TOKEN_HEADS = {"sparse": "`sparse`: a weight a token", "multivector": "`multivector`: a vector a token"}

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


def model_card(model: Embedder) -> str:
    """Markdown with the metadata block that model hubs read."""
    settings = model.settings
    normalise = "vectors = torch.nn.functional.normalize(vectors, dim=-1)\n" if settings.normalize else ""
    if len(model.projections):
        normalise = "# the layers in the folders *_Dense come next, then normalisation; see modules.json\n"
    plain = _ALONE.format(max_length=settings.max_length, pooled=_POOLED.get(settings.pooling, ""), head=normalise)
    standard = contract_of(model).standard
    return _CARD.format(
        alone=plain if standard else _ATTENDED,
        trust="" if standard else ", trust_remote_code=True",
        attention=_attention(model),
        architecture=type(model.backbone).__name__,
        pooling=settings.pooling.replace("_", " "),
        max_length=settings.max_length,
        dimension=model.dimension,
        normalised=", normalised to length 1" if settings.normalize else "",
        prompts=_prompts(model),
        token_heads=_token_heads(model),
    )


_ATTENDED = """\
This model has parts that only embedsmith (`pip install embedsmith`) knows; sentence-transformers loads it through that
package. See `embedding_config.json`.
"""


def _attention(model: Embedder) -> str:
    """What the self-test showed."""
    found = model.attention
    if found.mode == "native":
        return ""
    kind = "causal" if found.mode == "causal" else "bidirectional"
    how = {"config": "by its config", "modules": "by flags on its modules", "mask4d": "by a mask of four dimensions"}
    left = f"; layers {', '.join(map(str, found.causal_layers))} stay causal" if found.causal_layers else ""
    return f" Attention is {kind} ({how.get(found.how, found.how)}{left}), proven on the model by a self-test."


def _token_heads(model: Embedder) -> str:
    names = [name for name in model.token_heads if name in _TOKEN_HEADS]  # without what only pre-training reads
    if not names:
        return ""
    rows = "\n".join(f"- {_TOKEN_HEADS[name]} (`{head_file(name, model.token_heads[name])}`)" for name in names)
    outputs = ", ".join(f'"{name}"' for name in ("dense", *names))
    code = f'reps = model.represent(["a text"], role="document", outputs=({outputs}))'
    return f"\n## A text in other ways\n\n{rows}\n\n```python\n{code}\n```\n"


def _prompts(model: Embedder) -> str:
    settings = model.settings
    if not any(settings.prompts.values()):
        return "None: texts go in as they are."
    rows = [f"| `{name}` | `{json.dumps(text, ensure_ascii=False)}` |" for name, text in settings.prompts.items()]
    default = f"\n\nDefault: `{settings.default_prompt}`." if settings.default_prompt else ""
    left_out = "" if settings.include_prompt else "\n\nPrompt tokens are attended to but left out of the pooling."
    return "\n".join(["| for | text put before every text |", "|---|---|", *rows]) + default + left_out
