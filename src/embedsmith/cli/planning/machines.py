"""The machines of a plan: cards with their arithmetic and memory, nodes of them, and what is known of disk and network.

The figures of cards are those of their makers' data sheets: dense products of 16 bits, without sparsity (half of what
a sheet gives with it), memory in units of 10^9, and half of what a sheet gives for both ways of a link. NVIDIA: A10,
A100, H100 (SXM and PCIe), H200, L4, L40S, T4, V100 (SXM2), HGX B200 (1,000 W, 180 GB; the chip has 192), and the papers
on the architectures Ada and GA102 (products of fp16 with sums in fp32) for RTX 4090 and 3090. AMD: Instinct MI300X
(seven links of 64 GB/s). Cards without NVLink have their PCIe slot of 16 lanes: 16, 32 or 64 GB/s of generation 3, 4
or 5.
"""

from dataclasses import dataclass
from typing import Annotated

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Count, Positive, Range, did_you_mean, section


@dataclass(frozen=True)
class GpuCard:
    """A card. `tflops`: dense products of 16 bits, in 10^12 a second; `memory`: bytes; `link`: bytes a second to the
    other cards of its node, each way."""

    name: str
    tflops: float
    memory: float
    link: float


CARDS = {
    one.name: one
    for one in (
        GpuCard("a10", 125, 24e9, 32e9),
        GpuCard("a100-40gb", 312, 40e9, 300e9),
        GpuCard("a100", 312, 80e9, 300e9),
        GpuCard("b200", 2250, 180e9, 900e9),
        GpuCard("h100", 989, 80e9, 450e9),
        GpuCard("h100-pcie", 756, 80e9, 64e9),
        GpuCard("h200", 989, 141e9, 450e9),
        GpuCard("l4", 121, 24e9, 32e9),
        GpuCard("l40s", 362, 48e9, 32e9),
        GpuCard("mi300x", 1307, 192e9, 448e9),
        GpuCard("rtx3090", 71, 24e9, 32e9),
        GpuCard("rtx4090", 165, 24e9, 32e9),
        GpuCard("t4", 65, 16e9, 16e9),
        GpuCard("v100", 125, 32e9, 150e9),
    )
}


def card_named(name: str) -> GpuCard:
    """Errors: `RecipeError` with the nearest name."""
    if (found := CARDS.get(name.lower())) is None:
        known = ", ".join(sorted(CARDS))
        raise RecipeError(f"--gpu {name}: no such card is known{did_you_mean(name.lower(), CARDS)}", expected=known)
    return found


@section
@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a plan is for, and what of it is given in the place of being measured or assumed.

    - `nodes`: machines; `cards`: cards of each, 8 by default, ignored without `gpu`; `cores`: CPU cores of each, by
      default those of this machine, or 12 a card;
    - `gpu`: the name of a card; `None` is this machine, whose rates are measured;
    - `utilisation`: the share of a card's arithmetic that training and encoding reach;
    - `tokens_a_second`: given rates, by verb (`train`, `encode`), of one card or one process;
    - `tokens_a_text`, `bytes_a_text`, `texts_a_row`: given in the place of a look at the recipe's texts;
    - `disk`, `network`: bytes a second of one node; by default the disk is measured here, and a network has 100 Gbit/s;
    - `price`: of a card for an hour, or of a node where there is no card.
    """

    nodes: Count = 1
    cards: Count = 8
    cores: Count | None = None
    gpu: str | None = None
    utilisation: Annotated[float, Range(gt=0, le=1)] = 0.3
    tokens_a_second: dict[str, Positive] | None = None
    tokens_a_text: Positive | None = None
    bytes_a_text: Positive | None = None
    texts_a_row: Positive | None = None
    disk: Positive | None = None
    network: Positive = 12.5e9
    price: Positive | None = None

    def __post_init__(self) -> None:
        if self.gpu is not None:
            card_named(self.gpu)
        for verb in self.tokens_a_second or {}:
            if verb not in ("train", "encode"):
                raise RecipeError(f"a rate of {verb!r}", expected="train=TOKENS_A_SECOND or encode=TOKENS_A_SECOND")

    @property
    def card(self) -> GpuCard | None:
        return None if self.gpu is None else card_named(self.gpu)

    @property
    def ranks(self) -> int:
        return self.nodes * (1 if self.gpu is None else self.cards)

    @property
    def cores_a_node(self) -> int:
        from embedsmith.core.device import cores

        return self.cores or (cores() if self.gpu is None else 12 * self.cards)

    def __str__(self) -> str:
        what = "this machine" if self.gpu is None else f"{self.cards} x {self.gpu}"
        return f"{self.nodes} x ({what}, {self.cores_a_node} cores)"
