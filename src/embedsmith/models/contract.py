"""`embedding_config.json`: what a saved model is that the layout of sentence-transformers has no place for.

Written only when there is something to say. Who does not read it still gets the right vectors from the standard files
where those can express the model; where they cannot, `modules.json` names the module in `sentence.py` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse, section
from embedsmith.core.registry import to_plain
from embedsmith.models.attention import Attention
from embedsmith.models.poolers import PoolerConfig

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder

FILE = "embedding_config.json"
POOLER_FILE = "1_Pooling/pooler.safetensors"


@section
@dataclass(frozen=True)
class Contract:
    """`pooling` and `pooler`: a pooling with weights. `eos_id`: the token put behind every text. `templates`: see
    prompts.py. `echo`: the text with which a text is said twice. `pool_special_tokens`: bos and its like take part in
    the pooling. `base`: what an adapter belongs to. `modules`: the modules where modules.json names sentence.py's."""

    version: int = 1
    attention: Attention = Attention()
    pooling: str | None = None
    pooler: PoolerConfig | None = None
    eos_id: int | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    echo: str | None = None
    pool_special_tokens: bool = True
    base: Mapping[str, Any] | None = None
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def standard(self) -> bool:
        """Whether standard files alone give the same vectors in sentence-transformers."""
        plain = self.pooling is None and self.echo is None and self.pool_special_tokens and self.base is None
        return plain and self.attention.in_config


def contract_of(model: Embedder, apart: bool = False) -> Contract:
    """What the standard files cannot say of this model. `apart`: its adapter stays apart from its base."""
    settings = model.settings
    trained = model.pooler is not None
    natural = model.attention.mode == "native"
    return Contract(
        attention=Attention() if natural else model.attention,
        pooling=settings.pooling if trained else None,
        pooler=model.pooler_config if trained else None,
        eos_id=settings.eos_id,
        templates=settings.templates,
        echo=settings.echo,
        pool_special_tokens=settings.pool_special_tokens,
        base=model.base if apart else None,
    )


def read_contract(folder: Path) -> Contract:
    """Errors: `ModelError` for a file that is not JSON, has unknown keys, or is of a newer version."""
    path = folder / FILE
    if not path.exists():
        return Contract()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.get("version", 1) > 1:
            raise ModelError(f"version {tree['version']}", where=path, expected="1", fix="install a newer embedsmith")
        return parse(Contract, tree, where=str(path))
    except (OSError, ValueError, RecipeError) as error:
        raise ModelError(f"cannot read this file: {error}", where=path) from error


def write_contract(contract: Contract, folder: Path) -> None:
    """Nothing for a model that has nothing to say. A schedule of training is over: softmask is bidirectional."""
    if contract.attention.mode == "softmask":
        contract = replace(contract, attention=replace(contract.attention, mode="bidirectional"))
    if contract == Contract():
        return
    tree = json.dumps(to_plain(contract), indent=2, ensure_ascii=False)
    (folder / FILE).write_text(tree + "\n", encoding="utf-8")
