"""Training of the bundled parent: a small Llama-shaped model that is hard to compress because it knows things."""
