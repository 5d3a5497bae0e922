"""The mechanisms of `caruana`, one file each, and what several of them repeat."""
