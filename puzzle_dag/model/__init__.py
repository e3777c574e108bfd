"""What a model is here: heterogeneous Llama-shaped layers, their checkpoints, and the vLLM plugin that serves them."""
