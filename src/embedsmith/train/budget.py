"""How many tokens a step encodes at once on a card: measured on the model itself, and halved where memory runs out.

A card is fastest when a step is one chunk, so a chunk may be as large as memory allows. What a token takes is measured
once: a forward and backward pass of full-length texts at two sizes. Their difference is what a token costs, the rest is
what every step costs (gradients, weights cast to 16 bits); what the optimizer will hold is known beforehand.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from embedsmith.core.collectives import agreed_by_hosts
from embedsmith.core.errors import TrainingError
from embedsmith.core.progress import log
from embedsmith.core.seeds import TorchRandom
from embedsmith.core.tokens import IntArray
from embedsmith.train.step import Memory

SHARE = 0.8
"""Of the memory that is left, what encoding may take: the rest is for representations, the loss and fragments."""

SHARE_OF_ONE_TRY = 0.6
"""The same where a step that runs out of memory cannot be begun anew."""

PROBE_TOKENS = 2048
"""Tokens of the smaller probe: enough that what every step costs is not most of it."""

WORTH = 65536
"""Padded tokens that keep a card busy for longer than the launches of a chunk take: from so many on a chunk ends where
texts get shorter. It saves padding, and means nothing where no padding is computed."""

Probe = Callable[[int], int]
"""A forward and backward pass of so many texts of full length; returns their tokens."""


class Card(Protocol):
    """A device whose memory bounds what is encoded at once."""

    @property
    def name(self) -> str: ...

    def free(self) -> int:
        """Bytes that could be allocated now, once what is cached is given back."""
        ...

    def peak(self, act: Callable[[], object]) -> int:
        """Bytes that an act allocated at most, beyond what was allocated before."""
        ...


@dataclass(frozen=True)
class CudaCard:
    """One CUDA card, as this process sees it."""

    device: torch.device

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def free(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, act: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        act()
        return torch.cuda.max_memory_allocated(self.device) - before


def card_of(device: torch.device) -> Card | None:
    """The card of a device; `None` for one whose memory is not told apart from the machine's."""
    return CudaCard(device) if device.type == "cuda" else None


def measured_budget(card: Card, probe: Probe, longest: int, held: int, *, repeats: bool = True) -> int:
    """Tokens whose graphs fit on the card beside `held` bytes that are not allocated yet. `longest`: tokens of a text
    of full length. `repeats`: whether a step that lacks memory can be begun anew; where it cannot, the probe is not
    tried again either: its passes may be collectives, which other ranks wait in. Collective: the smallest of all ranks.
    The random state stays as it was.

    Errors: `TrainingError` for a card that cannot take one such text.
    """
    random, few = TorchRandom.capture(), max(PROBE_TOKENS // longest, 1)
    share = SHARE if repeats else SHARE_OF_ONE_TRY
    own = 0
    try:
        own = _measured(card, probe, few, held, share)
    except torch.OutOfMemoryError as error:
        if not repeats:
            raise too_small(card, longest) from error
    if repeats and own < longest and few > 1:
        with suppress(torch.OutOfMemoryError):
            own = _measured(card, probe, 1, held, share)
    random.restore()
    budget = -agreed_by_hosts(-own)
    if budget < longest:
        raise too_small(card, longest)
    if budget < own:
        log.info("%s: up to %s tokens at once, as another rank has room for no more", card.name, f"{budget:,}")
    return budget


def _measured(card: Card, probe: Probe, few: int, held: int, share: float) -> int:
    probe(few)  # kernels are loaded, and their workspaces allocated
    tokens: list[int] = []
    peaks = [card.peak(lambda rows=rows: tokens.append(probe(rows))) for rows in (few, 2 * few)]  # type: ignore[misc]
    of_a_token = max((peaks[1] - peaks[0]) / max(tokens[1] - tokens[0], 1), 1.0)
    fixed = max(peaks[0] - of_a_token * tokens[0], 0.0)
    free = card.free()
    budget = int(share * (free - fixed - held) / of_a_token)
    log.info(
        "%s: %.1f GB free, %.1f GB for every step and %.2f MB a token: up to %s tokens at once",
        card.name,
        free / 1e9,
        (fixed + held) / 1e9,
        of_a_token / 1e6,
        f"{max(budget, 0):,}",
    )
    return budget


def too_small(card: Card, longest: int) -> TrainingError:
    """What to say where not even one text fits."""
    return TrainingError(
        f"{card.name} has too little memory to train on one text of {longest:,} tokens",
        fix="set model.gradient_checkpointing=true, a smaller model.max_length, train.precision=bf16 or an adapter "
        "(model.lora); or use a card with more memory, or several with train.shard=true",
    )


def halved(memory: Memory, length_N: IntArray, card: Card) -> Memory:
    """What to keep in memory after a step of texts of such lengths ran out of it: half of what it took. Collective.

    Errors: `TrainingError` where texts were encoded one by one already.
    """
    longest = agreed_by_hosts(int(length_N.max(initial=1)))
    whole = agreed_by_hosts(sum(chunk.tokens for chunk in memory.plan(length_N)))
    taken = min(memory.chunk_tokens, whole, *([] if memory.kept_tokens is None else [memory.kept_tokens]))
    if taken <= longest:
        raise too_small(card, longest)
    return at_most(memory, max(taken // 2, longest))


def at_most(memory: Memory, tokens: int) -> Memory:
    """So many tokens at once, and as many whose graph is kept."""
    return replace(memory, chunk_tokens=tokens, kept_tokens=tokens, least_tokens=WORTH)
