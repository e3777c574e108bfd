"""Text that the product trains, scores and grades on: skills, the standard library, a tokenizer, token streams."""
