"""Does routing beat the matched dense adapter? Every method at its own best learning rate."""
