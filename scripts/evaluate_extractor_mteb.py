"""Score a trained checkpoint on tasks of mteb; --help lists the flags."""

import sys

import embedsmith.models
from embedsmith.compat.scripts import extractor_command
from embedsmith.core.errors import EmbedsmithError

if __name__ == "__main__":
    try:
        sys.stdout.write(extractor_command(embedsmith.models.load).to_json())
    except EmbedsmithError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)
