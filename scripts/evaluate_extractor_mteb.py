"""Score a trained checkpoint on tasks of mteb; --help lists the flags."""

import sys

import embedsmith.models
from embedsmith.core.errors import EmbedsmithError
from embedsmith.evaluate.commands import extractor_command

if __name__ == "__main__":
    try:
        sys.stdout.write(extractor_command(embedsmith.models.load).to_json())
    except EmbedsmithError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)
