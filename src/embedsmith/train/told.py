"""What a run says in words before its first step: what it reads and how, and what of the texts is cut."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.core.settings import name_of, to_plain
from embedsmith.data import RecordSet
from embedsmith.data.record import Text
from embedsmith.data.stream import HasOrder
from embedsmith.models import Embedder
from embedsmith.models.cut import CutTexts, cut_of
from embedsmith.train.feed import Feed, Supply

CUT = "cut.json"


def cut_at(model: Embedder, records: RecordSet[Text]) -> CutTexts | None:
    """What of a source is cut at `max_length`; `None` of one that holds tokens, or is streamed and not read before."""
    if records.tokens is not None or isinstance(records.records, HasOrder) or len(records.records) == 0:
        return None
    return cut_of(model, records.records, records.task)


def tell_of_cut(model: Embedder, sets: Sequence[RecordSet[Text]], output: Path) -> None:
    """A line for each source some of whose texts are cut, and the counts of all of them for the report, as
    `cut.json`."""
    counted: dict[str, Any] = {}
    for records in sets:
        found = cut_at(model, records)
        if found is not None and found.cut:
            log.info("source %s: %s", records.name, found)
        if found is not None:
            counted[records.name] = dataclasses.asdict(found)
    with atomic_file(output / CUT) as file:
        json.dump(counted, file, indent=2, ensure_ascii=False)


def sources_in_words(model: Embedder, feed: Feed) -> list[str]:
    """What every source gives to an epoch, the loss on its batches, and what of its texts is cut."""
    lines = []
    for lane in feed.lanes:
        for supply, line in zip(lane.supplies, lane.plan.summary(), strict=True):
            found = cut_at(model, supply.records)
            lines += [f"source {line}", f"  loss: {loss_in_words(supply)}", *([f"  {found}"] if found else [])]
    return lines


def loss_in_words(supply: Supply) -> str:
    """The name of a loss and the settings that are not its defaults."""
    plain = to_plain(supply.loss)
    settings: Any = supply.loss
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    changed = [f"{key} {value}" for key, value in plain.items() if key != "type" and value != to_plain(usual.get(key))]
    return ", ".join([name_of(supply.loss), *changed])
