"""Fused kernels of liger-kernel (extra `fast`): norms, rotations, SwiGLU and GeGLU as one kernel each, on CUDA.

They are used wherever liger knows the family, and kept where states and gradients of the model itself stay the same.
Liger also changes the family's code for all models to come: that is taken back, except that rotations of tensors on a
GPU go through liger's, since a layer finds that function by its name.
"""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.progress import log
from embedsmith.models.backbone import takes
from embedsmith.models.row_kernels import half_of
from embedsmith.models.self_test import (
    example_ids,
    first_layer_weight,
    gradients_agree,
    kernel_precision,
    states_agree,
    states_and_gradient,
)

ROTATION = "apply_rotary_pos_emb"
_FAILURES = (
    *(ImportError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError),
    *(AssertionError, OSError),
)


def fuse_kernels(backbone: Any) -> str:
    """Put liger's kernels into a backbone if they are installed, know it, and change nothing; says what was done.

    The backbone is left as it was where they fail; one line of the log says so.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance as apply
    except _FAILURES:  # not installed, or of another torch, triton or transformers
        return "off (liger-kernel is not installed)"
    name = type(backbone).__name__
    if backbone.config.model_type not in known:
        return f"off (liger-kernel does not know {name})"
    code = sys.modules[type(backbone).__module__]
    before_code = dict(vars(code))
    before = {module: dict(module.__dict__) for module in backbone.modules()}
    try:
        expected = _measured(backbone)
        apply(model=backbone, cross_entropy=False, fused_linear_cross_entropy=False)
        rotation = getattr(code, ROTATION, None)
        _restore_code(code, before_code, rotation)
        again: Any = _measured(backbone)
        agree = all(
            states_agree(backbone, state, found_state, dtype)
            and (pull is None or gradients_agree(backbone, pull, found_pull, dtype))
            for (state, pull, dtype), (found_state, found_pull, _) in zip(expected, again, strict=True)
        )
        reason = "its states or gradients differ" if not agree else None
    except _FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        log.info("fused kernels: on, liger-kernel, proven on this model")
        return "on (liger-kernel, proven on this model)"
    _restore_code(code, before_code, None)
    for module, attributes in before.items():
        module.__dict__.clear()
        module.__dict__.update(attributes)
    log.warning("fused kernels: off, liger-kernel does not fit %s: %s", name, reason)
    return f"off ({reason})"


def _restore_code(code: ModuleType, before: Mapping[str, Any], rotation: Any) -> None:
    """The family's module as it was; with a `rotation`, that one for tensors on a GPU."""
    for key, value in before.items():
        setattr(code, key, value)
    plain = before.get(ROTATION)
    if rotation is None or plain is None or rotation is plain or hasattr(plain, "fused"):
        return

    def rotate(query: Tensor, key: Tensor, *given: Any, **named: Any) -> Any:
        return (rotation if query.device.type != "cpu" else plain)(query, key, *given, **named)

    rotate.fused = True  # type: ignore[attr-defined]
    setattr(code, ROTATION, rotate)


def _measured(backbone: Any) -> list[tuple[Tensor, Tensor | None, torch.dtype | None]]:
    """States and a gradient of made-up texts, in the numbers of the weights and, where these are fp32, in 16 bits."""
    id_NT = example_ids(backbone, backbone.device)
    mask_NT = torch.ones_like(id_NT)
    arguments: dict[str, Any] = {"input_ids": id_NT, "attention_mask": mask_NT}
    arguments |= {"use_cache": False} if takes(backbone, "use_cache") else {}
    place_S = torch.arange(id_NT.numel(), device=id_NT.device)
    weight, was_training = first_layer_weight(backbone), backbone.training
    found: list[tuple[Tensor, Tensor | None, torch.dtype | None]] = []
    backbone.eval()
    try:
        with kernel_precision(backbone):
            found.append((*states_and_gradient(backbone, arguments, place_S, weight), None))
        if backbone.dtype == torch.float32:
            half = half_of(backbone.device)
            with torch.autocast(backbone.device.type, half):
                found.append((*states_and_gradient(backbone, arguments, place_S, weight), half))
    finally:
        backbone.train(was_training)
    return found
