"""What keeps a store sound and quick: verify, gc, migrate, compact."""
