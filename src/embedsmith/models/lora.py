"""Low-rank adapters through peft: LoRA, rsLoRA, DoRA, QLoRA.

Adapters are injected into the backbone in place, so it keeps its class and the heads stay trainable beside it. A
checkpoint holds the adapter alone (peft's files, which transformers reads too); a finished model is merged.
"""

import copy
import importlib.util
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from embedsmith.core.errors import MissingExtraError, ModelError, foreign_errors
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.settings import Positive, Share, Width, section
from embedsmith.models.folder import AdapterFile, read_folder_file
from embedsmith.models.new_tokens import grow_table
from embedsmith.models.self_test import example_ids, kernel_precision, layers_of

ADAPTER = "adapter_config.json"
SAME = 0.9999
_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_PREFIX = "base_model.model."
_NOT_ADAPTED = {"gate", "router", "shared_expert_gate", "indexer", "lm_head"}
"""Routers of experts and indexers of sparse attention decide, they do not represent: adapting them, or layers in them,
unsettles a mixture, and an indexer has no gradient."""
_SAMPLED = 64
"""Of how many weights of its base an adapter remembers numbers."""
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class UnmergedError(ModelError):
    """Weights with their adapter merged would not give the same vectors: 16 bits are too few for what it adds."""


@section
@dataclass(frozen=True)
class LoraConfig:
    """Adapters instead of full fine-tuning. Their learning rate wants to be higher: 1e-4 rather than 1e-5.

    `r`: rank of the adapters.
    `alpha`: what they add is scaled by alpha / r.
    `dropout`: share of an adapter's inputs that are dropped while training.
    `targets`: `auto` (every linear layer inside the transformer's layers but routers), or names of linear layers.
    `experts`: also adapts the three-dimensional weights of a mixture's experts.
    `kind`: `lora`, `rslora` (scaled by alpha / sqrt(r)), `dora` (direction and length apart).
    `bias`: which biases are trained: `none`, `all`, or `lora_only`, those of adapted layers.
    `four_bit`: the frozen backbone in 4 bits (QLoRA).
    """

    r: Width = 16
    alpha: Positive = 32
    dropout: Share = 0.05
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    experts: bool = False
    kind: Literal["lora", "rslora", "dora"] = "lora"
    bias: Literal["none", "all", "lora_only"] = "none"
    four_bit: bool = False


def check_installed(config: LoraConfig | None) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    if config is not None and config.four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora")


def four_bit_loading(compute: torch.dtype) -> Any:
    """How transformers loads a backbone in 4 bits: normal-float, doubly quantised (QLoRA)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_trainable(backbone: Any) -> None:
    """On CPUs with bf16 instructions bitsandbytes packs a layer's weights when it first runs in eval mode, and what
    runs packed has no gradient, without a word. The self-test of attention runs every layer in eval mode."""
    from bitsandbytes.nn import Linear4bit

    for module in backbone.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def add_adapter(backbone: Any, config: LoraConfig, new_ids: Sequence[int] = ()) -> None:
    """New adapters on exactly the layers that the config names; everything else in the backbone is frozen, but the
    embeddings of new tokens (`new_ids`). Errors: `ModelError` where nothing fits."""
    from peft import LoraConfig as PeftConfig

    paths = _auto_paths(backbone, config.experts)
    if config.targets != "auto":
        paths = _named_paths(backbone, config.targets)
    if not paths:
        raise ModelError(f"{type(backbone).__name__} has no linear layer that could be adapted")
    experts = expert_weights(backbone) if config.experts else []
    words = next(name for name, module in backbone.named_modules() if module is backbone.get_input_embeddings())
    peft_config = PeftConfig(
        task_type="FEATURE_EXTRACTION",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0 if experts else config.dropout,  # peft has no dropout for bare weights
        bias=config.bias,
        target_modules=paths,
        target_parameters=experts or None,
        trainable_token_indices={words: list(new_ids)} if new_ids else None,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
    )
    _inject(backbone, peft_config)


def _named_paths(backbone: Any, names: Sequence[str]) -> list[str]:
    """The linear layers that are called by one of these names: their own, or the end of their path.

    Errors: `ModelError` where fewer than half of the transformer's layers have any: the names are another family's.
    """

    def named(path: str, name: str) -> bool:
        return f".{path}".endswith(f".{name}")

    layers = layers_of(backbone)
    reached = sum(any(named(path, name) for path in _linear_paths(layer) for name in names) for layer in layers)
    if 2 * reached < len(layers):
        raise ModelError(
            f"the targets {', '.join(names)} are found in {reached} of {len(layers)} layers",
            expected=f"linear layers of {type(backbone).__name__}: {', '.join(auto_targets(backbone))}",
            fix="set model.lora.targets=auto",
        )
    everywhere = _linear_paths(backbone)
    if absent := [name for name in names if not any(named(path, name) for path in everywhere)]:
        log.warning("lora.targets: %s has no linear layer %s", type(backbone).__name__, ", ".join(absent))
    return [path for path in everywhere if any(named(path, name) for name in names)]


class _NoFamily(nn.Module):
    """A backbone as peft sees a model of a family that it does not know: without a config. It would take `gate_proj`
    and its like in a mixture for those of single experts, as transformers 4 had them, and adapt the weights of all
    experts in place of the dense and shared layers that have these names today."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.is_loaded_in_4bit = getattr(backbone, "is_loaded_in_4bit", False)  # by which peft knows QLoRA


def _inject(backbone: Any, peft_config: Any, as_named: bool = True) -> None:
    """`as_named`: on the layers with these names, which is not what peft does in a family that it knows."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    with warnings.catch_warnings(), transformers_silenced():
        warnings.simplefilter("ignore")  # about GPT-2's transposed layers, which peft then sets right by itself
        inject_adapter_in_model(peft_config, _NoFamily(backbone) if as_named else backbone)
        cast_adapter_dtype(backbone, _NAME)  # in bf16, as the frozen weights may be, it would barely move
    backbone.peft_config = {_NAME: peft_config}


def auto_targets(backbone: Any) -> list[str]:
    """Names of the linear layers inside the transformer's layers, without routers; MLA's factors included, as are the
    dense and shared layers of a mixture."""
    return sorted({path.rpartition(".")[2] for path in _auto_paths(backbone)})


def _auto_paths(backbone: Any, experts: bool = False) -> list[str]:
    inside = {id(module) for layer in layers_of(backbone) for module in layer.modules()}
    left_out = _NOT_ADAPTED | (set() if experts else {"experts"})  # a few families have a module for each
    paths = (path for path in _linear_paths(backbone) if id(backbone.get_submodule(path)) in inside)
    return [path for path in paths if left_out.isdisjoint(path.split("."))]


def expert_weights(backbone: Any) -> list[str]:
    """Weights of experts, which transformers keep as one tensor [E, out, in] for all experts of a layer."""
    found = {
        ".".join(f"{path}.{name}".split(".")[-2:])
        for layer in layers_of(backbone)
        for path, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and ("experts" in path or "Experts" in type(module).__name__)
    }
    return sorted(found)


def _linear_paths(module: nn.Module) -> list[str]:
    # GPT-2's Conv1D is a linear layer with its weight lying the other way
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def has_adapter(backbone: Any) -> bool:
    return _NAME in getattr(backbone, "peft_config", {})


def base_facts(backbone: Any) -> dict[str, Any]:
    """Tells one base from another: its shape, and some of its frozen numbers by the names of their weights. Equal with
    and without an adapter in it."""
    config = backbone.config.get_text_config()
    frozen = {
        re.sub(r"\.(base_layer|token_adapter)(?=\.)", "", name): weight.detach()
        for name, weight in backbone.named_parameters()
        if not re.search(r"\.(lora_|trainable_tokens_)", name)
    }
    some = {name: frozen[name] for name in list(frozen)[:: -(-len(frozen) // _SAMPLED)]}
    numbers = {n: one.flatten()[:100:37].float().tolist() for n, one in some.items() if one.is_floating_point()}
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "numbers": numbers,  # of weights in 4 bits there are none
    }


def _changed(base: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What differs between the base of an adapter and the one at hand, whose weights may be of another dtype."""
    found = [
        f"{key} {base.get(key)}, not {mine[key]}"
        for key in ("model_type", "hidden_size", "num_hidden_layers")
        if base.get(key) != mine[key]
    ]
    rounding = 0.0 if base.get("dtype") == mine["dtype"] else 2.0**-7

    def same(theirs: Sequence[float], here: Sequence[float]) -> bool:
        near = (math.isclose(a, b, rel_tol=rounding, abs_tol=rounding * 1e-4) for a, b in zip(theirs, here))
        return len(theirs) == len(here) and all(near)

    known = {} if found else base.get("numbers", {})
    found += [f"{n} is changed" for n in known if n in mine["numbers"] and not same(known[n], mine["numbers"][n])]
    return found


def save_adapter(backbone: Any, folder: Path, base: str) -> None:
    """peft's two files; `base` is where the backbone was loaded from."""
    from peft import get_peft_model_state_dict

    peft_config = copy.deepcopy(backbone.peft_config[_NAME])
    peft_config.base_model_name_or_path = base
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(backbone, adapter_name=_NAME, save_embedding_layers=False)
    save_file({_PREFIX + name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / _WEIGHTS)


def load_adapter(backbone: Any, folder: Path, base: Mapping[str, Any] | None) -> None:
    """Put the adapter of `folder` into its base. Errors: `ModelError` for an adapter of another base, or damaged."""
    from peft import PeftConfig, set_peft_model_state_dict

    if base is not None and (different := _changed(base, base_facts(backbone))):
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ModelError(
            f"this adapter belongs to another base: {', '.join(different[:3])}{more}",
            where=folder,
            expected=f"the base it was trained on ({base.get('path')})",
            fix="put that model back, or say where it is with model.base=FOLDER",
        )
    read_folder_file(AdapterFile, folder / ADAPTER)
    with foreign_errors("cannot load the adapter", folder):
        state = load_file(folder / _WEIGHTS)
        peft_config = PeftConfig.from_pretrained(str(folder))
        peft_config.inference_mode = False
        foreign = isinstance(peft_config.target_modules, str) or any(map(_OF_ONE_EXPERT.search, state))
        _inject(backbone, peft_config, as_named=not foreign)
        plain = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        report = set_peft_model_state_dict(backbone, plain, adapter_name=_NAME)
    if report.unexpected_keys:
        raise ModelError(
            f"the adapter has weights with no place in its base: {report.unexpected_keys[0]}, ...", where=folder
        )


def transplanted(backbone: Any, plain: Any) -> Any:
    """`plain`, the same base at full precision, with a copy of the adapter of `backbone`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(backbone, adapter_name=_NAME, save_embedding_layers=False)
    with torch.no_grad():  # with the rows of new tokens; a table is not quantised
        table_VH = backbone.get_input_embeddings().weight
        grow_table(plain, len(table_VH))
        plain.get_input_embeddings().weight.copy_(table_VH)
    _inject(plain, copy.deepcopy(backbone.peft_config[_NAME]))
    set_peft_model_state_dict(plain, {name: t.detach().cpu() for name, t in state.items()}, adapter_name=_NAME)
    return plain.eval()


def merged(backbone: Any) -> Any:
    """A copy of the backbone with its adapter added to the weights, in the same class and without traces of peft.

    Errors: `UnmergedError` when the copy does not give the same states (cosine not above 0.9999).
    """
    was_training = backbone.training
    backbone.eval()
    whole = _merge_layers(copy.deepcopy(backbone))
    id_NT = example_ids(backbone, next(backbone.parameters()).device)
    with torch.no_grad(), kernel_precision(backbone):
        before, after = (model(input_ids=id_NT).last_hidden_state.float() for model in (backbone, whole))
    backbone.train(was_training)
    cosine = float(F.cosine_similarity(before, after, dim=-1).min())
    if not cosine > SAME:
        raise UnmergedError(
            f"merging the adapter changes the states: cosine {cosine:.6f}",
            expected=f"above {SAME}",
            fix="train with model.dtype=float32, or keep the adapter apart: save(folder, merge=False)",
        )
    log.info("adapter merged; lowest cosine of a token's state to the unmerged model: %.7f", cosine)
    return whole


def _merge_layers(whole: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in list(whole.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            parent, _, leaf = name.rpartition(".")
            table = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            setattr(whole.get_submodule(parent), leaf, table)
    adapted = {name: module for name, module in whole.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, outermost in adapted.items():
        if any(name.startswith(f"{other}.") for other in adapted):
            continue
        layer: Any = outermost
        inner = outermost.get_base_layer()
        stored = next(inner.parameters()).dtype
        inner.float()  # so that weights of 16 bits are rounded once, with the adapter in them
        while isinstance(layer, BaseTunerLayer):  # the weights of experts have a wrapper each, one in the other
            layer.merge(safe_merge=True)
            layer = layer.base_layer
        inner.to(stored)
        parent, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(parent), leaf, layer)
    del whole.peft_config
    return whole.requires_grad_(True)
