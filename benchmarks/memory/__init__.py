"""Memory that is said against memory that is used, for train, convert and eval."""
