"""What reads and answers like the decoder reference: its JSON configurations and its two scripts."""
