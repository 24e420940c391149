"""Whether neurons of SmolLM2 and MiniLM belong to domains, beside chance and random weights."""
