"""Native CPU implementations."""
