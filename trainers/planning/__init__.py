"""Planning of a run before it starts: what it would do, what it would cost, and what may go wrong."""
