"""The bridge to mteb: our models inside it, its tasks inside ours."""
