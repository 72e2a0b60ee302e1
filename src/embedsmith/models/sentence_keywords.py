"""The keywords of sentence-transformers' `encode`, for callers who come from there: done, or told what to use here."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from embedsmith.core.device import device_named
from embedsmith.core.errors import ModelError
from embedsmith.core.quantize import quantize
from embedsmith.core.settings import did_you_mean
from embedsmith.models.config import ROLE_NAMES

KNOWN = (
    *("batch_size", "convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "output_value"),
    *("prompt", "prompt_name", "show_progress_bar", "truncate_dim"),
)
INSTEAD = {
    "chunk_size": "leave it out: chunks follow from the lengths of the texts",
    "pool": "encode files in several processes: embedsmith encode FILES OUT --model MODEL --processes 4",
    "sentences": "give the texts as the first argument: model.encode(texts)",
    "inputs": "give the texts as the first argument: model.encode(texts)",
}


def encode_with(model: Any, texts: str | Sequence[str], options: Mapping[str, Any], keywords: Mapping[str, Any]) -> Any:
    """`model.encode(texts, **options)` under keywords of sentence-transformers. An array; a tensor on the model's
    device with `convert_to_tensor`; a list of tensors with `convert_to_numpy=False` alone.

    Errors: `ModelError` naming what to use instead of a keyword that means nothing here.
    """
    _refuse(model, keywords)
    given, precision = dict(options), options["precision"]
    if "show_progress_bar" in keywords:
        given["show_progress"] = keywords["show_progress_bar"]
    if keywords.get("truncate_dim") is not None:
        given["dim"] = keywords["truncate_dim"]
    if keywords.get("batch_size") is not None:  # the memory that so many of the longest texts take
        given["token_budget"] = keywords["batch_size"] * model.max_length
    reader = _with_prompt(model, given, keywords)
    if keywords.get("normalize_embeddings") and not model.settings.normalize:
        vector_ND = torch.from_numpy(reader.encode(texts, **{**given, "precision": "float32"}))
        made = quantize(torch.atleast_2d(F.normalize(vector_ND, dim=-1)).numpy(), precision, options["ranges"])
        made = made[0] if isinstance(texts, str) else made
    else:
        made = reader.encode(texts, **given)
    if keywords.get("convert_to_tensor"):
        return torch.from_numpy(made).to(model.device)
    if not keywords.get("convert_to_numpy", True):
        return torch.from_numpy(made) if isinstance(texts, str) else list(torch.from_numpy(made))
    return made


def _refuse(model: Any, keywords: Mapping[str, Any]) -> None:
    for name in keywords:
        if name not in KNOWN:
            hint = did_you_mean(name, (*KNOWN, "dim", "instruction", "role", "task", "token_budget"))
            raise ModelError(f"encode has no keyword {name!r}{hint}", fix=INSTEAD.get(name))
    if keywords.get("output_value", "sentence_embedding") != "sentence_embedding":
        raise ModelError(
            f"output_value={keywords['output_value']!r}",
            expected="sentence_embedding",
            fix='ask for states of tokens with model.represent(texts, role="document", outputs=("tokens",))',
        )
    size = keywords.get("batch_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ModelError(f"batch_size is {size!r}", expected="a whole number from 1")
    device = keywords.get("device")
    if isinstance(device, list | tuple):
        raise ModelError("encode works on one device", fix=INSTEAD["pool"])
    if device is not None and device_named(device).type != model.device.type:
        raise ModelError(
            f"the model is on {model.device}, and device={str(device)!r} is asked for",
            fix=f"move it first: model.to({str(device)!r}), or embedsmith.load(FOLDER, device={str(device)!r})",
        )


def _with_prompt(model: Any, given: dict[str, Any], keywords: Mapping[str, Any]) -> Any:
    """The model, with the prompt that is asked for in front of every text. A role's name in `prompt_name` is that role.

    Errors: `ModelError` for a name that the model has no prompt of.
    """
    prompt, name = keywords.get("prompt"), keywords.get("prompt_name")
    prompts = model.settings.prompts
    if prompt is None and name is not None:
        role = next((role for role, names in ROLE_NAMES.items() if name in names), None)
        if name not in prompts and role is None:
            raise ModelError(
                f"the model has no prompt {name!r}{did_you_mean(name, prompts)}",
                expected=f"one of {', '.join(prompts)}" if prompts else "query or document: it has no prompts",
                fix='give the text itself: model.encode(texts, prompt="...")',
            )
        if name not in prompts:
            given["role"] = role
            return model
        prompt = prompts[name]
    if prompt is None:
        return model
    prompted = copy.copy(model)  # the same weights
    prompted.settings = model.settings.with_prompts({"query": prompt, "document": prompt})
    given["task"] = None
    return prompted
