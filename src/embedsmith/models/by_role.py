"""Two models behind one: queries through the one, documents through the other, in the order in which they came."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.encoder import Role
from embedsmith.core.reps import Representation
from embedsmith.core.tokens import PaddedTokens, TokenBatch
from embedsmith.models.tokenize import Instruction

Tokenize = Callable[[Sequence[str], Role, Instruction], TokenBatch]
Represent = Callable[[PaddedTokens], Mapping[str, Representation]]


def tokenized(
    readers: Mapping[Role, Tokenize], texts: Sequence[str], roles: Sequence[Role], instruction: Instruction
) -> TokenBatch:
    """Every text by the tokenizer of its role's model."""
    parts, places = [], []
    for role in dict.fromkeys(roles):
        rows = [row for row, own in enumerate(roles) if own == role]
        given = instruction if instruction is None or isinstance(instruction, str) else [instruction[n] for n in rows]
        parts.append(readers[role]([texts[row] for row in rows], role, given))
        places += rows
    if len(parts) == 1:
        return parts[0]
    return TokenBatch.concatenate(parts).take(np.argsort(places, kind="stable"))


def represented(models: Mapping[Role, tuple[Represent, int]], padded: PaddedTokens) -> dict[str, Representation]:
    """Every text by its role's model, which comes with the id of its padding."""
    pieces: list[Mapping[str, Representation]] = []
    places: list[Tensor] = []
    for role, (represent, pad_id) in models.items():
        row_R = (padded.is_query_N if role == "query" else ~padded.is_query_N).nonzero()[:, 0]
        if len(row_R):
            mask_RT = padded.mask_NT[row_R]
            id_RT = padded.id_NT[row_R].masked_fill(~mask_RT, pad_id)
            pieces.append(represent(PaddedTokens(id_RT, mask_RT, padded.body_NT[row_R], padded.is_query_N[row_R])))
            places.append(row_R)
    order_N = torch.cat(places).argsort()
    return {name: rep.of_pieces([piece[name] for piece in pieces], order_N) for name, rep in pieces[0].items()}
