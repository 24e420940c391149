"""SmolLM2 by MoE++, the attentive gate, MPOE, upcycling and its router options, at equal tokens."""
