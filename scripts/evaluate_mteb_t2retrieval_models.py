"""Score a known model on T2Retrieval with mteb; --help lists the flags."""

import sys

import embedsmith.models
from embedsmith.compat.scripts import t2retrieval_command
from embedsmith.core.errors import EmbedsmithError

if __name__ == "__main__":
    try:
        sys.stdout.write(t2retrieval_command(embedsmith.models.load).to_json())
    except EmbedsmithError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)
