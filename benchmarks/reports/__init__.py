"""What the experts of every routed recipe do after a short training."""
