"""How much a server takes: of one request, and of all together."""

from dataclasses import dataclass

from embedsmith.core.settings import Count, section


@section
@dataclass(frozen=True)
class ServerLimits:
    """What is refused, so that a server neither runs out of memory nor lets everybody wait.

    queue: texts that may wait for a model; more are refused with 503 and a time to come again.
    body: bytes of a request; more are refused with 413.
    inputs: texts or documents of a request.
    hits: documents that a search may ask for.
    """

    queue: Count = 4096
    body: Count = 2**23
    inputs: Count = 2048
    hits: Count = 1000
