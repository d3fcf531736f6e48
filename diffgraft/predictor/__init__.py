"""Adapters predicted from pictures: a small network looks at a subject once and returns a LoRA for it."""
