"""No loss waits for a card: who belongs to whom is known to the host, and only what follows from it is sent."""

from itertools import groupby

import pytest
import torch

from embedsmith.core.batch import Side
from tests.losses.cases import every_case, examples_for
from tests.losses.examples import Tiny, make_batch, make_extras
from tests.played_card import CARD, PlayedCard

EVERY = [
    (f"{name}-{place}", loss)
    for name, cases in groupby(every_case(), key=lambda case: case[0])
    for place, (_, loss) in enumerate(cases)
    if (place < 2 or name == "infonce") and not getattr(loss, "memory", 0)  # what is kept lies on the card
]
WORDS = {"_unique2"}  # how many words the texts of a sparse head have is not known beforehand
HARD = ("adversarial", "pairs: ties")


@pytest.mark.parametrize(("name", "loss"), EVERY, ids=[name for name, _ in EVERY])
def test_a_loss_mixes_no_devices_and_waits_for_none(name, loss):
    examples = examples_for(loss)
    for example in [examples[label] for label in HARD if label in examples] or list(examples.values()):
        batch, _ = make_batch(Tiny(), example, loss, make_extras(loss).to(CARD))
        for side in batch.sides():
            side.local = Side({head: rep.map(lambda one: one.to(CARD)) for head, rep in side.local.items()}).local
        with PlayedCard() as card:
            output = loss(batch)
            output.value.backward()
            for side in batch.sides():
                side.settle()
        assert card.operations > 5
        assert card.mixes == []
        assert set(card.waits) <= (WORDS if "sparse" in loss.heads() else set())
        assert all(part.device == CARD for part in output.parts.values())
        leaves = [leaf for side in batch.sides() for head in loss.heads() for leaf in side.local[head].floating()]
        assert any(leaf.grad is not None for leaf in leaves)


def test_the_played_card_notices_what_it_should():
    here, there = torch.ones(3, device=CARD), torch.arange(3)
    with PlayedCard() as card:
        there.to(CARD)
        there.to(CARD, non_blocking=True)
        here[there]
        here.mean() * torch.tensor(2.0)
    assert card.waits == ["a copy to the card that is not queued"]
    assert card.mixes == ["index"]
    for wait in (here.tolist, lambda: here[here > 0], here.nonzero, lambda: here.to("cpu"), lambda: bool(here.sum())):
        card = PlayedCard()
        with pytest.raises((RuntimeError, NotImplementedError)), card:
            wait()
        assert len(card.waits) == 1
