"""What a run would do, what it would take, and what speaks against it, before it starts."""
