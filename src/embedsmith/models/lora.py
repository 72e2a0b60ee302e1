"""Low-rank adapters through peft: LoRA, rsLoRA, DoRA, QLoRA.

Adapters are injected into the backbone in place, so it keeps its class and the heads stay trainable beside it. A
checkpoint holds the adapter alone (peft's files, which transformers reads too); a finished model is merged.
"""

import copy
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from embedsmith.core.errors import MissingExtraError, ModelError, foreign_errors
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.settings import Positive, Share, Width, section
from embedsmith.models.folder import AdapterFile, read_typed
from embedsmith.models.self_test import example_ids, kernel_precision, layers_of

ADAPTER = "adapter_config.json"
SAME = 0.9999
_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_PREFIX = "base_model.model."
_NOT_ADAPTED = {"gate", "router", "shared_expert_gate", "lm_head"}
"""Routers decide, they do not represent: adapting them, or layers in them, unsettles a mixture of experts."""
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


def add_adapter(backbone: Any, config: LoraConfig) -> None:
    """New adapters; everything else in the backbone is frozen. Errors: `ModelError` where nothing fits."""
    from peft import LoraConfig as PeftConfig

    targets = auto_targets(backbone) if config.targets == "auto" else list(config.targets)
    if not targets:
        raise ModelError(f"{type(backbone).__name__} has no linear layer that could be adapted")
    layers = layers_of(backbone)
    reached = sum(any(path.rpartition(".")[2] in targets for path in _linear_paths(layer)) for layer in layers)
    if 2 * reached < len(layers):  # names that exist in fewer than half of the layers are another family's
        raise ModelError(
            f"the targets {', '.join(targets)} are found in {reached} of {len(layers)} layers",
            expected=f"linear layers of {type(backbone).__name__}: {', '.join(auto_targets(backbone))}",
            fix="set model.lora.targets=auto",
        )
    experts = expert_weights(backbone) if config.experts else []
    peft_config = PeftConfig(
        task_type="FEATURE_EXTRACTION",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0 if experts else config.dropout,  # peft has no dropout for bare weights
        bias=config.bias,
        target_modules=targets,
        target_parameters=experts or None,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
    )
    _inject(backbone, peft_config)


def _inject(backbone: Any, peft_config: Any, as_named: bool = True) -> None:
    """`as_named`: on the layers with these names. peft takes `gate_proj` and its like in a mixture for those of single
    experts, as transformers 4 had them, and would adapt the weights of all experts in place of the dense and shared
    layers that have these names today."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import transformers_weight_conversion as conversion

    kept = mock.patch.object(conversion, "convert_peft_config_for_transformers") if as_named else nullcontext()
    with warnings.catch_warnings(), transformers_silenced(), kept:
        warnings.simplefilter("ignore")  # about GPT-2's transposed layers, which peft then sets right by itself
        inject_adapter_in_model(peft_config, backbone)
        cast_adapter_dtype(backbone, _NAME)  # in bf16, as the frozen weights may be, it would barely move
    backbone.peft_config = {_NAME: peft_config}


def auto_targets(backbone: Any) -> list[str]:
    """Names of the linear layers inside the transformer's layers, without routers; MLA's factors included, as are the
    dense and shared layers of a mixture."""
    paths = [path.split(".") for layer in layers_of(backbone) for path in _linear_paths(layer)]
    return sorted({path[-1] for path in paths if _NOT_ADAPTED.isdisjoint(path)})


def expert_weights(backbone: Any) -> list[str]:
    """Weights of experts, which transformers keep as one tensor [E, out, in] for all experts of a layer."""
    found = {
        ".".join(name.split(".")[-2:])
        for layer in layers_of(backbone)
        for name, parameter in layer.named_parameters()
        if parameter.dim() == 3 and "experts" in name
    }
    return sorted(found)


def _linear_paths(layer: nn.Module) -> list[str]:
    # GPT-2's Conv1D is a linear layer with its weight lying the other way
    return [name for name, m in layer.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def has_adapter(backbone: Any) -> bool:
    return _NAME in getattr(backbone, "peft_config", {})


def base_facts(backbone: Any) -> dict[str, Any]:
    """Tells one base from another: its shape, and a hash of some of its frozen numbers. Equal with and without an
    adapter in it."""
    sample = backbone.get_input_embeddings().weight.detach()[:64].float().cpu().numpy().tobytes()
    config = backbone.config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "embeddings": hashlib.sha256(sample).hexdigest()[:16],
    }


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

    mine = base_facts(backbone)
    if base is not None and (different := [key for key in mine if base.get(key) != mine[key]]):
        raise ModelError(
            "this adapter belongs to another base: "
            + ", ".join(f"{k} {base.get(k)}, not {mine[k]}" for k in different),
            where=folder,
            expected=f"the base it was trained on ({base.get('path')})",
            fix="put that model back, or say where it is with model.base=FOLDER",
        )
    read_typed(AdapterFile, folder / ADAPTER)
    with foreign_errors("cannot load the adapter", folder):
        state = load_file(folder / _WEIGHTS)
        peft_config = PeftConfig.from_pretrained(str(folder))
        peft_config.inference_mode = False
        _inject(backbone, peft_config, as_named=not any(map(_OF_ONE_EXPERT.search, state)))
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
