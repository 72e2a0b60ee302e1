"""Adapters in every mixture of experts that the installed transformers has: on the layers named, and nowhere else."""

import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from embedsmith.core.errors import ModelError
from embedsmith.models.lora import LoraConfig, add_adapter
from tests.models.families import ALL_MIXTURES, MIXTURES, tiny

DECIDING = {"gate", "router", "shared_expert_gate", "indexer"}
REFERENCE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model):
    names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    return {name.replace(".base_layer", "") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in ALL_MIXTURES if name in CONFIG_MAPPING])
def test_adapters_lie_on_the_layers_named_in_every_mixture(family):
    """Whatever peft knows of a family, and whatever its modules are called; shapes without numbers are enough."""
    for targets, experts in (("auto", True), (REFERENCE, False)):
        with torch.device("meta"):
            backbone = tiny(family, "eager")
        linear = {name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)}
        wanted = {name for name in linear if re.search(r"layers\.\d", name) and DECIDING.isdisjoint(name.split("."))}
        held = {
            path
            for path, module in backbone.named_modules()
            for one in module.parameters(recurse=False)
            if one.dim() == 3 and ("experts" in path or "Experts" in type(module).__name__)
        }
        assert held, family
        if targets == REFERENCE:
            wanted, held = {name for name in linear if name.rpartition(".")[2] in targets}, set()
            if not wanted:  # JetMoE's layers have other names
                with pytest.raises(ModelError, match="are found in 0 of"):
                    add_adapter(backbone, LoraConfig(targets=targets))
                return
        add_adapter(backbone, LoraConfig(r=2, dropout=0.0, targets=targets, experts=experts))
        assert adapted(backbone) == wanted | held, targets


def test_the_list_of_mixtures_is_whole_enough():
    assert set(MIXTURES) < set(ALL_MIXTURES)
    assert {"olmoe", "gpt_oss", "deepseek_v32"} < set(ALL_MIXTURES)
