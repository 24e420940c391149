"""Time and memory of one layer over the dense module that it stands on."""
